"""Symmetric padding: reflection that repeats the edge pixel (numpy's "symmetric"), any width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def symmetric_pad(x: Tensor, pad: Sequence[int]) -> Tensor:
    """``pad`` as in :func:`torch.nn.functional.pad`: last dimension first, (left, right)."""
    for i in range(len(pad) // 2):
        left, right = pad[2 * i], pad[2 * i + 1]
        dim, size = x.dim() - 1 - i, x.shape[-1 - i]
        position = torch.arange(-left, size + right, device=x.device)
        position = torch.where(position < 0, -1 - position, position)
        position = torch.where(position >= size, 2 * size - 1 - position, position)
        x = x.index_select(dim, position)
    return x
