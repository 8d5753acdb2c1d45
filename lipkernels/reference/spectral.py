"""Spectral normalization W / sigma_max(W): power iteration, a verified sigma, and the gradient.

Power iteration (u <- W v / |W v|, v <- W^T u / |W^T u|) gives a lower bound of sigma_max, which
may not serve as a divisor: a layer divided by less than its norm is not Lipschitz at all (see
Miyato et al., arXiv 1802.05957, for the usual practice). Here it is the warm start only:

1. power iteration from the stored u on the float64 Gram matrix G of the smaller side,
2. Rayleigh quotient iteration, which converges cubically to an eigenpair (lambda, u) of G,
3. a Cholesky factorization of (1 + tau) lambda I - G: it exists only if lambda is the largest
   eigenvalue up to tau. Otherwise (cold start, near ties) the full eigendecomposition answers.

Gradient of W / sigma with d sigma = u^T dW v (the derivative of a simple singular value):

    dL/dW = Gamma / sigma - <Gamma, W> / sigma^2  u v^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipkernels.reference.scaling import to_unit_magnitude, unscale_gradient

_MARGIN = 1e-10  # tau: what sigma^2 is raised by, far above the rounding of a float64 Cholesky
_RAYLEIGH_STEPS = 3
_TINY = torch.finfo(torch.float64).tiny


def _normalize(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_tiny(x))


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def power_iteration(weight: Tensor, u: Tensor, n_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """``n_iter`` rounds of power iteration: ``(sigma, u, v)``, sigma = u^T W v <= sigma_max.

    ``weight`` (..., rows, cols), ``u`` (..., rows). sigma (...), u and v have unit norm (zero for
    the zero matrix).
    """
    x, scale = to_unit_magnitude(weight)
    # By its largest entry first: the square of a large one would overflow.
    u = u.to(torch.promote_types(u.dtype, x.dtype))
    u = _normalize((u / u.abs().amax(-1, keepdim=True).clamp_min(_tiny(u))).to(x.dtype))
    v = _normalize(_apply(x.mT, u))
    for _ in range(n_iter):
        v = _normalize(_apply(x.mT, u))
        u = _normalize(_apply(x, v))
    # Where sigma_max is beyond the format, its largest number is still a lower bound.
    sigma = ((u * _apply(x, v)).sum(-1) * scale[..., 0, 0]).clamp(max=torch.finfo(x.dtype).max)
    return sigma, u, v


def _largest_eigenpair(gram: Tensor, u: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue (times 1 + tau) and eigenvector of a float64 Gram matrix."""
    u = _normalize(u)
    for _ in range(max_iter):
        image = _apply(gram, u)
        eigenvalue = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
        residual = torch.linalg.vector_norm(image - eigenvalue * u, dim=-1, keepdim=True)
        u = _normalize(image)
        if bool((residual <= tol * eigenvalue).all()):
            break

    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for _ in range(_RAYLEIGH_STEPS):
        eigenvalue = (u * _apply(gram, u)).sum(-1)
        solved, _ = torch.linalg.solve_ex(gram - eigenvalue[..., None, None] * eye, u.unsqueeze(-1))
        # An exactly singular shift is convergence; its solution is not finite and u is kept.
        ok = torch.isfinite(solved).all(dim=-2)
        u = torch.where(ok, _normalize(torch.where(ok, solved.squeeze(-1), u)), u)

    image = _apply(gram, u)
    eigenvalue = (u * image).sum(-1)
    residual = torch.linalg.vector_norm(image - eigenvalue[..., None] * u, dim=-1)
    bound = eigenvalue * (1 + _MARGIN)
    _, info = torch.linalg.cholesky_ex(bound[..., None, None] * eye - gram)
    if bool(((info == 0) & (residual <= 1e-12 * eigenvalue)).all()):
        return bound, u
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return eigenvalues[..., -1].clamp_min(0.0) * (1 + _MARGIN), vectors[..., -1]


def top_singular_triplet(
    weight: Tensor, u: Tensor, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(sigma, u, v, s)`` with sigma_max(weight) <= s sigma <= (1 + 1e-10) sigma_max(weight).

    ``u`` (..., rows) is the start of at most ``max_iter`` power iterations, which stop at a
    relative residual of ``tol``; they affect the time only. All results are float64 (s in the
    compute dtype); the triplet of a NaN or infinite matrix is NaN, of the zero matrix zero.
    """
    scaled, scale = to_unit_magnitude(weight)
    x = scaled.double()
    finite = torch.isfinite(x).all(dim=-1).all(dim=-1)
    x = torch.where(finite[..., None, None], x, 0.0)
    tall = weight.shape[-2] > weight.shape[-1]
    start = _apply(x.mT, u.double()) if tall else u.double()
    wide = x.mT if tall else x
    eigenvalue, left = _largest_eigenpair(wide @ wide.mT, start, max_iter, tol)
    sigma = eigenvalue.sqrt()
    right = _apply(wide.mT, left) / sigma.clamp_min(_TINY)[..., None]
    u, v = (right, left) if tall else (left, right)
    nan = torch.where(finite, 0.0, torch.nan)
    return sigma + nan, u + nan[..., None], v + nan[..., None], scale


def spectral_normalize(weight: Tensor, sigma: Tensor) -> Tensor:
    """W / sigma for a unit-magnitude ``weight``; the zero matrix stays zero."""
    inverse = torch.where(sigma == 0, 0.0, 1.0 / sigma)
    return weight * inverse[..., None, None].to(weight.dtype)


def spectral_normalize_vjp(
    grad: Tensor, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor
) -> Tensor:
    """dL/dW of ``weight / (s sigma)`` from the triplet of :func:`top_singular_triplet`."""
    x, scale = to_unit_magnitude(weight)
    inverse = torch.where(sigma == 0, 0.0, 1.0 / sigma)[..., None, None]
    along = (grad * x).sum(dim=(-2, -1), keepdim=True, dtype=torch.float64)
    rank_one = u.unsqueeze(-1) * v.unsqueeze(-2)
    result = grad.double() * inverse - (along * inverse * inverse) * rank_one
    return unscale_gradient(result.to(x.dtype), scale)
