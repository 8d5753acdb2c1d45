"""Elements of a group's matrices, in float64 inside a kernel and in any format outside it."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from lipkernels import backends
from lipkernels.kernels.triton.rounding import rounded

_INTERPRETED = tl.constexpr(backends.is_interpreted())


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """``kernel[(programs,)](...)``."""
    kernel[(programs,)](*arguments, **settings)


@triton.jit
def part_of(base, places, p, column: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to matrix ``p`` of a list of tensors, ``base`` the first: see ``Group.places``."""
    place = tl.load(places + p.to(tl.int64) * WIDTH + column)
    if ALIGNED:
        place = place * (128 // base.dtype.element_ty.primitive_bitwidth)
    return base + place


@triton.jit
def widened(x):
    """A number of any format as float64; Triton's interpreter gets subnormal bfloat16 wrong."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float64)


@triton.jit
def block_at(base, start, n, BLOCK: tl.constexpr):
    """Elements [start, start + BLOCK) as float64, with zeros from the ``n``-th on."""
    i = start + tl.arange(0, BLOCK)
    # No mask where there is nothing to mask: it would split the access into single elements.
    if start + BLOCK <= n:  # noqa: SIM108
        x = tl.load(base + i)
    else:
        x = tl.load(base + i, mask=i < n, other=0.0)
    return widened(x)


@triton.jit
def sum_of(partials, n, LANES: tl.constexpr):
    """The sum of ``n`` float64 numbers, always added in the same order."""
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float64)
    for start in range(0, n, LANES):
        total += tl.load(partials + start + lane, mask=start + lane < n, other=0.0)
    return tl.sum(total)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """float64 to ``DTYPE``; to half precision by way of float32, at most 0.501 units off."""
    if tl.float64 != DTYPE:
        x = rounded(x.to(tl.float32), DTYPE)
    return x


@triton.jit
def saturated(x, limit):
    """``x`` within +-``limit``; NaN stays NaN."""
    x = tl.where(x > limit, limit, x)
    return tl.where(x < -limit, -limit, x)
