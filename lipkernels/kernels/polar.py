"""``lipkernels::polar_factor``: scale * U for each W = P U, rounded to a dtype within the norm."""

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.precision import without_autocast
from lipkernels.reference.polar import polar_factor as reference_forward
from lipkernels.reference.polar import polar_factor_vjp as reference_vjp
from lipkernels.reference.rounding import scale_and_round
from lipkernels.reference.scaling import compute_dtype, saturated

_SAVED_PER_WEIGHT = 3  # eigenvectors, singular values, power-of-two scale


@without_autocast
def _forward_reference(
    weights: list[Tensor], scales: list[float], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    results, saved = [], []
    for weight, scale in zip(weights, scales, strict=True):
        u, vectors, p, unit = reference_forward(weight)
        results.append(scale_and_round(u, scale, dtype).contiguous())
        saved += [vectors.contiguous(), p, unit]
    return results, saved


@without_autocast
def _backward_reference(
    grads: list[Tensor],
    weights: list[Tensor],
    results: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
) -> list[Tensor]:
    out = []
    for i, (grad, weight, result, scale) in enumerate(
        zip(grads, weights, results, scales, strict=True)
    ):
        vectors, p, unit = saved[_SAVED_PER_WEIGHT * i : _SAVED_PER_WEIGHT * (i + 1)]
        # A result in full precision is the polar factor itself; a rounded one is not accurate
        # enough to differentiate with, and keeping a second copy would cost memory.
        if result.dtype == vectors.dtype:
            u = result / scale
        else:
            u, _, _, _ = reference_forward(weight)
        gradient = reference_vjp(grad.to(u.dtype) * scale, u, vectors, p, unit)
        out.append(saturated(gradient, weight.dtype).contiguous())
    return out


FORWARD = {"reference": _forward_reference}
BACKWARD = {"reference": _backward_reference}


@custom_op("lipkernels::polar_factor", mutates_args=())
def polar_factor(
    weights: list[Tensor], scales: list[float], dtype: torch.dtype, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    return FORWARD[backend](weights, scales, dtype)


@polar_factor.register_fake
def _(
    weights: list[Tensor], scales: list[float], dtype: torch.dtype, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    results, saved = [], []
    for weight in weights:
        batch, m = weight.shape[:-2], min(weight.shape[-2:])
        kind = compute_dtype(weight.dtype)
        results.append(weight.new_empty(weight.shape, dtype=dtype))
        saved += [
            weight.new_empty((*batch, m, m), dtype=kind),
            weight.new_empty((*batch, m), dtype=kind),
            weight.new_empty((*batch, 1, 1), dtype=kind),
        ]
    return results, saved


@custom_op("lipkernels::polar_factor_backward", mutates_args=())
def polar_factor_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    results: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    backend: str,
) -> list[Tensor]:
    return BACKWARD[backend](grads, weights, results, saved, scales)


@polar_factor_backward.register_fake
def _(
    grads: list[Tensor],
    weights: list[Tensor],
    results: list[Tensor],
    saved: list[Tensor],
    scales: list[float],
    backend: str,
) -> list[Tensor]:
    return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]


def _setup_context(ctx, inputs, output):
    weights, ctx.scales, _, ctx.backend = inputs
    results, saved = output
    ctx.save_for_backward(*weights, *results, *saved)
    ctx.mark_non_differentiable(*saved)
    ctx.n_weights = len(weights)


def _backward(ctx, grads, _saved_grads):
    n = ctx.n_weights
    tensors = list(ctx.saved_tensors)
    weights, results, saved = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
    gradients = polar_factor_backward(grads, weights, results, saved, ctx.scales, ctx.backend)
    return gradients, None, None, None


polar_factor.register_autograd(_backward, setup_context=_setup_context)
