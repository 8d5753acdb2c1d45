"""Back to the constraint W = k U, U U^T = I, after an optimizer step, and gradients along it.

Wide convention (m <= n), X = W / k, E = I - X X^T.

*Projection.* The tangent space at X is {D : D X^T skew}. The orthogonal projection of a gradient G,

    G - (G X^T + X G^T) X / 2,

is also what differentiating through the polar factor gives at X (P = I there): an optimizer that is
fed projected gradients sees what it would see if the weight were reparametrized.

Where G = A^T B is the product of a batch's (A the gradients of a layer's outputs, B its inputs),
and C = B X^T and D = A X are known, which a layer computes anyway,

    (G X^T + X G^T) X = (S + S^T) X  with S = A^T C,      or      A^T (C X) + C^T D,

of which the first costs less than products with G for a batch smaller than the weight, and the
second for one that is much smaller.

*Retraction.* The polar factor of X is (I - E)^(-1/2) X = (I + E/2 + 3/8 E^2 + ..) X. A step of an
optimizer leaves E small, and the first terms suffice: the next call sees what is missing. So that
no singular value passes one on the way, the coefficient c of E^2 is taken smaller than 3/8, namely
so that sigma (1 + e/2 + c e^2), e = 1 - sigma^2, is one at both ends of e in [-b, 0], b >= |E|_2:

    c = ((1 + b)^(-1/2) - 1 + b/2) / b^2.

Between the ends it is below one, and so it is for e in [0, 1]. E is computed in float64, and what
float32 rounds in the product is bounded by its Frobenius norms and paid by a division. (Of a large
matrix after a large step the C++ library computes E in float32 and pays for what that may round,
and leaves E^2 to the next call where |E|_F is small: c = 0 is sound too.)

Retracting after each step: Absil, Mahony and Sepulchre, "Optimization algorithms on matrix
manifolds", 2008, section 4.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipkernels.reference.polar import polar_factor
from lipkernels.reference.rounding import scale_and_round
from lipkernels.reference.scaling import compute_dtype, for_products

# |E|_F up to which the polynomial is used; beyond, the polar factor itself.
_MAX_STEP = 0.9


def project(grad: Tensor, weight: Tensor, scale: float) -> Tensor:
    """The part of ``grad`` (..., rows, cols) along the constraint at ``weight``, in its format."""
    tall = weight.shape[-2] > weight.shape[-1]
    kind = compute_dtype(weight.dtype)
    g, x = for_products(grad.to(kind)), for_products(weight.to(kind))
    if tall:
        g, x = g.mT, x.mT
    t = g @ x.mT
    projected = g - (t + t.mT) @ x / (2 * scale * scale)
    return (projected.mT if tall else projected).to(grad.dtype)


def _multiplications(batch: int, m: int, n: int) -> dict[str, int]:
    """What each way to project A^T B takes, beyond A^T B."""
    return {
        "whole": 2 * m * m * n,
        "symmetric": batch * m * m + m * m * n,
        "low rank": 2 * batch * m * n,
    }


def is_cheaper_as_product(batch: int, rows: int, cols: int) -> bool:
    """Whether :func:`project_product` takes less than forming the product and projecting it."""
    costs = _multiplications(batch, min(rows, cols), max(rows, cols))
    return min(costs.values()) < costs["whole"]


def project_product(
    a: Tensor, b: Tensor, c: Tensor | None, d: Tensor | None, weight: Tensor, scale: float
) -> Tensor:
    """``project(a.T @ b, weight, scale)``, from c = b W^T and d = a W if they are there.

    a (batch, rows), b (batch, cols), c (batch, rows), d (batch, cols), one format.
    """
    (rows, cols), batch = weight.shape, len(a)
    if rows > cols:
        return project_product(b, a, d, c, weight.T, scale).T
    costs = _multiplications(batch, rows, cols)
    for given in (c, d):
        if given is None:
            costs["low rank"] += batch * rows * cols
    if c is None:
        costs["symmetric"] += batch * rows * cols
    minus_half = -0.5 / (scale * scale)
    way = min(costs, key=costs.__getitem__)
    if way == "whole":
        along = a.T @ b
        t = along @ weight.T
        return along.addmm_(t + t.T, weight, alpha=minus_half)
    c = b @ weight.T if c is None else c
    if way == "low rank":
        d = a @ weight if d is None else d
        along = a.T @ torch.addmm(b, c, weight, alpha=minus_half)
        return along.addmm_(c.T, d, alpha=minus_half)
    s = a.T @ c
    return (a.T @ b).addmm_(s + s.T, weight, alpha=minus_half)


def _second_coefficient(b: Tensor) -> Tensor:
    series = 0.375 - 0.3125 * b - 1e-5  # from below; the formula cancels where b is tiny
    exact = ((1 + b).rsqrt() - 1 + 0.5 * b) / b.square().clamp_min(1e-6) * (1 - 1e-6)
    return torch.where(b < 1e-3, series, exact).clamp_min(0.0)


def _step(x: Tensor, e: Tensor, norm: Tensor) -> Tensor:
    """(I + E/2 + c E^2) X for one X (m, n), times what float32 may have added."""
    c = _second_coefficient(torch.linalg.matrix_norm(e @ e).sqrt())
    correction = 0.5 * e + c * (e @ e)
    m = x.shape[-2]
    rounding = (m + 4) * torch.finfo(x.dtype).eps
    lost = rounding * torch.linalg.matrix_norm(correction) * math.sqrt(m) * (1 + norm).sqrt()
    return (x + correction.to(x.dtype) @ x) / (1 + lost).to(x.dtype)


def retract(weight: Tensor, scale: float) -> Tensor:
    """``weight`` (rows, cols), near ``scale`` times an orthogonal matrix, back to there.

    The norm of the result, as rounded to the format of ``weight``, is at most ``scale``.
    """
    tall = weight.shape[-2] > weight.shape[-1]
    x = for_products(weight.to(compute_dtype(weight.dtype)))
    x = (x.mT if tall else x) / scale
    wide = x.double()
    e = torch.eye(x.shape[-2], dtype=wide.dtype, device=x.device) - wide @ wide.mT
    norm = torch.linalg.matrix_norm(e)
    if not bool(norm <= _MAX_STEP):  # NaN too
        return scale_and_round(polar_factor(weight)[0], scale, weight.dtype)
    stepped = _step(x, e, norm)
    return scale_and_round((stepped.mT if tall else stepped), scale, weight.dtype)
