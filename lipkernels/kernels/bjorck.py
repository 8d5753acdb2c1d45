"""``lipkernels::bjorck``: scale * (the named Bjorck iteration of W / sigma_max(W))."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.formats import by_format
from lipkernels.kernels.lazy import from_triton
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


_narrow_forward = from_triton("bjorck", "forward")
_narrow_backward = from_triton("bjorck", "backward")


def _saved_of(saved: list[Tensor], i: int) -> list[Tensor]:
    return saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)]


def _forward_triton(
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
    def run(
        forward: Callable[..., tuple[list[Tensor], list[Tensor], list[Tensor]]], *limits: float
    ) -> Callable[[list[int]], list[tuple[Tensor, Tensor, list[Tensor]]]]:
        def of(members: list[int]) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
            lists = ([values[i] for i in members] for values in (weights, us, scales))
            results, new_us, saved = forward(*lists, dtype, *limits, beta, n_iter, tol)
            return [
                (result, u, _saved_of(saved, k))
                for k, (result, u) in enumerate(zip(results, new_us, strict=True))
            ]

        return of

    # In Triton sigma_max is found without a start, and to the end.
    limits = (max_iter_spectral, tol_spectral)
    found = by_format(weights, run(_forward_reference, *limits), run(_narrow_forward))
    results, new_us, saved = (list(part) for part in zip(*found, strict=True))
    return results, new_us, [tensor for triplet in saved for tensor in triplet]


def _backward_triton(
    grads: list[Tensor],
    weights: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    beta: float,
    n_iter: int,
    tol: float,
) -> list[Tensor]:
    def run(backward: Callable[..., list[Tensor]]) -> Callable[[list[int]], list[Tensor]]:
        return lambda members: backward(
            [grads[i] for i in members],
            [weights[i] for i in members],
            [tensor for i in members for tensor in _saved_of(saved, i)],
            [scales[i] for i in members],
            beta,
            n_iter,
            tol,
        )

    return by_format(weights, run(_backward_reference), run(_narrow_backward))


FORWARD = {"reference": _forward_reference, "triton": _forward_triton}
BACKWARD = {"reference": _backward_reference, "triton": _backward_triton}


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
