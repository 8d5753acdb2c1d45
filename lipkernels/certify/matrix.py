"""A rigorous upper bound of a matrix's spectral norm, in float64, without any iteration to trust.

Let X be the matrix (its entries are exact in float64), m its smaller side and n its larger one, u =
2^-53, gamma_k = k u / (1 - k u) (Higham, "Accuracy and Stability of Numerical Algorithms", 2002,
section 3). For every order of summation, with or without fused multiply-add,

    |fl(A B) - A B| <= gamma_k |A| |B|   entrywise, k the inner dimension,

so that |fl(X X^T) - X X^T|_2 <= gamma_n |X|_F^2. What is left is the norm of a computed matrix S:

    |S|_2 <= min(|S|_inf, |S|_F),        |S|_2 <= |c| + |S - c I|_2,       |S|_2^2 = |S S^T|_2

The second one, with c the mean of the diagonal, is tight when X is nearly orthogonal: S - c I is
tiny. The third one, repeated, raises the singular values to the powers 2, 4, 8, ..: the largest one
dominates, and the Frobenius norm of the power converges to it from above. Each squaring pays its
rounding, gamma_m |S|_F^2. Whenever one stops, the result is a bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_U = 2.0**-53
_MAX_SQUARINGS = 40
_ENOUGH = 1e-9  # relative gain of a squaring below which more of them are not worth their time
_TIGHT = 1e-6  # likewise, looseness against the longest row, itself a lower bound
_TINY = 2.0**-1000  # larger than what underflow can lose in any of the sums below


def _gamma(k: int) -> float:
    return k * _U / (1 - k * _U)


def _frobenius(x: Tensor) -> float:
    """Upper bound of |x|_F: a sum of squares, its rounding added."""
    n = x.numel()
    return math.sqrt(float(x.square().sum()) * (1 + 2 * _gamma(n + 2)) + n * _TINY) * (1 + 2 * _U)


def _infinity(x: Tensor) -> float:
    return float(x.abs().sum(dim=-1).max()) * (1 + 2 * _gamma(x.shape[-1]))


def _bound_by_squaring(s: Tensor) -> float:
    """Upper bound of |s|_2 for a square matrix s."""
    m = s.shape[-1]
    tight = float(s.diagonal().max()) * (1 + _TIGHT)  # only decides when to stop
    best = math.inf
    # |s|_2 = (norm of the current matrix * scale) undone by `undo`, innermost last.
    undo: list[tuple[float, float]] = []
    current = s
    for _ in range(_MAX_SQUARINGS + 1):
        frobenius = _frobenius(current)
        bound = min(frobenius, _infinity(current), _shifted(current))
        for scale, rounding in reversed(undo):
            bound = math.sqrt(bound + rounding) * scale * (1 + 4 * _U)
        settled = not bound < best * (1 - _ENOUGH) and len(undo) > 3
        best = min(best, bound)
        if settled or best <= tight:
            return best
        if frobenius <= _TINY or not math.isfinite(frobenius):
            return best
        scale = 2.0 ** (math.frexp(frobenius)[1])  # exact; |current / scale|_F < 1
        unit = current / scale
        undo.append((scale, _gamma(m) * _frobenius(unit) ** 2 + _TINY))
        current = unit @ unit.mT
    return best


def _shifted(s: Tensor) -> float:
    """|c| + |s - c I|_2 with c the mean of the diagonal, |d|_2 <= |d d^T|_F^(1/2) for the rest."""
    m = s.shape[-1]
    c = float(s.diagonal().mean())
    rest = s - c * torch.eye(m, dtype=s.dtype, device=s.device)
    frobenius = _frobenius(rest)
    squared = math.sqrt(_frobenius(rest @ rest.mT) + _gamma(m) * frobenius**2 + _TINY)
    norm = min(frobenius, _infinity(rest), squared * (1 + 2 * _U))
    # The subtraction on the diagonal rounds by at most u |s_ii - c|.
    return (abs(c) + norm * (1 + 2 * _U)) * (1 + 2 * _U)


def _flushed(matrix: Tensor) -> float:
    """Bound of the norm of the entries that this processor takes for zeros: subnormal ones.

    ``torch.set_flush_denormal(True)`` hides them from the computation here; the network may run in
    another thread or process, where they count.
    """
    smallest = torch.tensor(2.0**-1074, dtype=torch.float64)
    if float(smallest * 2) > 0.0:
        return 0.0
    # float16's subnormal numbers are normal ones of the processor, in float32.
    least = min(torch.finfo(kind).smallest_normal for kind in (matrix.dtype, torch.float32))
    return math.sqrt(matrix.numel()) * least * (1 + 4 * _U)


def spectral_norm_bound(matrix: Tensor) -> float:
    """Upper bound of the largest singular value of ``matrix`` (rows, cols), as stored.

    Rigorous for every float dtype; NaN or infinite entries give inf. Typically within 1e-9 of the
    norm; within a few 1e-7 for float32 matrices that are orthogonal to rounding.

    >>> 1.0 <= spectral_norm_bound(torch.eye(3)) <= 1.0 + 1e-12
    True
    """
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix: expected a Tensor, got {type(matrix).__name__}")
    if matrix.dim() != 2:
        raise ValueError(f"matrix: expected 2 dimensions, got shape {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise TypeError(f"matrix: expected a floating-point dtype, got {matrix.dtype}")
    if matrix.numel() == 0:
        return 0.0
    x = matrix.detach().to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(x).all()):
        return math.inf
    largest = float(x.abs().max())
    flushed = _flushed(matrix)
    if largest == 0.0:
        return flushed
    # Exact scaling to max |x| in [1/2, 1); two steps, since 2^1074 is no float64. Entries that
    # underflow are below 2^-1074 of the largest, which _TINY covers.
    exponent = math.frexp(largest)[1]
    half = -exponent // 2
    x = torch.ldexp(torch.ldexp(x, torch.tensor(half)), torch.tensor(-exponent - half))
    x = x.mT if x.shape[0] > x.shape[1] else x

    gram = x @ x.mT
    rounding = _gamma(x.shape[1]) * _frobenius(x) ** 2 + x.numel() * _TINY
    bound = math.sqrt(_bound_by_squaring(gram) + rounding) * (1 + 8 * _U)
    try:
        # The one inexact step for a subnormal result.
        result = math.nextafter(math.ldexp(bound, exponent), math.inf)
        return result if flushed == 0.0 else (result + flushed) * (1 + 2 * _U)
    except OverflowError:
        return math.inf
