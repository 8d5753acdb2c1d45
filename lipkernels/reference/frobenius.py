"""Frobenius normalization W / |W|_F, of the whole matrix or of each row, and its gradient.

|W|_2 <= |W|_F, so the whole matrix has norm at most one, with equality only at rank one. Row by
row, every output neuron by itself is 1-Lipschitz and the map as a whole sqrt(rows)-Lipschitz.

Gradient, with Wbar = W / |W|_F:   dL/dW = (Gamma - <Gamma, Wbar> Wbar) / |W|_F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipkernels.reference.scaling import to_unit_magnitude, unscale_gradient


def _inverse_norm(x: Tensor, per_row: bool) -> Tensor:
    dims = (-1,) if per_row else (-2, -1)
    # float64: a float32 sum of a thousand equal squares is already too small by more than rounding.
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float64)
    inverse = torch.where(norm == 0, 0.0, 1.0 / norm)
    inverse = torch.where(torch.isinf(norm), torch.nan, inverse)  # 1 / inf would hide the infinity
    return inverse.to(x.dtype)


def _unit_scale(weight: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    if not per_row:
        return to_unit_magnitude(weight)
    rows, scale = to_unit_magnitude(weight.unsqueeze(-2))  # each row has its own magnitude
    return rows.squeeze(-2), scale.squeeze(-2)


def frobenius_normalize(weight: Tensor, per_row: bool) -> Tensor:
    """``weight`` (..., rows, cols) over its Frobenius norm, or each row over its own."""
    x, _ = _unit_scale(weight, per_row)
    return x * _inverse_norm(x, per_row)


def frobenius_normalize_vjp(grad: Tensor, weight: Tensor, per_row: bool) -> Tensor:
    """dL/dW from ``grad`` = dL/dWbar."""
    x, scale = _unit_scale(weight, per_row)
    inverse = _inverse_norm(x, per_row)
    normalized = x * inverse
    dims = (-1,) if per_row else (-2, -1)
    along = (grad * normalized).sum(dim=dims, keepdim=True)
    return unscale_gradient((grad - along * normalized) * inverse, scale)
