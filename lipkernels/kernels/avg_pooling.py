"""``lipkernels::scaled_avg_pool2d`` and its gradient: linear maps, each the other's derivative."""

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.lazy import from_triton
from lipkernels.reference import pooling as reference


def _forward_reference(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    scale: float,
) -> Tensor:
    y = reference.scaled_avg_pool2d(x, kernel, stride, padding, ceil_mode, scale)
    return y.contiguous(memory_format=reference.memory_format(x))


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _backward_reference(
    grad: Tensor,
    shape: list[int],
    channels_last: bool,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    scale: float,
) -> Tensor:
    gradient = reference.scaled_avg_pool2d_vjp(
        grad, shape, kernel, stride, padding, ceil_mode, scale
    )
    return gradient.contiguous(memory_format=_format(channels_last))


FORWARD = {
    "reference": _forward_reference,
    "triton": from_triton("pooling", "scaled_avg_pool2d"),
}
BACKWARD = {
    "reference": _backward_reference,
    "triton": from_triton("pooling", "scaled_avg_pool2d_backward"),
}


@custom_op("lipkernels::scaled_avg_pool2d", mutates_args=())
def scaled_avg_pool2d(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    scale: float,
    backend: str,
) -> Tensor:
    return FORWARD[backend](x, kernel, stride, padding, ceil_mode, scale)


@scaled_avg_pool2d.register_fake
def _(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    scale: float,
    backend: str,
) -> Tensor:
    return _forward_reference(x, kernel, stride, padding, ceil_mode, scale)


@custom_op("lipkernels::scaled_avg_pool2d_backward", mutates_args=())
def scaled_avg_pool2d_backward(
    grad: Tensor,
    shape: list[int],
    channels_last: bool,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    scale: float,
    backend: str,
) -> Tensor:
    return BACKWARD[backend](grad, shape, channels_last, kernel, stride, padding, ceil_mode, scale)


@scaled_avg_pool2d_backward.register_fake
def _(
    grad: Tensor,
    shape: list[int],
    channels_last: bool,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    scale: float,
    backend: str,
) -> Tensor:
    return torch.empty(
        shape, dtype=grad.dtype, device=grad.device, memory_format=_format(channels_last)
    )


def _setup_context(ctx, inputs, output):
    x, *ctx.arguments = inputs
    ctx.shape = x.shape
    ctx.channels_last = reference.memory_format(x) == torch.channels_last


def _backward(ctx, grad):
    gradient = scaled_avg_pool2d_backward(grad, ctx.shape, ctx.channels_last, *ctx.arguments)
    return gradient, *[None] * 6


def _setup_context_of_backward(ctx, inputs, output):
    _, _, _, *ctx.arguments = inputs


def _backward_of_backward(ctx, grad):
    return scaled_avg_pool2d(grad, *ctx.arguments), *[None] * 8


scaled_avg_pool2d.register_autograd(_backward, setup_context=_setup_context)
scaled_avg_pool2d_backward.register_autograd(
    _backward_of_backward, setup_context=_setup_context_of_backward
)
