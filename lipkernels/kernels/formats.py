"""Lists that mix float64 weights with narrower ones, which other implementations compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def by_format(
    weights: Sequence[Tensor],
    wide: Callable[[list[int]], list[T]],
    narrow: Callable[[list[int]], list[T]],
) -> list[T]:
    """What ``wide`` returns for the positions of float64 weights, and ``narrow`` for the others."""
    found: dict[int, T] = {}
    positions = range(len(weights))
    for is_wide, run in ((True, wide), (False, narrow)):
        members = [i for i in positions if (weights[i].dtype == torch.float64) == is_wide]
        if members:
            found.update(zip(members, run(members), strict=True))
    return [found[i] for i in positions]
