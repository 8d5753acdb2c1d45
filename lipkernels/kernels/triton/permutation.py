"""The tiles of a permuted copy: which dimensions a program reads and writes side by side.

A map from ``x`` to ``y`` that moves elements without changing them is a list of dimensions (size,
stride in x, stride in y). A copy is fast where it reads and writes runs of 16 bytes, but the
dimension with stride one is seldom the same on both sides. So a tile has two axes:

    k  the innermost dimensions of one side, up to the one that is innermost on the other side
    q  all the others, with the innermost dimension of that other side first

and is read with one axis fastest and written with the other: a transpose inside the program. Where
a side holds the tile in one piece (``flat``), it is read or written as such and reshaped between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lipkernels.kernels.blocks import Dim, merged

# A tile of k is this wide at most, unless its side is flat.
WIDEST = 64
_NARROWEST = 32
_FLAT = 64  # the largest k of a flat side
_LONG_RUN = 8  # 16 bytes of the narrower formats
Q_DIMS, K_DIMS = 6, 2


@dataclass(frozen=True)
class Tiling:
    """The digits of q and k, innermost first, and what is known about them."""

    q: tuple[Dim, ...]
    k: tuple[Dim, ...]
    flat_x: bool
    flat_y: bool

    @property
    def n_q(self) -> int:
        return math.prod(d.size for d in self.q)

    @property
    def n_k(self) -> int:
        return math.prod(d.size for d in self.k)


def _is_one_run(dims: list[Dim], side: str) -> bool:
    expected = 1
    for d in dims:
        if getattr(d, side) != expected:
            return False
        expected *= d.size
    return True


def _split(dims: list[Dim], side: str, inner: Dim) -> tuple[list[Dim], list[Dim]]:
    """``side``'s dimensions in order; k: those inside of ``inner``, two at most; and the rest."""
    order = sorted(dims, key=lambda d: getattr(d, side))
    # A dimension of stride zero (expanded) is no run.
    order = [d for d in order if getattr(d, side)] + [d for d in order if not getattr(d, side)]
    k: list[Dim] = []
    for d in order:
        if d == inner or len(k) == K_DIMS:
            break
        k.append(d)
    return k, [d for d in order if d not in k]


def _run(dims: tuple[Dim, ...], side: str) -> int:
    """How many elements of ``side`` follow each other along the first two of these."""
    if not dims or getattr(dims[0], side) != 1:
        return 1
    n = dims[0].size
    return n * dims[1].size if len(dims) > 1 and getattr(dims[1], side) == n else n


def _flat_tiling(dims: list[Dim], x_inner: Dim, y_inner: Dim) -> Tiling | None:
    # First the side whose other side has the longer runs.
    for side, other in sorted((("x", y_inner), ("y", x_inner)), key=lambda s: -s[1].size):
        k, q = _split(dims, side, other)
        n = math.prod(d.size for d in k)
        if q[0] == other and n <= _FLAT and n & (n - 1) == 0 and _is_one_run(k + q, side):
            return Tiling(tuple(q), tuple(k), side == "x", side == "y")
    return None


def tiling(dims: Iterable[Dim]) -> Tiling:
    """The tile axes of a copy of these dimensions (six at most); y is contiguous."""
    found = merged(dims)
    y_inner = found[0]
    x_inner = min((d for d in found if d.x), key=lambda d: d.x, default=y_inner)
    if x_inner == y_inner:
        return Tiling(tuple(found), (), False, True)
    k, q = _split(found, "x", y_inner)
    while len(k) > 1 and math.prod(d.size for d in k[:-1]) >= _NARROWEST:
        q.append(k.pop())
    q.sort(key=lambda d: (d != y_inner, d.y))
    general = Tiling(tuple(q), tuple(k), False, False)
    flat = _flat_tiling(found, x_inner, y_inner)
    if flat is None:
        return general
    short = _run(flat.q, "y" if flat.flat_x else "x") < _LONG_RUN
    if short and min(_run(general.q, "y"), _run(general.k, "x")) >= _LONG_RUN:
        return general
    return flat
