"""One function of lists of weights that several implementations share, each computing a part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Names = Callable[[Sequence[Tensor]], list[str]]


def narrow(name: str) -> Names:
    """Says "reference" for weights in float64, and ``name`` for others, which it computes."""

    def names(weights: Sequence[Tensor]) -> list[str]:
        return ["reference" if w.dtype == torch.float64 else name for w in weights]

    return names


def _entries(values: Sequence[Any], members: Sequence[int], width: int) -> list[Any]:
    return [x for i in members for x in values[width * i : width * (i + 1)]]


def shared(
    names: Names,
    implementations: Mapping[str, Callable[..., Any]],
    *,
    takes: Sequence[int],
    gives: int | Sequence[int],
    weights: int = 0,
) -> Callable[..., Any]:
    """A function of lists: the entries of each weight by the implementation that ``names`` names.

    Its first arguments are lists; ``takes``: how many entries each has for a weight, ``weights``:
    which one has the weights. The other arguments are everybody's. ``gives``: the same of the lists
    that it returns, or of the only one. Each implementation is called once, in the order of their
    first weights.

    >>> def halved(x, scales):
    ...     return [0.5 * value * scale for value, scale in zip(x, scales, strict=True)]
    >>> def negative(x, scales):
    ...     return [-value * scale for value, scale in zip(x, scales, strict=True)]
    >>> by_sign = lambda x: ["up" if value > 0 else "down" for value in x]
    >>> f = shared(by_sign, {"up": halved, "down": negative}, takes=(1, 1), gives=1)
    >>> f([4.0, -3.0, 2.0], [1.0, 2.0, 3.0])
    [2.0, 6.0, 3.0]
    """
    widths = (gives,) if isinstance(gives, int) else tuple(gives)

    def call(*arguments: Any) -> Any:
        found = names(arguments[weights])
        if len(set(found)) == 1:  # nothing to split: less Python, most of a small weight's time
            return implementations[found[0]](*arguments)
        lists, settings = arguments[: len(takes)], arguments[len(takes) :]
        out: list[list[Any]] = [[None] * (width * len(found)) for width in widths]
        for name in dict.fromkeys(found):
            members = [i for i, own in enumerate(found) if own == name]
            chosen = (_entries(v, members, n) for v, n in zip(lists, takes, strict=True))
            results = implementations[name](*chosen, *settings)
            parts = (results,) if isinstance(gives, int) else results
            for whole, part, width in zip(out, parts, widths, strict=True):
                for k, i in enumerate(members):
                    whole[width * i : width * (i + 1)] = part[width * k : width * (k + 1)]
        return out[0] if isinstance(gives, int) else tuple(out)

    return call
