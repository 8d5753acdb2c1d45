"""``lipkernels::bjorck``: scale * (the named Bjorck iteration of W / sigma_max(W))."""

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.precision import without_autocast
from lipkernels.kernels.spectral import SAVED_PER_WEIGHT, fake_triplets
from lipkernels.reference import bjorck as reference
from lipkernels.reference import spectral
from lipkernels.reference.rounding import scale_and_round
from lipkernels.reference.scaling import saturated, to_unit_magnitude


def _normalized(weight: Tensor, sigma: Tensor) -> Tensor:
    unit, _ = to_unit_magnitude(weight)
    return spectral.spectral_normalize(unit.double(), sigma)


@without_autocast
def _forward_reference(
    weights: list[Tensor],
    us: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    max_iter_spectral: int,
    tol_spectral: float,
    beta: float,
    n_iter: int,
    tol: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    results, new_us, saved = [], [], []
    for weight, u, scale in zip(weights, us, scales, strict=True):
        sigma, left, right, _ = spectral.top_singular_triplet(
            weight, u, max_iter_spectral, tol_spectral
        )
        orthogonal = reference.bjorck(_normalized(weight, sigma), beta, n_iter, tol)
        results.append(scale_and_round(orthogonal, scale, dtype).contiguous())
        new_us.append(left.to(u.dtype, copy=True))
        saved += [sigma, left.contiguous(), right.contiguous()]
    return results, new_us, saved


@without_autocast
def _backward_reference(
    grads: list[Tensor],
    weights: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    beta: float,
    n_iter: int,
    tol: float,
) -> list[Tensor]:
    out = []
    for i, (grad, weight, scale) in enumerate(zip(grads, weights, scales, strict=True)):
        sigma, u, v = saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)]
        normalized = _normalized(weight, sigma)
        d_normalized = reference.bjorck_vjp(grad.double() * scale, normalized, beta, n_iter, tol)
        gradient = spectral.spectral_normalize_vjp(d_normalized, weight, sigma, u, v)
        out.append(saturated(gradient, weight.dtype).contiguous())
    return out


FORWARD = {"reference": _forward_reference}
BACKWARD = {"reference": _backward_reference}


@custom_op("lipkernels::bjorck", mutates_args=())
def bjorck(
    weights: list[Tensor],
    us: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    max_iter_spectral: int,
    tol_spectral: float,
    beta: float,
    n_iter: int,
    tol: float,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    forward = FORWARD[backend]
    return forward(weights, us, scales, dtype, max_iter_spectral, tol_spectral, beta, n_iter, tol)


@bjorck.register_fake
def _(
    weights: list[Tensor],
    us: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    max_iter_spectral: int,
    tol_spectral: float,
    beta: float,
    n_iter: int,
    tol: float,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    results = [weight.new_empty(weight.shape, dtype=dtype) for weight in weights]
    return results, [torch.empty_like(u) for u in us], fake_triplets(weights)


@custom_op("lipkernels::bjorck_backward", mutates_args=())
def bjorck_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    beta: float,
    n_iter: int,
    tol: float,
    backend: str,
) -> list[Tensor]:
    return BACKWARD[backend](grads, weights, saved, scales, beta, n_iter, tol)


@bjorck_backward.register_fake
def _(
    grads: list[Tensor],
    weights: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    beta: float,
    n_iter: int,
    tol: float,
    backend: str,
) -> list[Tensor]:
    return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]


def _setup_context(ctx, inputs, output):
    weights, _, ctx.scales, _, _, _, ctx.beta, ctx.n_iter, ctx.tol, ctx.backend = inputs
    _, new_us, saved = output
    ctx.save_for_backward(*weights, *saved)
    ctx.mark_non_differentiable(*new_us, *saved)
    ctx.n_weights = len(weights)


def _backward(ctx, grads, _us_grads, _saved_grads):
    n = ctx.n_weights
    weights, saved = list(ctx.saved_tensors[:n]), list(ctx.saved_tensors[n:])
    gradients = bjorck_backward(
        grads, weights, saved, ctx.scales, ctx.beta, ctx.n_iter, ctx.tol, ctx.backend
    )
    return gradients, [None] * n, *[None] * 8


bjorck.register_autograd(_backward, setup_context=_setup_context)
