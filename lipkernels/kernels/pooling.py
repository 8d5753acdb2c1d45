"""``lipkernels::l2_norm_pool2d``; a gradient to be differentiated again is written in torch ops."""

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.lazy import from_triton
from lipkernels.reference import pooling as reference


def _backward_reference(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    eps: float,
) -> Tensor:
    gradient = reference.l2_norm_pool2d_vjp(grad, x, y, kernel, stride, padding, ceil_mode, eps)
    return gradient.contiguous(memory_format=reference.memory_format(x))


FORWARD = {
    "reference": reference.l2_norm_pool2d,
    "triton": from_triton("pooling", "l2_norm_pool2d"),
}
BACKWARD = {
    "reference": _backward_reference,
    "triton": from_triton("pooling", "l2_norm_pool2d_backward"),
}


@custom_op("lipkernels::l2_norm_pool2d", mutates_args=())
def l2_norm_pool2d(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    eps: float,
    backend: str,
) -> Tensor:
    return FORWARD[backend](x, kernel, stride, padding, ceil_mode)


@l2_norm_pool2d.register_fake
def _(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    eps: float,
    backend: str,
) -> Tensor:
    return reference.l2_norm_pool2d(x, kernel, stride, padding, ceil_mode)


@custom_op("lipkernels::l2_norm_pool2d_backward", mutates_args=())
def l2_norm_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    eps: float,
    backend: str,
) -> Tensor:
    return BACKWARD[backend](grad, x, y, kernel, stride, padding, ceil_mode, eps)


@l2_norm_pool2d_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    eps: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(x, memory_format=reference.memory_format(x))


def _setup_context(ctx, inputs, output):
    x, *ctx.arguments, ctx.backend = inputs
    ctx.save_for_backward(x, output)


def _backward(ctx, grad):
    x, y = ctx.saved_tensors
    if ctx.backend == "reference" or torch.is_grad_enabled():
        gradient = reference.l2_norm_pool2d_vjp(grad, x, y, *ctx.arguments)
    else:
        gradient = l2_norm_pool2d_backward(grad, x, y, *ctx.arguments, ctx.backend)
    return gradient, *[None] * 6


l2_norm_pool2d.register_autograd(_backward, setup_context=_setup_context)
