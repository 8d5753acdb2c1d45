"""L2-norm pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lipkernels import backends
from lipkernels.functional.sampling import checked_pair
from lipkernels.kernels import pooling as _pooling


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
    if x.dim() not in (3, 4):
        raise ValueError(f"input: expected 3 or 4 dimensions, got {tuple(x.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    kernel = list(checked_pair(kernel_size))
    step = kernel if stride is None else list(checked_pair(stride))
    pad = [padding, padding] if isinstance(padding, int) else list(padding)
    name = backends.resolve("l2_norm_pool2d", _pooling.FORWARD, x.device, backend)
    return _pooling.l2_norm_pool2d(x, kernel, step, pad, ceil_mode, float(eps), name)
