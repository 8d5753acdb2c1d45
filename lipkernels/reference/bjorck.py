"""The Bjorck iteration as named by its beta and number of steps, and its exact gradient.

    X_0 = W / sigma_max(W),     X_{k+1} = (1 + beta) X_k - beta X_k X_k^T X_k

(Bjorck and Bowie, "An iterative algorithm for computing the best estimate of an orthogonal matrix",
1971; as a layer: Anil, Lucas and Grosse, arXiv 1811.05381.) On [0, 1] and for 0 < beta <= 1/2 the
map sigma -> (1 + beta) sigma - beta sigma^3 increases to 1: the result never exceeds norm one.

Every X_k keeps the row space of X_0 = R_0 Q (Q Q^T = I, R_0 m x m, from a QR factorization), so the
loop runs on m x m matrices, in float64:

    R_{k+1} = M_k R_k,     M_k = (1 + beta) I - beta R_k R_k^T,     X_n = R_n Q

It is the iteration itself and not the product A = M_{n-1} .. M_0 applied to X_0 at the end, which
would lift rounding errors by |A| = (1 + beta)^n, and the norm above one.

Gradient. With Gamma = dL/dX_n, the part of dX_0 in the row space moves R_0, the part N outside it
gives dX_n = A N and, to first order, leaves R_k alone. In reverse, from Gamma_n = Gamma Q^T,

    Gamma_k = M_k Gamma_{k+1} - beta (Gamma_{k+1} R_k^T + R_k Gamma_{k+1}^T) R_k
    dL/dX_0 = Gamma_0 Q + A^T Gamma (I - Q^T Q)

The R_k are recomputed, so nothing but W is stored for backward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(R, Q)`` with R Q the wide one of x and x^T, in float64."""
    wide = (x.mT if x.shape[-2] > x.shape[-1] else x).double()
    q, r = torch.linalg.qr(wide.mT)
    return r.mT, q.mT


def _step_matrix(r: Tensor, beta: float) -> Tensor:
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return (1 + beta) * eye - beta * (r @ r.mT)


def _iterates(r: Tensor, beta: float, n_iter: int, tol: float) -> list[Tensor]:
    """R_0 .. R_n, stopped early where |X_{k+1} - X_k|_F would be at most ``tol``."""
    iterates = [r]
    for _ in range(n_iter):
        following = _step_matrix(r, beta) @ r
        change = torch.linalg.vector_norm(following - r, dim=(-2, -1))
        if bool((change <= tol).all()):
            break
        r = following
        iterates.append(r)
    return iterates


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def bjorck(x: Tensor, beta: float, n_iter: int, tol: float) -> Tensor:
    """The iteration from ``x`` (..., rows, cols) of norm at most one. Returns float64."""
    if not _is_finite(x):
        return torch.full_like(x, torch.nan, dtype=torch.float64)
    r, q = _factor(x)
    result = _iterates(r, beta, n_iter, tol)[-1] @ q
    return result.mT if x.shape[-2] > x.shape[-1] else result


def bjorck_vjp(grad: Tensor, x: Tensor, beta: float, n_iter: int, tol: float) -> Tensor:
    """dL/dX_0 from ``grad`` = dL/dX_n: the reverse of :func:`bjorck`, in float64."""
    if not _is_finite(x):
        return torch.full_like(x, torch.nan, dtype=torch.float64)
    tall = x.shape[-2] > x.shape[-1]
    gamma = (grad.mT if tall else grad).double()
    r, q = _factor(x)
    inside = gamma @ q.mT  # Gamma_k, from the last k to the first
    outside = gamma - inside @ q  # A^T Gamma (I - Q^T Q), likewise
    for iterate in reversed(_iterates(r, beta, n_iter, tol)[:-1]):
        step = _step_matrix(iterate, beta)
        crossed = inside @ iterate.mT
        inside = step @ inside - beta * (crossed + crossed.mT) @ iterate
        outside = step @ outside
    result = inside @ q + outside
    return result.mT if tall else result
