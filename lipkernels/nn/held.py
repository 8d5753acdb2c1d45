"""Held weights in autograd: used as they are, differentiated as if they were constrained.

What constraining a weight would do to its gradient, at a weight that satisfies the constraint, is
to project it on the constraint's tangent space: ``constraint.tangent``. See Note [Held weights] in
`lipkernels.nn.constrained`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lipkernels.constraints import PolarFactor
from lipkernels.functional.fingerprint import is_plain_eager
from lipkernels.reference import retract as reference
from lipkernels.reference.scaling import for_products

if TYPE_CHECKING:
    from lipkernels.nn.constrained import ConstrainedWeight


def _tangent(layer: ConstrainedWeight, grad: Tensor, raw: Tensor, scale: float) -> Tensor:
    """``grad`` of a weight, along the constraint at ``raw``."""
    matrix = layer.matrix(raw.detach())
    us = layer.start_vectors(matrix)
    return layer.constraint.tangent(layer.matrix(grad), matrix, scale, us).reshape(raw.shape)


class _HeldWeight(torch.autograd.Function):
    """The raw weight itself, with its gradient projected."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, layer: ConstrainedWeight) -> Tensor:
        ctx.layer, ctx.scale = layer, layer.matrix_scale()
        ctx.save_for_backward(raw)
        return raw.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (raw,), (grad,) = ctx.saved_tensors, grad_outputs
        return _tangent(ctx.layer, grad, raw, ctx.scale), None


class _HeldLinear(torch.autograd.Function):
    """x W^T + b with a held W, whose gradient is projected where it arises.

    It is delta^T x, delta the gradient of the output. Of what its projection needs products with W
    for, x W^T and delta W, the layer computes anyway: for all but large batches that is cheaper
    than to project a matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, raw: Tensor, bias: Tensor | None, layer: ConstrainedWeight
    ) -> Tensor:
        ctx.layer, ctx.scale = layer, layer.matrix_scale()
        if not reference.is_cheaper_as_product(x.numel() // max(x.shape[-1], 1), *raw.shape):
            ctx.save_for_backward(x, raw, bias, None)
            return nn.functional.linear(x, raw, bias)
        # Without the bias: where that is large it would cost the projection digits.
        z = x @ raw.T
        ctx.save_for_backward(x, raw, bias, z)
        return z.clone() if bias is None else z + bias

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, raw, _bias, z), (delta,) = ctx.saved_tensors, grad_outputs
        if torch.is_grad_enabled():  # the gradients will be differentiated
            return *_differentiable_backward(ctx, delta), None
        for_x, for_raw, for_bias, _ = ctx.needs_input_grad
        d_x = delta @ raw if for_x else None
        delta, x, z = _flat(delta), _flat(x), None if z is None else _flat(z)
        d_bias = delta.sum(0) if for_bias else None
        d_raw = None
        if for_raw:
            moved = None if d_x is None else _flat(d_x)
            d_raw = reference.project_product(delta, x, z, moved, raw, ctx.scale)
        return d_x, d_raw, d_bias, None


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _differentiable_backward(ctx: Any, delta: Tensor) -> list[Tensor | None]:
    """The gradients of :class:`_HeldLinear` as functions of everything they depend on."""
    x, raw, bias, _ = ctx.saved_tensors
    inputs = (x, raw, bias)
    y = nn.functional.linear(x, _HeldWeight.apply(raw, ctx.layer), bias)  # pyright: ignore[reportArgumentType]
    wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
    found = torch.autograd.grad(y, [inputs[i] for i in wanted], delta, create_graph=True)
    gradients: list[Tensor | None] = [None] * 3
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def held_weight(layer: ConstrainedWeight) -> Tensor:
    """The weight of ``layer``, which is held."""
    raw = layer.raw_weight
    needs_grad = raw.requires_grad and torch.is_grad_enabled()
    return _HeldWeight.apply(raw, layer) if needs_grad else raw.detach()  # pyright: ignore[reportReturnType]


# Scales whose square costs float32 no digits; others are prepared by functional.project_tangent.
_SCALES = (2.0**-8, 2.0**8)


def _is_projected_here(layer: ConstrainedWeight, x: Tensor, bias: Tensor | None) -> bool:
    raw = layer.raw_weight
    return (
        torch.is_grad_enabled()
        and raw.requires_grad
        and isinstance(layer.constraint, PolarFactor)
        and raw.dtype in (torch.float32, torch.float64)
        and x.dtype == raw.dtype
        and x.layout == torch.strided
        and _SCALES[0] <= layer.matrix_scale() <= _SCALES[1]
        and for_products(raw) is raw
        and is_plain_eager((x,) if bias is None else (x, bias))
        and forward_ad._current_level < 0  # no derivatives in forward mode
    )


def held_linear(layer: ConstrainedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for a linear ``layer`` whose weight is held."""
    if _is_projected_here(layer, x, bias):
        return _HeldLinear.apply(x, layer.raw_weight, bias, layer)  # pyright: ignore[reportReturnType]
    return nn.functional.linear(x, held_weight(layer), bias)
