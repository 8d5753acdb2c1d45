"""``lipkernels::l2_norm_pool2d``; its backward is written in ops that differentiate again."""

from torch import Tensor
from torch.library import custom_op

from lipkernels.reference import pooling as reference

FORWARD = {"reference": reference.l2_norm_pool2d}


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


def _setup_context(ctx, inputs, output):
    x, *ctx.arguments, ctx.eps, _ = inputs
    ctx.save_for_backward(x, output)


def _backward(ctx, grad):
    x, y = ctx.saved_tensors
    kernel, stride, padding, ceil_mode = ctx.arguments
    gradient = reference.l2_norm_pool2d_vjp(grad, x, y, kernel, stride, padding, ceil_mode, ctx.eps)
    return gradient, *[None] * 6


l2_norm_pool2d.register_autograd(_backward, setup_context=_setup_context)
