"""Multiply a matrix of norm at most one by its Lipschitz factor and round it to the layer's dtype.

Rounding is a perturbation: an orthogonal matrix stored in bfloat16 has norm up to 1.005, not 1. The
result of :func:`scale_and_round` has sigma_max <= scale *after* rounding.

float32 and float64: the matrix is shrunk by what rounding can add at the worst, when the roundings
of all entries conspire: |rounding|_2 <= |rounding|_F <= (eps/2) |x|_F <= (eps/2) sqrt(m), m the
smaller side, once for x and once for the product. float16 and bfloat16, where that would cost
percents: the norm of the rounded matrix is computed in float64; where it exceeds the scale, the
matrix is divided by that norm, and by a little more each time, and rounded again; should the last
attempt still exceed it, the worst case is paid in full.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# An orthogonal matrix that is already on the bfloat16 grid takes three or four; the worst case
# would cost it 6% of its norm at 64 x 64 and 11% at 256 x 256.
_ATTEMPTS = 5


def _norm(x: Tensor) -> Tensor:
    """Spectral norm of a half-precision matrix, exact to 1e-10, as (..., 1, 1) float64."""
    x = x.double()
    finite = torch.isfinite(x).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    x = torch.where(finite, x, 0.0)
    gram = x.mT @ x if x.shape[-2] > x.shape[-1] else x @ x.mT
    largest = torch.linalg.eigvalsh(gram)[..., -1:, None].clamp_min(0.0)
    return largest.sqrt() * (1 + 1e-10) + torch.where(finite, 0.0, torch.nan)


def _subnormal_rounding(n: int, dtype: torch.dtype) -> float:
    """Bound of |rounding|_F of n entries below the normal range, where rounding is absolute."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps * n**0.5


@functools.lru_cache(maxsize=4096)
def _worst_case(rows: int, cols: int, kind: torch.dtype, scale: float, dtype: torch.dtype) -> float:
    # One more eps: the scale is rounded too. At least four: what the op itself rounds at any size.
    # float64 results come from float64 iterations, good to about 1e-15 m.
    # A float64 result of a float32 matrix has that one's roundings.
    eps = max(torch.finfo(dtype).eps, torch.finfo(kind).eps)
    relative = eps * (1 + max(4.0, min(rows, cols) ** 0.5))
    if kind == torch.float64:
        relative += 2.0**-44
    return max(0.0, 1.0 - relative - _subnormal_rounding(rows * cols, dtype) / scale)


def worst_case_factor(x: Tensor, scale: float, dtype: torch.dtype) -> float:
    """f with |round(f scale x)|_2 <= scale for every x of norm one."""
    rows, cols = x.shape[-2:]
    return _worst_case(int(rows), int(cols), x.dtype, scale, dtype)


def scale_and_round(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * x`` in ``dtype``, of spectral norm at most ``scale``; x has norm at most one."""
    worst_case = (x * (scale * worst_case_factor(x, scale, dtype))).to(dtype)
    if dtype in (torch.float32, torch.float64):
        return worst_case
    eps = torch.finfo(dtype).eps
    rounded = (x * scale).to(dtype)
    norm = _norm(rounded)
    factor = torch.ones_like(norm)
    for attempt in range(_ATTEMPTS):
        too_large = norm > scale
        if not bool(too_large.any()):
            break
        smaller = factor * (scale / norm) * (1 - eps * 2.0 ** (attempt - 4))
        factor = torch.where(too_large, smaller, factor)
        rounded = (x * (scale * factor)).to(dtype)
        norm = _norm(rounded)
    # A NaN norm fails the comparison, and the worst case carries the NaN on.
    return torch.where(norm <= scale, rounded, worst_case)


def scale_and_round_frobenius(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * x`` in ``dtype`` with the Frobenius norm of x, or of each row, kept <= ``scale``.

    Rounding moves every entry by at most eps/2 of itself, and so the norm: one factor is enough.
    """
    relative = 2.0**-44 if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    relative += torch.finfo(dtype).eps * 0.51
    subnormal = _subnormal_rounding(x.shape[-2] * x.shape[-1], dtype)
    factor = max(0.0, 1.0 - relative - subnormal / scale)
    return (x * (scale * factor)).to(dtype)
