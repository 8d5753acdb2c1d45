"""The Bjorck iteration as named by its beta and number of steps, and its exact gradient.

    X_0 = W / sigma_max(W),     X_{k+1} = (1 + beta) X_k - beta X_k X_k^T X_k

(Bjorck and Bowie, "An iterative algorithm for computing the best estimate of an orthogonal matrix",
1971; as a layer: Anil, Lucas and Grosse, arXiv 1811.05381.) On [0, 1] and for 0 < beta <= 1/2 the
map sigma -> (1 + beta) sigma - beta sigma^3 increases to 1: the result never exceeds norm one.

Every X_k is A_k X_0 with A_k a polynomial in the m x m Gram matrix G_0, so the loop runs there:

    M_k = (1 + beta) I - beta G_k,     A_{k+1} = M_k A_k,     G_{k+1} = M_k G_k M_k

in float64, since A grows to (1 + beta)^k in small singular directions. The gradient is the exact
reverse of these three lines; the m x m matrices are recomputed, so nothing but W is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _steps(gram: Tensor, beta: float, n_iter: int, tol: float) -> list[tuple[Tensor, Tensor]]:
    """The pairs (M_k, G_k) of the iteration, stopped early when |X_{k+1} - X_k|_F <= tol."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    pairs = []
    for _ in range(n_iter):
        # |X_{k+1} - X_k|_F^2 = beta^2 tr((I - G) G (I - G))
        defect = eye - gram
        change = beta * (defect @ gram * defect).sum(dim=(-2, -1)).clamp_min(0.0).sqrt()
        if bool((change <= tol).all()):
            break
        step = (1 + beta) * eye - beta * gram
        pairs.append((step, gram))
        gram = step @ gram @ step
        gram = 0.5 * (gram + gram.mT)
    return pairs


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.shape[-2] > x.shape[-1] else x


def bjorck(x: Tensor, beta: float, n_iter: int, tol: float) -> Tensor:
    """The iteration from ``x`` (..., rows, cols) of norm at most one. Returns float64."""
    wide = _wide(x).double()
    if not bool(torch.isfinite(wide).all()):
        return torch.full_like(x, torch.nan, dtype=torch.float64)
    gram = wide @ wide.mT
    product = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for step, _ in _steps(gram, beta, n_iter, tol):
        product = step @ product
    result = product @ wide
    return result.mT if wide.shape != x.shape else result


def bjorck_vjp(grad: Tensor, x: Tensor, beta: float, n_iter: int, tol: float) -> Tensor:
    """dL/dX_0 from ``grad`` = dL/dX_n: the reverse of :func:`bjorck`, in float64."""
    tall = x.shape[-2] > x.shape[-1]
    wide = _wide(x).double()
    gamma = (grad.mT if tall else grad).double()
    if not bool(torch.isfinite(wide).all()):
        return torch.full_like(x, torch.nan, dtype=torch.float64)
    pairs = _steps(wide @ wide.mT, beta, n_iter, tol)
    products = [torch.eye(wide.shape[-2], dtype=wide.dtype, device=wide.device)]
    for step, _ in pairs:
        products.append(step @ products[-1])

    d_wide = products[-1].mT @ gamma
    d_product = gamma @ wide.mT
    d_gram = torch.zeros_like(d_product)
    for (step, gram), product in zip(reversed(pairs), reversed(products[:-1]), strict=True):
        d_step = d_product @ product.mT + d_gram @ (gram @ step).mT + (step @ gram).mT @ d_gram
        d_product = step.mT @ d_product
        d_gram = step.mT @ d_gram @ step.mT - beta * d_step
    d_wide = d_wide + (d_gram + d_gram.mT) @ wide
    return d_wide.mT if tall else d_wide
