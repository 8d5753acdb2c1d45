"""Average pooling, and L2-norm pooling: y_o = sqrt(sum over the window o of x_i^2).

The average pool is linear, and its gradient its transpose. That of the norm, d sqrt(s) =
ds / (2 sqrt(s)), is infinite at s = 0. With the guard eps of deel.lip.layers,

    dL/ds_o = Gamma_o / (2 (sqrt(s_o) + eps)),
    dL/dx_i = x_i  sum over the windows o that hold i of  Gamma_o / (y_o + eps)

so the gradient at an all-zero window is zero, and the forward pass is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format


def sum_pool2d(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> Tensor:
    """Sum over each window; the part of a window outside the image counts as zero."""
    return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, divisor_override=1)


def mean_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> Tensor:
    """:func:`sum_pool2d` over the size of a whole window, at the border too."""
    window = (list(kernel), list(stride), list(padding))
    return F.avg_pool2d(x, *window, ceil_mode, divisor_override=math.prod(kernel))


def scaled_avg_pool2d(
    x: Tensor,
    kernel: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    scale: float,
) -> Tensor:
    """``scale`` times :func:`mean_pool2d`; ``kernel`` None: the mean over the whole image."""
    if kernel is None:
        return x.mean(dim=(-2, -1), keepdim=True) * scale
    # Scaled after the mean: a half-precision sum could overflow.
    return mean_pool2d(x, kernel, stride, padding, ceil_mode) * scale


def scaled_avg_pool2d_vjp(
    grad: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    scale: float,
) -> Tensor:
    """dL/dx for x of ``shape``: each pixel gets scale / (kh kw) of the sum over its windows."""
    window = (list(kernel), list(stride), list(padding))
    x = grad.new_empty(shape)  # gives its shape alone
    return torch.ops.aten.avg_pool2d_backward(
        grad * scale, x, *window, ceil_mode, True, math.prod(kernel)
    )


def memory_format(x: Tensor) -> torch.memory_format:
    """Of a pool's result: channels last where the image has its channels last in memory."""
    if x.dim() == 4 and not x.is_contiguous():
        return suggest_memory_format(torch.empty_like(x, device="meta"))
    return torch.contiguous_format


def l2_norm_pool2d(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> Tensor:
    """(N, C, H, W) or (C, H, W) -> the norm of each window."""
    # The square of a half-precision 300 overflows: the sum runs in float32.
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return sum_pool2d(wide.square(), kernel, stride, padding, ceil_mode).sqrt().to(x.dtype)


def l2_norm_pool2d_vjp(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    eps: float,
) -> Tensor:
    """dL/dx. Written in differentiable operations, so that it can be differentiated again."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    weight = grad.to(wide.dtype) / (y.to(wide.dtype) + eps)
    # The VJP of the sum pool, which is linear: x gives only its shape.
    spread = torch.ops.aten.avg_pool2d_backward(
        weight, wide, kernel, stride, padding, ceil_mode, True, 1
    )
    return (wide * spread).to(x.dtype)
