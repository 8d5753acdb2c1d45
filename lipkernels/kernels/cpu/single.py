"""The polar factor of one float32 matrix by itself, with little Python: a small layer's own call.

The same results as `lipkernels.kernels.cpu.polar`, bit by bit. What it saves for backward is one
tensor: the factor, the spectrum and the scalars of `lipkernels.kernels.polar` in a row.
"""

from __future__ import annotations

import array
from typing import Any

import torch
from torch import Tensor

from lipkernels.kernels.cpu.library import DONE, checked, library, n_threads
from lipkernels.kernels.cpu.polar import finish_the_others
from lipkernels.reference.rounding import worst_case_factor

_SCALARS = 2


def is_single(weights: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether these weights of the CPU are one matrix that the library takes as it lies."""
    if len(weights) != 1 or dtype != torch.float32:
        return False
    (w,) = weights
    return w.dtype == torch.float32 and w.dim() == 2 and w.is_contiguous()


class SinglePolarFactor(torch.autograd.Function):
    """``(weight, scale) -> scale * U`` for a weight that :func:`is_single`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: float) -> Tensor:
        rows, cols = weight.shape
        m = rows if rows < cols else cols
        margin = worst_case_factor(weight, scale, torch.float32)
        result = torch.empty_like(weight)
        saved = weight.new_empty(m * m + m + _SCALARS)
        status = library().lk_polar_forward_one(
            weight.data_ptr(),
            result.data_ptr(),
            saved.data_ptr(),
            rows,
            cols,
            scale,
            margin,
            n_threads(),
        )
        if status != DONE:
            checked(int(status < 0))
            parts = [saved[: m * m].view(m, m), saved[m * m : -_SCALARS], saved[-_SCALARS:]]
            codes = array.array("i", [status])
            finish_the_others([weight], codes, [result], parts, [(scale, margin)])
        ctx.save_for_backward(weight, result, saved)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # somebody may differentiate this: refused, and slower
            # With the weight among the arguments: the gradient depends on it, whatever comes in.
            return _backward_once(ctx, *grad_outputs, ctx.saved_tensors[0]), None
        return _gradient(ctx, *grad_outputs), None


def _gradient(ctx: Any, *arguments: Any) -> Tensor:
    """Of :class:`SinglePolarFactor`; ``arguments``: the incoming one, what else comes after it."""
    grad = arguments[0]
    _, result, saved = ctx.saved_tensors
    if grad.dtype != torch.float32 or grad.is_neg() or not grad.is_contiguous():
        grad = grad.float().resolve_neg().contiguous()
    out = torch.empty_like(grad)
    checked(
        library().lk_polar_backward_one(
            grad.data_ptr(),
            result.data_ptr(),
            saved.data_ptr(),
            out.data_ptr(),
            *grad.shape,
            ctx.scale,
            n_threads(),
        )
    )
    return out


_backward_once = torch.autograd.function.once_differentiable(_gradient)
