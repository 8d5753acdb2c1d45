"""Errors of a contender's results and gradients, against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.accuracy import operator_norm, orthogonality_error

Exact = tuple[Sequence[Tensor], Sequence[Tensor]]
Figures = dict[str, float | None]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact|_F / |exact|_F, in float64."""
    difference = found.detach().double() - exact.detach().double()
    return float(difference.norm() / exact.detach().double().norm().clamp_min(1e-300))


def _worst(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float | None:
    errors = [relative_error(f, e) for f, e in zip(found, exact, strict=True)]
    # Not max(errors): it may lose a NaN.
    return float(torch.tensor(errors, dtype=torch.float64).max()) if errors else None


def of_data(results: Sequence[Tensor], gradients: Sequence[Tensor], exact: Exact) -> Figures:
    """The worst relative errors."""
    return {"value": _worst(results, exact[0]), "gradient": _worst(gradients, exact[1])}


def of_weights(
    results: Sequence[Tensor], gradients: Sequence[Tensor], exact: Exact, orthogonal: bool
) -> Figures:
    """And, of the worst weight, the norm less one (the promise: at most 0) and |U U^T - I|_2."""
    norms = torch.tensor([operator_norm(r) for r in results], dtype=torch.float64)
    defects = [orthogonality_error(r) for r in results] if orthogonal else []
    return {
        "norm_minus_1": float(norms.max()) - 1.0,
        "orthogonality": max(defects, default=None),
        **of_data(results, gradients, exact),
    }
