"""Lists of weights that several implementations share, each computing a part of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Names = Callable[[Sequence[Tensor]], list[str]]


def by_name(names: Sequence[str], runs: Mapping[str, Callable[[list[int]], list[T]]]) -> list[T]:
    """For each position what ``runs[its name]`` returns, which is called once for all of a name.

    >>> by_name(["a", "b", "a"], {"b": lambda at: [0], "a": lambda at: [10 * i for i in at]})
    [0, 0, 20]
    """
    found: dict[int, T] = {}
    for name, run in runs.items():
        members = [i for i, own in enumerate(names) if own == name]
        if members:
            found.update(zip(members, run(members), strict=True))
    return [found[i] for i in range(len(names))]


def narrow(name: str) -> Names:
    """Says "reference" for weights in float64, and ``name`` for others, which it computes."""

    def names(weights: Sequence[Tensor]) -> list[str]:
        return ["reference" if w.dtype == torch.float64 else name for w in weights]

    return names


def by_format(
    weights: Sequence[Tensor],
    wide: Callable[[list[int]], list[T]],
    narrow: Callable[[list[int]], list[T]],
) -> list[T]:
    """What ``wide`` returns for the positions of float64 weights, and ``narrow`` for the others."""
    names = ["wide" if w.dtype == torch.float64 else "narrow" for w in weights]
    return by_name(names, {"wide": wide, "narrow": narrow})
