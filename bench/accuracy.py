"""Errors of a constrained weight and of its gradient, measured in float64.

The truth is one SVD, W = A S B^T (thin). The polar factor is A B^T; for its gradient, with G the
cotangent and M = A^T G B,

    dL/dW = A [(M - M^T)_ij / (s_i + s_j)] B^T + A S^-1 (A^T G - M B^T)        for rows <= cols

and the transpose of that for a tall matrix. Unlike autograd through an SVD it divides by no
difference of singular values, and so stays accurate where those are close.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Truth:
    """float64: the polar factor, the gradient for a cotangent, and the condition number."""

    polar: Tensor
    gradient: Tensor
    condition: float


def truth(weight: Tensor, cotangent: Tensor) -> Truth:
    """What an exact method returns for ``weight``; both arguments (rows, cols)."""
    if weight.shape[0] > weight.shape[1]:
        wide = truth(weight.T, cotangent.T)
        return Truth(wide.polar.T, wide.gradient.T, wide.condition)
    a, s, bt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    projected = a.T @ cotangent.double()
    m = projected @ bt.T
    within = (m - m.T) / (s[:, None] + s[None, :])
    gradient = a @ (within @ bt + (projected - m @ bt) / s[:, None])
    return Truth(a @ bt, gradient, float(s[0] / s[-1]))


def operator_norm(matrix: Tensor) -> float:
    """Largest singular value in float64, by the smaller Gram matrix: exact to its last digits."""
    x = matrix.detach().double()
    gram = x.mT @ x if x.shape[-2] > x.shape[-1] else x @ x.mT
    return float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0.0).sqrt())


def orthogonality_error(weight: Tensor) -> float:
    """|U U^T - I|_2, for the smaller side."""
    x = weight.detach().double()
    gram = x.mT @ x if x.shape[-2] > x.shape[-1] else x @ x.mT
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return float(torch.linalg.eigvalsh(gram - eye).abs().max())


@dataclass(frozen=True)
class Errors:
    """``norm``: the largest singular value, 1 is promised. ``polar``: |W_bar - U|_2.

    ``gradient``: |g - g*|_F / |g*|_F, and ``gradient_length``: |g|_F / |g*|_F. The last three are
    None for a map that is not the polar factor.
    """

    orthogonality: float
    norm: float
    polar: float | None
    gradient: float | None
    gradient_length: float | None


def errors(constrained: Tensor, gradient: Tensor, exact: Truth, is_polar: bool = True) -> Errors:
    """Of one constrained weight and the gradient that came back for ``exact``'s cotangent."""
    polar = error = length = None
    if is_polar:
        polar = operator_norm(constrained.detach().double() - exact.polar)
        reference = exact.gradient.norm()
        error = float((gradient.double() - exact.gradient).norm() / reference)
        length = float(gradient.double().norm() / reference)
    norm = operator_norm(constrained)
    return Errors(orthogonality_error(constrained), norm, polar, error, length)
