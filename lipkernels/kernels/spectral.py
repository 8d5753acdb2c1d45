"""``lipkernels::spectral_normalize``: scale * W / sigma_max(W); ``lipkernels::power_iteration``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.cuda.split import by_size
from lipkernels.kernels.lazy import from_cuda, from_triton
from lipkernels.kernels.precision import without_autocast
from lipkernels.kernels.shared import Names, narrow, shared
from lipkernels.reference import spectral as reference
from lipkernels.reference.rounding import scale_and_round
from lipkernels.reference.scaling import saturated, to_unit_magnitude

SAVED_PER_WEIGHT = 3  # sigma (of the unit-magnitude weight; triton: of the weight), u, v


def fake_triplets(weights: list[Tensor]) -> list[Tensor]:
    saved = []
    for weight in weights:
        *batch, rows, cols = weight.shape
        for shape in (batch, (*batch, rows), (*batch, cols)):
            saved.append(weight.new_empty(shape, dtype=torch.float64))
    return saved


@without_autocast
def _forward_reference(
    weights: list[Tensor],
    us: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    max_iter: int,
    tol: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    results, new_us, saved = [], [], []
    for weight, u, scale in zip(weights, us, scales, strict=True):
        sigma, left, right, _ = reference.top_singular_triplet(weight, u, max_iter, tol)
        unit, _ = to_unit_magnitude(weight)
        normalized = reference.spectral_normalize(unit.double(), sigma)
        results.append(scale_and_round(normalized, scale, dtype).contiguous())
        new_us.append(left.to(u.dtype, copy=True))
        saved += [sigma, left.contiguous(), right.contiguous()]
    return results, new_us, saved


@without_autocast
def _backward_reference(
    grads: list[Tensor], weights: list[Tensor], saved: list[Tensor], scales: list[float]
) -> list[Tensor]:
    out = []
    for i, (grad, weight, scale) in enumerate(zip(grads, weights, scales, strict=True)):
        sigma, u, v = saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)]
        gradient = reference.spectral_normalize_vjp(grad.double() * scale, weight, sigma, u, v)
        out.append(saturated(gradient, weight.dtype).contiguous())
    return out


@without_autocast
def _power_iteration_reference(
    weights: list[Tensor], us: list[Tensor], n_iter: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    triplets = [
        reference.power_iteration(weight, u, n_iter) for weight, u in zip(weights, us, strict=True)
    ]
    sigmas, lefts, rights = (list(part) for part in zip(*triplets, strict=True))
    return sigmas, [u.clone() for u in lefts], rights


def to_the_end(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that finds sigma_max without a start, and to the end: it takes no limits."""

    def with_limits(
        weights: list[Tensor],
        us: list[Tensor],
        scales: list[float],
        dtype: torch.dtype,
        _max_iter: int,
        _tol: float,
        *others: float,
    ) -> Any:
        return forward(weights, us, scales, dtype, *others)

    return with_limits


_FORWARDS = {
    "reference": _forward_reference,
    "triton": to_the_end(from_triton("spectral", "forward")),
}
_BACKWARDS = {"reference": _backward_reference, "triton": from_triton("spectral", "backward")}
_POWER_ITERATIONS = {
    "reference": _power_iteration_reference,
    "triton": from_triton("power", "power_iteration"),
    "cuda": from_cuda("power", "power_iteration"),
}


def _power_iteration_of(names: Names) -> Callable[..., Any]:
    return shared(names, _POWER_ITERATIONS, takes=(1, 1), gives=(1, 1, 1))


FORWARD = {
    "reference": _forward_reference,
    "triton": shared(narrow("triton"), _FORWARDS, takes=(1, 1, 1), gives=(1, 1, SAVED_PER_WEIGHT)),
}
BACKWARD = {
    "reference": _backward_reference,
    "triton": shared(
        narrow("triton"), _BACKWARDS, takes=(1, 1, SAVED_PER_WEIGHT, 1), gives=1, weights=1
    ),
}
POWER_ITERATION = {
    "reference": _power_iteration_reference,
    "triton": _power_iteration_of(narrow("triton")),
    "cuda": _power_iteration_of(by_size("power")),
}


@custom_op("lipkernels::spectral_normalize", mutates_args=())
def spectral_normalize(
    weights: list[Tensor],
    us: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    max_iter: int,
    tol: float,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return FORWARD[backend](weights, us, scales, dtype, max_iter, tol)


@spectral_normalize.register_fake
def _(
    weights: list[Tensor],
    us: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    max_iter: int,
    tol: float,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    results = [weight.new_empty(weight.shape, dtype=dtype) for weight in weights]
    return results, [torch.empty_like(u) for u in us], fake_triplets(weights)


@custom_op("lipkernels::spectral_normalize_backward", mutates_args=())
def spectral_normalize_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    backend: str,
) -> list[Tensor]:
    return BACKWARD[backend](grads, weights, saved, scales)


@spectral_normalize_backward.register_fake
def _(
    grads: list[Tensor],
    weights: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    backend: str,
) -> list[Tensor]:
    return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]


def _setup_context(ctx, inputs, output):
    weights, _, ctx.scales, _, _, _, ctx.backend = inputs
    _, new_us, saved = output
    ctx.save_for_backward(*weights, *saved)
    ctx.mark_non_differentiable(*new_us, *saved)
    ctx.n_weights = len(weights)


def _backward(ctx, grads, _us_grads, _saved_grads):
    n = ctx.n_weights
    weights, saved = list(ctx.saved_tensors[:n]), list(ctx.saved_tensors[n:])
    gradients = spectral_normalize_backward(grads, weights, saved, ctx.scales, ctx.backend)
    return gradients, [None] * n, None, None, None, None, None


spectral_normalize.register_autograd(_backward, setup_context=_setup_context)


@custom_op("lipkernels::power_iteration", mutates_args=())
def power_iteration(
    weights: list[Tensor], us: list[Tensor], n_iter: int, backend: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return POWER_ITERATION[backend](weights, us, n_iter)


@power_iteration.register_fake
def _(
    weights: list[Tensor], us: list[Tensor], n_iter: int, backend: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    sigmas, lefts, rights = [], [], []
    for weight in weights:
        *batch, rows, cols = weight.shape
        kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
        sigmas.append(weight.new_empty(batch, dtype=kind))
        lefts.append(weight.new_empty((*batch, rows), dtype=kind))
        rights.append(weight.new_empty((*batch, cols), dtype=kind))
    return sigmas, lefts, rights
