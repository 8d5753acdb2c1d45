"""What a matrix has in the workspace while its polar factor is computed: slots, sums, its scale."""

from __future__ import annotations

import triton
import triton.language as tl

UNSCALE = tl.constexpr(1.0 / (128.0 * 128.0))
Z_SCALE = tl.constexpr(1.0)  # Z grows to 5.7^STEPS = 34,000

# X three times (W, and two that take turns), then squares: E, E^2, z, and the two Z.
N_WIDE = 3
E, S, Z, ALL_Z = (tl.constexpr(i) for i in range(4))
N_SQUARES = 5
# What is summed over a matrix, one number for each block on or below the diagonal.
GRAM, QUARTIC, DEFECT, FOURTH, FOURTH_Z = (tl.constexpr(i) for i in range(5))
N_SUMS = 5


@triton.jit
def inverse_scale(alpha, squares):
    """1/s, from s^2 = |W|_F^2 / alpha; 0 for a zero matrix."""
    return tl.where(squares > 0, tl.sqrt(alpha / tl.where(squares > 0, squares, 1.0)), 0.0)
