"""Space to depth and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lipkernels import backends
from lipkernels.kernels import sampling as _sampling


def checked_pair(block: int | Sequence[int]) -> tuple[int, int]:
    pair = tuple(block) if isinstance(block, Sequence) else (block, block)
    if len(pair) != 2 or not all(isinstance(p, int) and p > 0 for p in pair):
        raise ValueError(f"block: expected a positive integer or a pair of them, got {block!r}")
    return pair


def _checked_image(x: Tensor, mode: str, data_format: str) -> tuple[bool, tuple[int, int, int]]:
    if mode not in ("CRD", "DCR"):
        raise ValueError(f"mode: expected 'CRD' or 'DCR', got {mode!r}")
    if data_format not in ("channels_first", "channels_last"):
        raise ValueError(
            f"data_format: expected 'channels_first' or 'channels_last', got {data_format!r}"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"input: expected 4 dimensions (a batch of images), got {tuple(x.shape)}")
    last = data_format == "channels_last"
    c, h, w = x.shape[3 if last else 1], x.shape[1 if last else 2], x.shape[2 if last else 3]
    return last, (c, h, w)


def _checked_factor(x: Tensor, scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number, got {scale!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive finite number, got {scale!r}")
    arithmetic = x.is_complex() or (x.is_floating_point() and x.element_size() > 1)
    if scale != 1 and not arithmetic:  # float8 has none
        raise TypeError(
            f"input: expected a floating-point dtype of 16 bits or more for a scale of {scale},"
            f" got {x.dtype}"
        )
    return float(scale)


def space_to_depth(
    x: Tensor,
    block: int | Sequence[int],
    *,
    mode: str = "CRD",
    data_format: str = "channels_first",
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Each ph x pw block of pixels to ph pw channels: invertible, and an isometry times ``scale``.

    (N, C, H, W) -> (N, C ph pw, H/ph, W/pw), or channels last. The output channel of input channel
    c at (a, d) in the block is c ph pw + a pw + d in mode "CRD" (torch's PixelUnshuffle) and
    (a pw + d) C + c in mode "DCR" (deel-lip up to 1.5.0). Raises ValueError where the block does
    not divide the image. Any dtype with ``scale`` 1.

    >>> space_to_depth(torch.zeros(1, 3, 4, 6), (2, 3)).shape
    torch.Size([1, 18, 2, 2])
    """
    ph, pw = checked_pair(block)
    last, (_, h, w) = _checked_image(x, mode, data_format)
    if h % ph or w % pw:
        raise ValueError(
            f"input: expected a height and width divisible by {ph} x {pw}, got {h} x {w}"
        )
    factor = _checked_factor(x, scale)
    name = backends.resolve("space_to_depth", _sampling.SPACE_TO_DEPTH, x.device, backend)
    return _sampling.space_to_depth(x, ph, pw, mode, last, factor, name)


def depth_to_space(
    x: Tensor,
    block: int | Sequence[int],
    *,
    mode: str = "CRD",
    data_format: str = "channels_first",
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""The inverse of :func:`space_to_depth` (up to ``scale``).

    (N, C ph pw, H, W) -> (N, C, H ph, W pw). Raises ValueError where ph pw does not divide the
    number of channels.

    >>> x = torch.randn(1, 2, 4, 4)
    >>> torch.equal(depth_to_space(space_to_depth(x, 2), 2), x)
    True
    """
    ph, pw = checked_pair(block)
    last, (c, _, _) = _checked_image(x, mode, data_format)
    if c % (ph * pw):
        raise ValueError(f"input: expected a number of channels divisible by {ph * pw}, got {c}")
    factor = _checked_factor(x, scale)
    name = backends.resolve("depth_to_space", _sampling.DEPTH_TO_SPACE, x.device, backend)
    return _sampling.depth_to_space(x, ph, pw, mode, last, factor, name)
