"""The polar factor of a matrix, by the eigendecomposition of its Gram matrix, and its gradient.

Wide convention (m <= n; a tall matrix is transposed at the door):

    W = P U,    P = (W W^T)^(1/2),    Q = P^-1,    U = Q W,    U U^T = I

U is the closest matrix with orthonormal rows to W in every unitarily invariant norm (Higham,
"Computing the polar decomposition, with applications", 1986).

Gradient. Let Gamma = dL/dU and T = Gamma U^T. From U U^T = I, dU = Y^T... splits in a rotation
inside the row space of U and a part orthogonal to it. Differentiating W = P U gives

    P Y + Y P = T - T^T           (a Lyapunov equation; Y is skew)
    dL/dW = Q Gamma + (Y - Q T) U       for m < n
    dL/dW = Y U                         for m = n, where Q Gamma = Q T U

With P = V diag(p) V^T the Lyapunov equation is diagonal: Y = V [(V^T (T - T^T) V)_ij / (p_i + p_j)] V^T.
Since Y is skew, <dL/dW, W> = 0 and the exact gradient flow preserves the singular values of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipkernels.reference.scaling import to_unit_magnitude, unscale_gradient

# The Gram matrix squares the condition number: past this one float32 loses the small end, and
# everything up to U is done in float64.
_MAX_CONDITION_FLOAT32 = 30.0

# Singular values below this fraction of the largest one are rounding noise of a float64 Gram
# matrix. They are divided by the floor instead of by themselves: the result keeps sigma <= 1, and
# a zero singular direction stays zero.
_FLOOR = 3e-7


def _reciprocal(p: Tensor) -> Tensor:
    """1/p, and 0 where p is 0 (which only the zero matrix has)."""
    return torch.where(p > 0, 1.0 / p, 0.0)


def _decompose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors V of X X^T and the floored singular values p, ascending."""
    eigenvalues, vectors = torch.linalg.eigh(x @ x.mT)
    p = eigenvalues.clamp_min(0.0).sqrt()
    return vectors, torch.maximum(p, _FLOOR * p[..., -1:])


def _inverse_root(vectors: Tensor, p: Tensor) -> Tensor:
    return (vectors * _reciprocal(p)[..., None, :]) @ vectors.mT


def _newton_schulz_step(u: Tensor) -> Tensor:
    """U + (I - U U^T) U / 2: maps sigma to 1.5 sigma - 0.5 sigma^3, which is <= 1 for every sigma.

    It makes a nearly orthogonal U orthogonal to rounding, and is what bounds the largest singular
    value whatever the error made before it. The residual form keeps rounding relative to |U|.
    """
    defect = torch.eye(u.shape[-2], dtype=u.dtype, device=u.device) - u @ u.mT
    return u + 0.5 * (defect @ u)


def _wide_polar_factor(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    finite = torch.isfinite(x).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    x = torch.where(finite, x, 0.0)  # LAPACK refuses NaN; the result is set to NaN below
    vectors, p = _decompose(x)
    ill_conditioned = bool((p[..., -1] > _MAX_CONDITION_FLOAT32 * p[..., 0]).any())
    if ill_conditioned and x.dtype != torch.float64:
        vectors, p = _decompose(x.double())
    u = (_inverse_root(vectors, p) @ x.to(p.dtype)).to(x.dtype)
    u = _newton_schulz_step(u)
    return torch.where(finite, u, torch.nan), vectors.to(x.dtype), p.to(x.dtype)


def polar_factor(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(U, V, p, s)``: the polar factor of ``weight`` (..., rows, cols), and what its VJP needs.

    U has the shape of ``weight`` and the compute dtype. With m = min(rows, cols), V (..., m, m) and
    p (..., m) are the eigenvectors of the smaller Gram matrix of ``weight / s`` and the square
    roots of its eigenvalues; s (..., 1, 1) is a power of two.
    """
    tall = weight.shape[-2] > weight.shape[-1]
    x, scale = to_unit_magnitude(weight)
    u, vectors, p = _wide_polar_factor(x.mT if tall else x)
    return (u.mT if tall else u), vectors, p, scale


def polar_factor_vjp(grad: Tensor, u: Tensor, vectors: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    """dL/dW from ``grad`` = dL/dU and the results of :func:`polar_factor`."""
    tall = u.shape[-2] > u.shape[-1]
    gamma, wide = (grad.mT, u.mT) if tall else (grad, u)

    t = gamma @ wide.mT
    rotated = vectors.mT @ (t - t.mT) @ vectors
    y = vectors @ (rotated * _reciprocal(p[..., :, None] + p[..., None, :])) @ vectors.mT

    singular = bool((p[..., 0] <= _FLOOR * p[..., -1]).any())
    if u.shape[-2] == u.shape[-1] and not singular:
        result = y @ wide
    else:
        q = _inverse_root(vectors, p)
        result = q @ gamma + (y - q @ t) @ wide
    return unscale_gradient(result.mT if tall else result, scale)
