"""``lipkernels::spectral_normalize``: scale * W / sigma_max(W); ``lipkernels::power_iteration``."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.cuda.split import by_size
from lipkernels.kernels.formats import Names, by_format, by_name, narrow
from lipkernels.kernels.lazy import from_cuda, from_triton
from lipkernels.kernels.precision import without_autocast
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


_narrow_forward = from_triton("spectral", "forward")
_narrow_backward = from_triton("spectral", "backward")


def _saved_of(saved: list[Tensor], i: int) -> list[Tensor]:
    return saved[SAVED_PER_WEIGHT * i : SAVED_PER_WEIGHT * (i + 1)]


def _forward_triton(
    weights: list[Tensor],
    us: list[Tensor],
    scales: list[float],
    dtype: torch.dtype,
    max_iter: int,
    tol: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    def parts(
        members: list[int], out: tuple[list[Tensor], ...]
    ) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
        results, new_us, saved = out
        return [(results[k], new_us[k], _saved_of(saved, k)) for k in range(len(members))]

    def chosen(members: list[int]) -> tuple[list[Tensor], list[Tensor], list[float]]:
        return (
            [weights[i] for i in members],
            [us[i] for i in members],
            [scales[i] for i in members],
        )

    found = by_format(
        weights,
        lambda members: parts(members, _forward_reference(*chosen(members), dtype, max_iter, tol)),
        lambda members: parts(members, _narrow_forward(*chosen(members), dtype)),
    )
    results, new_us, saved = (list(part) for part in zip(*found, strict=True))
    return results, new_us, [tensor for triplet in saved for tensor in triplet]


def _backward_triton(
    grads: list[Tensor], weights: list[Tensor], saved: list[Tensor], scales: list[float]
) -> list[Tensor]:
    def run(backward: Callable[..., list[Tensor]]) -> Callable[[list[int]], list[Tensor]]:
        return lambda members: backward(
            [grads[i] for i in members],
            [weights[i] for i in members],
            [tensor for i in members for tensor in _saved_of(saved, i)],
            [scales[i] for i in members],
        )

    return by_format(weights, run(_backward_reference), run(_narrow_backward))


PowerIteration = Callable[
    [list[Tensor], list[Tensor], int], tuple[list[Tensor], list[Tensor], list[Tensor]]
]
_POWER_ITERATIONS: dict[str, PowerIteration] = {
    "reference": _power_iteration_reference,
    "triton": from_triton("power", "power_iteration"),
    "cuda": from_cuda("power", "power_iteration"),
}


def _power_iteration_of(names: Names) -> PowerIteration:
    """Each weight by the implementation that ``names`` names."""

    def power_iteration(
        weights: list[Tensor], us: list[Tensor], n_iter: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        def run(one: PowerIteration) -> Callable[[list[int]], list[tuple[Tensor, ...]]]:
            def of(members: list[int]) -> list[tuple[Tensor, ...]]:
                parts = one([weights[i] for i in members], [us[i] for i in members], n_iter)
                return list(zip(*parts, strict=True))

            return of

        runs = {name: run(one) for name, one in _POWER_ITERATIONS.items()}
        found = by_name(names(weights), runs)
        sigmas, lefts, rights = (list(part) for part in zip(*found, strict=True))
        return sigmas, lefts, rights

    return power_iteration


FORWARD = {"reference": _forward_reference, "triton": _forward_triton}
BACKWARD = {"reference": _backward_reference, "triton": _backward_triton}
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
