"""Shape and dtype of a layer's input, checked where torch would answer with a RuntimeError."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_channels(x: Tensor, ranks: Sequence[int] | None, dim: int, channels: int) -> None:
    """Raise ValueError unless ``x`` has one of ``ranks`` and ``channels`` entries along ``dim``.

    ``dim`` is negative; ``ranks`` None allows any rank that has it.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(x).__name__}")
    if (ranks is not None and x.dim() not in ranks) or x.dim() < -dim:
        expected = f"at least {-dim}" if ranks is None else " or ".join(map(str, ranks))
        raise ValueError(f"input: expected {expected} dimensions, got shape {tuple(x.shape)}")
    if x.shape[dim] != channels:
        raise ValueError(
            f"input: expected {channels} entries along dimension {dim}, got {x.shape[dim]}"
            f" in shape {tuple(x.shape)}"
        )


# What autocast casts; it leaves float64 and complex tensors alone.
_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(x: Tensor, expected: torch.dtype) -> None:
    """Raise TypeError unless ``x`` has the layer's dtype, or autocast will give it that."""
    if x.dtype == expected:
        return
    kind = x.device.type
    if (
        x.dtype in _AUTOCAST
        and expected in _AUTOCAST
        and torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
    ):
        return
    raise TypeError(f"input: expected dtype {expected}, got {x.dtype}")
