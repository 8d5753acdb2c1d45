"""An image of ph x pw blocks, wide or deep, and the way between both as a permuted copy.

Pixel (a, d) of block (i, j) is a dimension more for each index: (n, c, i, a, j, d). An image has
strides for them in its wide form and in its deep one, whatever the layout and the order of the
channels (see `lipkernels.reference.sampling`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dim:
    """A dimension of a copy from x to y; strides count elements."""

    size: int
    x: int  # stride
    y: int


def merged(dims: Iterable[Dim]) -> list[Dim]:
    """In the order of y; neighbours that are one run on both sides become one dimension.

    >>> merged([Dim(2, 12, 12), Dim(1, 7, 9), Dim(3, 4, 4), Dim(4, 1, 1)])
    [Dim(size=24, x=1, y=1)]
    """
    out: list[Dim] = []
    for d in sorted((d for d in dims if d.size > 1), key=lambda d: d.y):
        if out and d.x == out[-1].x * out[-1].size and d.y == out[-1].y * out[-1].size:
            last = out.pop()
            d = Dim(last.size * d.size, last.x, last.y)
        out.append(d)
    return out or [Dim(1, 1, 1)]


def empty_deep(x: Tensor, ph: int, pw: int, channels_last: bool) -> Tensor:
    """For what becomes of the wide image ``x``."""
    if channels_last:
        n, h, w, c = x.shape
        return x.new_empty((n, h // ph, w // pw, c * ph * pw))
    n, c, h, w = x.shape
    return x.new_empty((n, c * ph * pw, h // ph, w // pw))


def empty_wide(x: Tensor, ph: int, pw: int, channels_last: bool) -> Tensor:
    """For what becomes of the deep image ``x``."""
    if channels_last:
        n, h, w, c = x.shape
        return x.new_empty((n, h * ph, w * pw, c // (ph * pw)))
    n, c, h, w = x.shape
    return x.new_empty((n, c // (ph * pw), h * ph, w * pw))


def _strides(
    wide: Tensor, deep: Tensor, ph: int, pw: int, mode: str, channels_last: bool
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Of (n, c, i, a, j, d): the sizes, the strides in the wide image and in the deep one."""
    order = (0, 3, 1, 2) if channels_last else (0, 1, 2, 3)
    n, c, h, w = (wide.shape[d] for d in order)
    sn, sc, sh, sw = (wide.stride(d) for d in order)
    dn, dk, di, dj = (deep.stride(d) for d in order)
    channel = (ph * pw, pw, 1) if mode == "CRD" else (1, pw * c, c)  # of c, a, d
    dc, da, dd = (dk * step for step in channel)
    return (
        (n, c, h // ph, ph, w // pw, pw),
        (sn, sc, ph * sh, sh, pw * sw, sw),
        (dn, dc, di, da, dj, dd),
    )


def to_depth(
    x: Tensor, y: Tensor, ph: int, pw: int, mode: str, channels_last: bool
) -> tuple[Dim, ...]:
    """The copy of the wide image ``x`` to the deep one ``y``."""
    sizes, wide, deep = _strides(x, y, ph, pw, mode, channels_last)
    return tuple(map(Dim, sizes, wide, deep))


def to_space(
    x: Tensor, y: Tensor, ph: int, pw: int, mode: str, channels_last: bool
) -> tuple[Dim, ...]:
    """The copy of the deep image ``x`` to the wide one ``y``."""
    sizes, wide, deep = _strides(y, x, ph, pw, mode, channels_last)
    return tuple(map(Dim, sizes, deep, wide))
