"""``lipkernels::space_to_depth``, ``lipkernels::depth_to_space``: each is the other's gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import custom_op

from lipkernels.kernels.blocks import empty_deep, empty_wide
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


def _with_complex(
    move: Callable[..., Tensor], reference: Callable[..., Tensor], moves_any: bool
) -> Callable[..., Tensor]:
    """``move``; the reference for complex images, if ``moves_any`` only where they are scaled."""

    def call(x: Tensor, *arguments: Any) -> Tensor:
        *_, scale = arguments
        able = not x.is_complex() or (moves_any and scale == 1.0)
        return (move if able else reference)(x, *arguments)

    return call


def _implementations(name: str, reference: Callable[..., Tensor]) -> dict[str, Callable]:
    return {
        "reference": reference,
        "triton": _with_complex(from_triton("sampling", name), reference, moves_any=False),
        "cuda": _with_complex(from_cuda("sampling", name), reference, moves_any=True),
    }


SPACE_TO_DEPTH = _implementations("space_to_depth", _space_to_depth_reference)
DEPTH_TO_SPACE = _implementations("depth_to_space", _depth_to_space_reference)


@custom_op("lipkernels::space_to_depth", mutates_args=())
def space_to_depth(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float, backend: str
) -> Tensor:
    return SPACE_TO_DEPTH[backend](x, ph, pw, mode, channels_last, scale)


@space_to_depth.register_fake
def _(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float, backend: str
) -> Tensor:
    return empty_deep(x, ph, pw, channels_last)


@custom_op("lipkernels::depth_to_space", mutates_args=())
def depth_to_space(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float, backend: str
) -> Tensor:
    return DEPTH_TO_SPACE[backend](x, ph, pw, mode, channels_last, scale)


@depth_to_space.register_fake
def _(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float, backend: str
) -> Tensor:
    return empty_wide(x, ph, pw, channels_last)


def _setup_context(ctx, inputs, output):
    ctx.arguments = inputs[1:]


def _space_to_depth_backward(ctx, grad):
    return depth_to_space(grad, *ctx.arguments), *[None] * 6


def _depth_to_space_backward(ctx, grad):
    return space_to_depth(grad, *ctx.arguments), *[None] * 6


space_to_depth.register_autograd(_space_to_depth_backward, setup_context=_setup_context)
depth_to_space.register_autograd(_depth_to_space_backward, setup_context=_setup_context)
