"""The polar factor of a matrix, by the eigendecomposition of its Gram matrix, and its gradient.

Wide convention (m <= n; a tall matrix is transposed at the door):

    W = P U,    P = (W W^T)^(1/2),    Q = P^-1,    U = Q W,    U U^T = I

U is the closest matrix with orthonormal rows to W in every unitarily invariant norm (Higham,
"Computing the polar decomposition, with applications", 1986).

Gradient. U U^T = I makes A = dU U^T skew; write dU = A U + N with N U^T = 0. Differentiating
W = P U (P symmetric) and comparing with its transpose,

    N = Q dW (I - U^T U),        P A + A P = dW U^T - U dW^T.

The operator A -> P A + A P is self-adjoint, so its inverse moves to the other factor of
<Gamma, A U>. With Gamma = dL/dU and T = Gamma U^T,

    P Y + Y P = T - T^T                 (a Lyapunov equation; Y is skew)
    dL/dW = Q Gamma + (Y - Q T) U       for m < n
    dL/dW = Y U                         for m = n, where N = 0

With P = V diag(p) V^T the equation is diagonal: (V^T Y V)_ij = (V^T (T - T^T) V)_ij / (p_i + p_j).
Since Y is skew, <dL/dW, W> = 0, and the exact gradient flow preserves the singular values of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipkernels.reference.scaling import for_products, to_unit_magnitude, unscale_gradient

# The Gram matrix squares the condition number: past this one float32 loses the small end, and
# everything up to U is done in float64.
MAX_CONDITION_FLOAT32 = 30.0

# Singular values below this fraction of the largest one are rounding noise of a float64 Gram
# matrix. They are divided by the floor instead of by themselves: the result keeps sigma <= 1, and
# a zero singular direction stays zero.
_FLOOR = 3e-7


def _reciprocal(p: Tensor) -> Tensor:
    """1/p, and 0 where p is 0 (which only the zero matrix has)."""
    return torch.where(p > 0, 1.0 / p, 0.0)


def floored_root(eigenvalues: Tensor) -> Tensor:
    """The singular values p, ascending, of the eigenvalues of a Gram matrix; see _FLOOR."""
    p = eigenvalues.clamp_min(0.0).sqrt()
    return torch.maximum(p, _FLOOR * p[..., -1:])


def _decompose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors V of X X^T and the floored singular values p, ascending."""
    eigenvalues, vectors = torch.linalg.eigh(x @ x.mT)
    return vectors, floored_root(eigenvalues)


def _inverse_root(vectors: Tensor, p: Tensor) -> Tensor:
    return (vectors * _reciprocal(p)[..., None, :]) @ vectors.mT


def _newton_schulz_step(u: Tensor) -> Tensor:
    """U + (I - U U^T) U / 2: maps sigma to 1.5 sigma - 0.5 sigma^3.

    That lies in [-1, 1] for sigma in [0, 2]: it makes a nearly orthogonal U orthogonal to rounding,
    and bounds the largest singular value unless the errors made before it reach 100%. The floored p
    is accurate to percents at its smallest, where it is the noise of a float64 Gram matrix.

    The residual is taken in float64: the float32 roundings of a long sum of like terms (a constant
    row) add up instead of cancelling, and would be read as a defect. The correction is small, and
    so are its roundings.
    """
    wide = u.double()
    defect = torch.eye(u.shape[-2], dtype=wide.dtype, device=u.device) - wide @ wide.mT
    return u + 0.5 * (defect.to(u.dtype) @ u)


def _wide_polar_factor(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    finite = torch.isfinite(x).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    kind = x.dtype
    x = for_products(torch.where(finite, x, 0.0))  # LAPACK refuses NaN; the result is set to it
    vectors, p = _decompose(x)
    ill_conditioned = bool((p[..., -1] > MAX_CONDITION_FLOAT32 * p[..., 0]).any())
    if ill_conditioned and x.dtype != torch.float64:
        x = x.double()
        vectors, p = _decompose(x)
    u = _newton_schulz_step(_inverse_root(vectors, p) @ x).to(kind)
    return torch.where(finite, u, torch.nan), vectors.to(kind), p.to(kind)


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
    gamma, wide, vectors = for_products(gamma), for_products(wide), for_products(vectors)
    p = p.to(vectors.dtype)

    t = gamma @ wide.mT
    rotated = vectors.mT @ (t - t.mT) @ vectors
    y = vectors @ (rotated * _reciprocal(p[..., :, None] + p[..., None, :])) @ vectors.mT

    singular = bool((p[..., 0] <= _FLOOR * p[..., -1]).any())
    if u.shape[-2] == u.shape[-1] and not singular:
        result = y @ wide
    else:
        q = _inverse_root(vectors, p)
        result = q @ gamma + (y - q @ t) @ wide
    return unscale_gradient((result.mT if tall else result).to(u.dtype), scale)
