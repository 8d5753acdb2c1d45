"""``lipkernels::frobenius_normalize``: scale * W / |W|_F, whole matrices or row by row."""

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.lazy import from_triton
from lipkernels.kernels.precision import without_autocast
from lipkernels.kernels.shared import narrow, shared
from lipkernels.reference import frobenius as reference
from lipkernels.reference.rounding import scale_and_round_frobenius
from lipkernels.reference.scaling import saturated


@without_autocast
def _forward_reference(
    weights: list[Tensor], scales: list[float], dtype: torch.dtype, per_row: bool
) -> list[Tensor]:
    return [
        scale_and_round_frobenius(
            reference.frobenius_normalize(weight, per_row), scale, dtype
        ).contiguous()
        for weight, scale in zip(weights, scales, strict=True)
    ]


@without_autocast
def _backward_reference(
    grads: list[Tensor], weights: list[Tensor], scales: list[float], per_row: bool
) -> list[Tensor]:
    out = []
    for grad, weight, scale in zip(grads, weights, scales, strict=True):
        wide = grad.to(torch.promote_types(weight.dtype, torch.float32)) * scale
        gradient = reference.frobenius_normalize_vjp(wide, weight, per_row)
        out.append(saturated(gradient, weight.dtype).contiguous())
    return out


_FORWARDS = {"reference": _forward_reference, "triton": from_triton("frobenius", "forward")}
_BACKWARDS = {"reference": _backward_reference, "triton": from_triton("frobenius", "backward")}
FORWARD = {
    "reference": _forward_reference,
    "triton": shared(narrow("triton"), _FORWARDS, takes=(1, 1), gives=1),
}
BACKWARD = {
    "reference": _backward_reference,
    "triton": shared(narrow("triton"), _BACKWARDS, takes=(1, 1, 1), gives=1, weights=1),
}


@custom_op("lipkernels::frobenius_normalize", mutates_args=())
def frobenius_normalize(
    weights: list[Tensor], scales: list[float], dtype: torch.dtype, per_row: bool, backend: str
) -> list[Tensor]:
    return FORWARD[backend](weights, scales, dtype, per_row)


@frobenius_normalize.register_fake
def _(
    weights: list[Tensor], scales: list[float], dtype: torch.dtype, per_row: bool, backend: str
) -> list[Tensor]:
    return [weight.new_empty(weight.shape, dtype=dtype) for weight in weights]


@custom_op("lipkernels::frobenius_normalize_backward", mutates_args=())
def frobenius_normalize_backward(
    grads: list[Tensor], weights: list[Tensor], scales: list[float], per_row: bool, backend: str
) -> list[Tensor]:
    return BACKWARD[backend](grads, weights, scales, per_row)


@frobenius_normalize_backward.register_fake
def _(
    grads: list[Tensor], weights: list[Tensor], scales: list[float], per_row: bool, backend: str
) -> list[Tensor]:
    return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]


def _setup_context(ctx, inputs, output):
    weights, ctx.scales, _, ctx.per_row, ctx.backend = inputs
    ctx.save_for_backward(*weights)


def _backward(ctx, grads):
    weights = list(ctx.saved_tensors)
    gradients = frobenius_normalize_backward(grads, weights, ctx.scales, ctx.per_row, ctx.backend)
    return gradients, None, None, None, None


frobenius_normalize.register_autograd(_backward, setup_context=_setup_context)
