"""``lipkernels::bjorck``: scale * (the named Bjorck iteration of W / sigma_max(W))."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.cuda.split import backward_by_size, by_size
from lipkernels.kernels.formats import Names, by_name, narrow
from lipkernels.kernels.lazy import from_cuda, from_triton
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


def _saved_of(saved: list[Tensor], i: int) -> list[Tensor]:
    return saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)]


def _to_the_end(forward: Callable[..., tuple[list[Tensor], ...]]) -> Callable[..., Any]:
    """A forward that finds sigma_max without a start, and to the end: it takes no limits."""

    def with_limits(
        weights: list[Tensor],
        us: list[Tensor],
        scales: list[float],
        dtype: torch.dtype,
        _max_iter: int,
        _tol: float,
        *others: float,
    ) -> tuple[list[Tensor], ...]:
        return forward(weights, us, scales, dtype, *others)

    return with_limits


_FORWARDS = {
    "reference": _forward_reference,
    "triton": _to_the_end(from_triton("bjorck", "forward")),
    "cuda": _to_the_end(from_cuda("bjorck", "forward")),
}
_BACKWARDS = {
    "reference": _backward_reference,
    "recomputed": _backward_of_triplets,
    "triton": from_triton("bjorck", "backward"),
    "cuda": from_cuda("bjorck", "backward"),
}


def _forward_of(names: Names) -> Callable[..., tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Each weight by the implementation that ``names`` names."""

    def forward(
        weights: list[Tensor],
        us: list[Tensor],
        scales: list[float],
        dtype: torch.dtype,
        *settings: float,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        def run(
            one: Callable[..., tuple[list[Tensor], list[Tensor], list[Tensor]]],
        ) -> Callable[[list[int]], list[tuple[Tensor, Tensor, list[Tensor]]]]:
            def of(members: list[int]) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
                lists = ([values[i] for i in members] for values in (weights, us, scales))
                results, new_us, saved = one(*lists, dtype, *settings)
                return [
                    (result, u, _saved_of(saved, k))
                    for k, (result, u) in enumerate(zip(results, new_us, strict=True))
                ]

            return of

        found = by_name(names(weights), {name: run(one) for name, one in _FORWARDS.items()})
        results, new_us, saved = (list(part) for part in zip(*found, strict=True))
        return results, new_us, [tensor for triplet in saved for tensor in triplet]

    return forward


def _backward_of(names: Names) -> Callable[..., list[Tensor]]:
    """Each weight by the implementation that ``names`` names."""

    def backward(
        grads: list[Tensor],
        weights: list[Tensor],
        saved: list[Tensor],
        scales: list[float],
        *settings: float,
    ) -> list[Tensor]:
        def run(one: Callable[..., list[Tensor]]) -> Callable[[list[int]], list[Tensor]]:
            return lambda members: one(
                [grads[i] for i in members],
                [weights[i] for i in members],
                [tensor for i in members for tensor in _saved_of(saved, i)],
                [scales[i] for i in members],
                *settings,
            )

        return by_name(names(weights), {name: run(one) for name, one in _BACKWARDS.items()})

    return backward


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
