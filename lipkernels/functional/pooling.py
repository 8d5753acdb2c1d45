"""L2-norm pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipkernels import backends
from lipkernels.functional.sampling import checked_pair
from lipkernels.kernels import pooling as _pooling

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
