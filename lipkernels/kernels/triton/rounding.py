"""float32 to a narrower format inside a kernel, to nearest, ties to even; float64 arguments."""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from lipkernels import backends

_INTERPRETED = tl.constexpr(backends.is_interpreted())


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` in the format ``dtype``.

    What the hardware's conversion does; but Triton's interpreter cuts bfloat16 off, so there the
    same rounding is done on the bits.
    """
    if _INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(x == x, nearest, 0x7FC0)  # the carry could turn a NaN into zero
        result = nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


def halves(number: float) -> tuple[int, int]:
    """The bits of a float64 as two int32, for :func:`from_halves`: a kernel takes no float64."""
    high, low = struct.unpack(">ii", struct.pack(">d", number))
    return high, low


@triton.jit
def from_halves(high, low):
    """The float64 of :func:`halves`."""
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)
