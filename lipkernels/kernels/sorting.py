"""``lipkernels::group_sort`` and the permutation it saves, forward and transposed.

gather and scatter are each other's gradient: the sort can be differentiated any number of times,
as a gradient penalty needs. The permutation is an index within the group for each element, in the
smallest format that holds it; Triton and the CUDA library keep one bit for each pair.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lipkernels import backends
from lipkernels.kernels.cpu import sorting as cpu
from lipkernels.kernels.eager import is_plain_eager
from lipkernels.kernels.lazy import from_cuda, from_triton
from lipkernels.reference import sorting as reference

_TRITON = {
    name: from_triton("sorting", name) for name in ("group_sort", "gather_groups", "scatter_groups")
}


def _cuda(name: str) -> Callable[..., Any]:
    """Pairs by the CUDA library; other groups by Triton where that can run, or the reference."""
    pairs, others = from_cuda("sorting", name), getattr(reference, name)

    def call(x: Tensor, *arguments: Any) -> Any:
        *_, group_size, _ = arguments
        if group_size == 2:
            return pairs(x, *arguments)
        able = backends.why_not("triton", x.device) is None
        return (_TRITON[name] if able else others)(x, *arguments)

    return call


FORWARD = {
    "reference": reference.group_sort,
    "cpu": cpu.group_sort,
    "triton": _TRITON["group_sort"],
    "cuda": _cuda("group_sort"),
}
GATHER = {
    "reference": reference.gather_groups,
    "cpu": cpu.gather_groups,
    "triton": _TRITON["gather_groups"],
    "cuda": _cuda("gather_groups"),
}
SCATTER = {
    "reference": reference.scatter_groups,
    "cpu": cpu.scatter_groups,
    "triton": _TRITON["scatter_groups"],
    "cuda": _cuda("scatter_groups"),
}


@custom_op("lipkernels::group_sort", mutates_args=())
def group_sort_op(x: Tensor, group_size: int, dim: int, backend: str) -> tuple[Tensor, Tensor]:
    values, index = FORWARD[backend](x, group_size, dim)
    return values, index


@group_sort_op.register_fake
def _(x: Tensor, group_size: int, dim: int, backend: str) -> tuple[Tensor, Tensor]:
    if backend in ("triton", "cuda") and group_size == 2:  # one bit for each pair
        return x.new_empty(x.shape), x.new_empty(((x.numel() + 15) // 16,), dtype=torch.uint8)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=reference.index_dtype(group_size))


@custom_op("lipkernels::gather_groups", mutates_args=())
def gather_groups(x: Tensor, index: Tensor, group_size: int, dim: int, backend: str) -> Tensor:
    return GATHER[backend](x, index, group_size, dim)


@gather_groups.register_fake
def _(x: Tensor, index: Tensor, group_size: int, dim: int, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("lipkernels::scatter_groups", mutates_args=())
def scatter_groups(grad: Tensor, index: Tensor, group_size: int, dim: int, backend: str) -> Tensor:
    return SCATTER[backend](grad, index, group_size, dim)


@scatter_groups.register_fake
def _(grad: Tensor, index: Tensor, group_size: int, dim: int, backend: str) -> Tensor:
    return grad.new_empty(grad.shape)


def _setup_sort(ctx, inputs, output):
    _, *ctx.arguments = inputs
    _, index = output
    ctx.save_for_backward(index)
    ctx.mark_non_differentiable(index)


def _sort_backward(ctx, grad, _index_grad):
    (index,) = ctx.saved_tensors
    return scatter_groups(grad, index, *ctx.arguments), None, None, None


def _setup_permutation(ctx, inputs, output):
    _, index, *ctx.arguments = inputs
    ctx.save_for_backward(index)


def _gather_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return scatter_groups(grad, index, *ctx.arguments), None, None, None, None


def _scatter_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return gather_groups(grad, index, *ctx.arguments), None, None, None, None


group_sort_op.register_autograd(_sort_backward, setup_context=_setup_sort)
gather_groups.register_autograd(_gather_backward, setup_context=_setup_permutation)
scatter_groups.register_autograd(_scatter_backward, setup_context=_setup_permutation)


class _GroupSort(torch.autograd.Function):
    """The op without its dispatch: see `lipkernels.kernels.eager`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_size: int, dim: int, backend: str) -> Tensor:
        values, index = FORWARD[backend](x, group_size, dim)
        ctx.save_for_backward(index)
        ctx.arguments = group_size, dim, backend
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (index,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated
            return scatter_groups(grad, index, *ctx.arguments), None, None, None
        group_size, dim, backend = ctx.arguments
        return SCATTER[backend](grad, index, group_size, dim), None, None, None


def group_sort(x: Tensor, group_size: int, dim: int, backend: str) -> Tensor:
    """The sorted values, by the op where something traces, directly where nothing does."""
    if is_plain_eager((x,)):
        return _GroupSort.apply(x, group_size, dim, backend)  # pyright: ignore[reportReturnType]
    return group_sort_op(x, group_size, dim, backend)[0]
