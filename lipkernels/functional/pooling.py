"""Average and L2-norm pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipkernels import backends
from lipkernels.functional.sampling import checked_pair
from lipkernels.kernels import avg_pooling as _avg_pooling
from lipkernels.kernels import pooling as _pooling
from lipkernels.reference import pooling as _reference

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _checked_padding(padding: int | Sequence[int], kernel: Sequence[int]) -> list[int]:
    pair = list(padding) if isinstance(padding, Sequence) else [padding, padding]
    if len(pair) != 2 or not all(
        isinstance(p, int) and 0 <= 2 * p <= k for p, k in zip(pair, kernel, strict=True)
    ):
        raise ValueError(
            f"padding: expected an integer, or a pair, from 0 to half of kernel_size"
            f" {tuple(kernel)}, got {padding!r}"
        )
    return pair


def _check_image(
    x: Tensor, kernel: Sequence[int], step: Sequence[int], pad: Sequence[int], ceil_mode: bool
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(x).__name__}")
    if x.dim() not in (3, 4):
        raise ValueError(f"input: expected 3 or 4 dimensions, got {tuple(x.shape)}")
    if x.shape[-3] < 1:
        raise ValueError(f"input: expected at least one channel, got shape {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"input: expected a floating-point dtype, got {x.dtype}")
    for size, k, s, p in zip(x.shape[-2:], kernel, step, pad, strict=True):
        # With ceil_mode a window may reach over the border by less than a step.
        if size < 1 or size + 2 * p <= (k - s if ceil_mode else k - 1):
            raise ValueError(
                f"input: expected an image that a window of {tuple(kernel)} with padding"
                f" {tuple(pad)} fits in, got {tuple(x.shape[-2:])}"
            )


def _checked_scale(scale: float) -> float:
    if isinstance(scale, torch.SymFloat):  # of torch.export, which has no value yet
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number, got {scale!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive finite number, got {scale!r}")
    return float(scale)


def avg_pool_of_checked(
    x: Tensor,
    kernel: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """:func:`scaled_avg_pool2d` of arguments that somebody has checked, all windows pairs."""
    name = backends.resolve("scaled_avg_pool2d", _avg_pooling.FORWARD, x.device, backend)
    if name == "reference":
        # torch's own operations: what it can do with them, an op of ours would take away.
        return _reference.scaled_avg_pool2d(x, kernel, stride, padding, ceil_mode, scale)
    if kernel is None:
        kernel = stride = x.shape[-2:]
    window = (list(kernel), list(stride), list(padding))
    return _avg_pooling.scaled_avg_pool2d(x, *window, ceil_mode, scale, name)


def scaled_avg_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int] | None,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""``scale`` times the mean of each window: y_o = scale / (kh kw) sum_{i in o} x_i.

    (N, C, H, W) or (C, H, W). What of a window lies outside the image counts as zeros, with
    ``padding`` and with ``ceil_mode``. ``kernel_size`` None: the whole image is the one window.
    1-Lipschitz for scale sqrt(kh kw) where windows do not overlap.

    >>> scaled_avg_pool2d(torch.ones(1, 1, 2, 2), 2, scale=3.0)
    tensor([[[[3.]]]])
    """
    factor = _checked_scale(scale)
    if kernel_size is None:
        if stride is not None or padding not in (0, (0, 0), [0, 0]) or ceil_mode:
            raise ValueError(
                "kernel_size: expected an integer or a pair of them with a stride, padding or"
                " ceil_mode, got None (the whole image)"
            )
        _check_image(x, (1, 1), (1, 1), (0, 0), False)
        return avg_pool_of_checked(x, None, (1, 1), (0, 0), False, factor, backend)
    kernel = list(checked_pair(kernel_size))
    step = kernel if stride is None else list(checked_pair(stride))
    pad = _checked_padding(padding, kernel)
    _check_image(x, kernel, step, pad, ceil_mode)
    return avg_pool_of_checked(x, kernel, step, pad, ceil_mode, factor, backend)


def l2_norm_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    r"""The Euclidean norm of each window: y_o = sqrt(sum_{i in o} x_i^2).

    (N, C, H, W) or (C, H, W). ``eps`` guards the gradient alone: dL/dx_i =
    x_i sum_o Gamma_o / (y_o + eps), so that an all-zero window has gradient zero. 1-Lipschitz where
    windows do not overlap.

    >>> l2_norm_pool2d(torch.ones(1, 1, 2, 2), 2)
    tensor([[[[2.]]]])
    """
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    kernel = list(checked_pair(kernel_size))
    step = kernel if stride is None else list(checked_pair(stride))
    pad = _checked_padding(padding, kernel)
    _check_image(x, kernel, step, pad, ceil_mode)
    name = backends.resolve("l2_norm_pool2d", _pooling.FORWARD, x.device, backend)
    return _pooling.l2_norm_pool2d(x, kernel, step, pad, ceil_mode, float(eps), name)
