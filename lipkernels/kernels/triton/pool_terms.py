"""What the kernels of a pool do with the pixels of a window, and with a gradient that comes back.

    NORM        y_o = sqrt(sum x_i^2)       dL/dx_i = x_i  sum of Gamma_o / (y_o + number)
    otherwise   y_o = number  sum x_i       dL/dx_i = number  sum of Gamma_o

``number`` is a float32 argument, and for float64 images two int32, ``high`` and ``low``. Sums run
in float32 (float64 for float64), the square root and the division are those of IEEE.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lipkernels.kernels.triton.rounding import from_halves, rounded


@triton.jit
def wide(x):
    """``x`` in the format that sums run in."""
    half: tl.constexpr = x.dtype == tl.float16 or x.dtype == tl.bfloat16
    return x.to(tl.float32) if half else x


@triton.jit
def zeros_like(pointer, shape: tl.constexpr):
    """Sums to begin with, of what ``pointer`` points to."""
    return tl.zeros(shape, tl.float64 if pointer.dtype.element_ty == tl.float64 else tl.float32)


@triton.jit
def summand(x, NORM: tl.constexpr):
    """What a pixel adds to its window."""
    v = wide(x)
    return v * v if NORM else v


@triton.jit
def _times(x, number, high, low):
    double: tl.constexpr = x.dtype == tl.float64
    return x * from_halves(high, low) if double else x * number


@triton.jit
def of_window(total, number, high, low, dtype: tl.constexpr, NORM: tl.constexpr):
    """A window's result from its sum."""
    if NORM:
        y = tl.sqrt_rn(total) if total.dtype == tl.float32 else tl.sqrt(total)
    else:
        y = _times(total, number, high, low)
    return rounded(y, dtype)


@triton.jit
def share(grad, y, at, inside, number, high, low, NORM: tl.constexpr):
    """What a window sends back to each of its pixels, before :func:`of_pixel`; 0 outside."""
    g = wide(tl.load(grad + at, mask=inside, other=0.0))
    if NORM:
        norm = wide(tl.load(y + at, mask=inside, other=1.0))
        double: tl.constexpr = g.dtype == tl.float64
        g = g / (norm + from_halves(high, low)) if double else tl.div_rn(g, norm + number)
    return g


@triton.jit
def of_pixel(total, x, at, inside, number, high, low, dtype: tl.constexpr, NORM: tl.constexpr):
    """A pixel's gradient from the shares of its windows."""
    if NORM:
        v = wide(tl.load(x + at, mask=inside, other=0.0)) * total
    else:
        v = _times(total, number, high, low)
    return rounded(v, dtype)
