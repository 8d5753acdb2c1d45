"""``lipkernels::space_to_depth``, ``lipkernels::depth_to_space``: each is the other's gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.lazy import from_cuda, from_triton
from lipkernels.reference import sampling as reference


def _space_to_depth_reference(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float
) -> Tensor:
    out = reference.space_to_depth(x, ph, pw, mode, channels_last)
    return _owned(out if scale == 1.0 else out * scale, x)


def _depth_to_space_reference(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float
) -> Tensor:
    out = reference.depth_to_space(x, ph, pw, mode, channels_last)
    return _owned(out if scale == 1.0 else out * scale, x)


def _owned(out: Tensor, x: Tensor) -> Tensor:
    """A custom op may not return its input's memory, which a 1 x 1 block does."""
    return out.clone() if out.data_ptr() == x.data_ptr() else out


_move_to_depth = from_triton("sampling", "space_to_depth")
_move_to_space = from_triton("sampling", "depth_to_space")


def _space_to_depth_triton(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float
) -> Tensor:
    move = _space_to_depth_reference if x.is_complex() else _move_to_depth
    return move(x, ph, pw, mode, channels_last, scale)


def _depth_to_space_triton(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float
) -> Tensor:
    move = _depth_to_space_reference if x.is_complex() else _move_to_space
    return move(x, ph, pw, mode, channels_last, scale)


def _scalable(
    move: Callable[..., Tensor], reference: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """``move``, which moves any format but multiplies real numbers alone."""

    def call(x: Tensor, *arguments: Any) -> Tensor:
        *_, scale = arguments
        return (reference if x.is_complex() and scale != 1.0 else move)(x, *arguments)

    return call


SPACE_TO_DEPTH = {
    "reference": _space_to_depth_reference,
    "triton": _space_to_depth_triton,
    "cuda": _scalable(from_cuda("sampling", "space_to_depth"), _space_to_depth_reference),
}
DEPTH_TO_SPACE = {
    "reference": _depth_to_space_reference,
    "triton": _depth_to_space_triton,
    "cuda": _scalable(from_cuda("sampling", "depth_to_space"), _depth_to_space_reference),
}


@custom_op("lipkernels::space_to_depth", mutates_args=())
def space_to_depth(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float, backend: str
) -> Tensor:
    return SPACE_TO_DEPTH[backend](x, ph, pw, mode, channels_last, scale)


@space_to_depth.register_fake
def _(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float, backend: str
) -> Tensor:
    if channels_last:
        n, h, w, c = x.shape
        return x.new_empty((n, h // ph, w // pw, c * ph * pw))
    n, c, h, w = x.shape
    return x.new_empty((n, c * ph * pw, h // ph, w // pw))


@custom_op("lipkernels::depth_to_space", mutates_args=())
def depth_to_space(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float, backend: str
) -> Tensor:
    return DEPTH_TO_SPACE[backend](x, ph, pw, mode, channels_last, scale)


@depth_to_space.register_fake
def _(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float, backend: str
) -> Tensor:
    if channels_last:
        n, h, w, c = x.shape
        return x.new_empty((n, h * ph, w * pw, c // (ph * pw)))
    n, c, h, w = x.shape
    return x.new_empty((n, c // (ph * pw), h * ph, w * pw))


def _setup_context(ctx, inputs, output):
    ctx.arguments = inputs[1:]


def _space_to_depth_backward(ctx, grad):
    return depth_to_space(grad, *ctx.arguments), *[None] * 6


def _depth_to_space_backward(ctx, grad):
    return space_to_depth(grad, *ctx.arguments), *[None] * 6


space_to_depth.register_autograd(_space_to_depth_backward, setup_context=_setup_context)
depth_to_space.register_autograd(_depth_to_space_backward, setup_context=_setup_context)
