"""``lipkernels::bjorck``: scale * (the named Bjorck iteration of W / sigma_max(W))."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.cuda.split import backward_by_size, by_size
from lipkernels.kernels.lazy import from_cuda, from_triton
from lipkernels.kernels.precision import without_autocast
from lipkernels.kernels.shared import Names, narrow, shared
from lipkernels.kernels.spectral import SAVED_PER_WEIGHT, fake_triplets, to_the_end
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


@without_autocast
def _backward_of_triplets(
    grads: list[Tensor],
    weights: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    beta: float,
    n_iter: int,
    tol: float,
) -> list[Tensor]:
    """The reference's backward of a forward that saved sigma of the weight itself."""
    own = list(saved)
    for i, weight in enumerate(weights):
        _, unit = to_unit_magnitude(weight)
        own[SAVED_PER_WEIGHT * i] = saved[SAVED_PER_WEIGHT * i] / unit[..., 0, 0]
    return _backward_reference(grads, weights, own, scales, beta, n_iter, tol)


_FORWARDS = {
    "reference": _forward_reference,
    "triton": to_the_end(from_triton("bjorck", "forward")),
    "cuda": to_the_end(from_cuda("bjorck", "forward")),
}
_BACKWARDS = {
    "reference": _backward_reference,
    "recomputed": _backward_of_triplets,
    "triton": from_triton("bjorck", "backward"),
    "cuda": from_cuda("bjorck", "backward"),
}


def _forward_of(names: Names) -> Callable[..., Any]:
    return shared(names, _FORWARDS, takes=(1, 1, 1), gives=(1, 1, SAVED_PER_WEIGHT))


def _backward_of(names: Names) -> Callable[..., Any]:
    return shared(names, _BACKWARDS, takes=(1, 1, SAVED_PER_WEIGHT, 1), gives=1, weights=1)


FORWARD = {
    "reference": _forward_reference,
    "triton": _forward_of(narrow("triton")),
    "cuda": _forward_of(by_size("bjorck")),
}
BACKWARD = {
    "reference": _backward_reference,
    "triton": _backward_of(narrow("triton")),
    "cuda": _backward_of(backward_by_size("bjorck", "bjorck")),
}


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
