"""Which polynomial the next step of the polar iteration applies: X <- z(X X^T) X.

Odd polynomials x z(x^2), the best ones of degree 9 for an interval [l, u] of singular values in the
sense of Chebyshev: |x z(x^2) - 1| <= e there (Remez's algorithm, run once in float64, with 0.3% of
room above u: the slope there is -80, and rounding must not fall off). z is written in the powers of
E = I - X X^T, whose coefficients are small; those in the powers of X X^T reach 130, and multiply
the rounding of every product by as much.

    row     [l, u]            e        z(0): what small singular values grow by
    GROW    [0.172, 1.144]    0.144    5.7
    NEAR    [0.632, 1.265]    2.2e-3
    NEXT    [0.852, 1.144]    3.6e-5

No estimate of the smallest singular value is needed. f = |E|_F and t = |E^2|_F^2 (the sum of the
fourth powers of E's eigenvalues), which the products leave behind, decide:

    f <= 0.01             polishing converges quadratically from here: done
    t <= m 0.31^4         what GROW leaves behind if nothing is smaller than l: NEXT
    t <= 0.6^4            every eigenvalue of E is at most 0.6: NEAR
    otherwise             GROW

The second rule is a guess where m > 100: a few singular values may hide among many. Then the next t
shows them, and a step was lost. Whatever the order, no singular value ever exceeds 1.144, and
:data:`STEPS` steps and the polishing bring every one from 1/2000 of the largest to one.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEPS = 6
DONE = tl.constexpr(1e-2)
# Of |E^2|_F^2: E of many rows has a Frobenius norm of 1e-2 from its roundings alone.
FAST_DONE = tl.constexpr(0.02 * 0.02 * 0.02 * 0.02)

# (l, u, e) and the coefficients of E^0 .. E^4 in z.
GROW, NEAR, NEXT = range(3)
INTERVALS = (
    (0.171605, 1.14404, 0.14404),
    (0.632455, 1.264911, 0.00218),
    (0.851689, 1.14404, 3.55e-05),
)
COEFFICIENTS = (
    (1.01360495, 1.71072954, -0.119720537, -12.1004201, 15.2026228),
    (1.00049779, 0.483115564, 0.349360243, 0.477526377, 0.450920238),
    (0.999991896, 0.499416231, 0.375774676, 0.339740689, 0.276765989),
)
# The same with FAST products (see `polar`), whose E is off by 1e-3: 2% of room above u.
FAST_INTERVALS = ((0.17453, 1.14404, 0.14404), *INTERVALS[1:])
FAST_COEFFICIENTS = (
    (1.05171173, 1.58347253, -1.12014432, -8.97299077, 13.0694558),
    *COEFFICIENTS[1:],
)


@triton.jit
def choose(f, t, m, FAST: tl.constexpr):
    """The row for a matrix with ``m`` rows, f = |E|_F and t = |E^2|_F^2; -1: none, it is done."""
    row = tl.where(t <= 0.6 * 0.6 * 0.6 * 0.6, 1, 0)
    row = tl.where(t <= m * (0.31 * 0.31 * 0.31 * 0.31), 2, row)
    return tl.where(t <= FAST_DONE if FAST else f <= DONE, -1, row)
