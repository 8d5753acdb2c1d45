"""The tile of a permuted copy: a box that is long where either side is contiguous.

A copy from ``x`` to ``y`` is a list of dimensions (size, stride in x, stride in y). Memory is fast
where neighbouring threads touch neighbouring bytes, 16 at a time; but the innermost dimension is
seldom the same on both sides. A tile has a part of each dimension, its extent:

1. so much of y's innermost dimensions that a run of neighbours has ``RUN`` bytes,
2. the same for x, and
3. more of either, in the order of y, until the tile has ``TILE`` bytes.

Extents are whole dimensions or powers of two. A word of a side is as wide as its runs, its strides
and its address allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lipkernels.kernels.blocks import Dim, merged

RUN, TILE = 128, 8192
DIMS = 6
WORD = 16
_LANES = _BANKS = 32
_PAD_SHIFTS = range(7, 14)


@dataclass(frozen=True)
class Tile:
    """Dimensions in the order of y, their extents, the order of x; bytes of a word on each side.

    ``direct``: words are the same on both sides, and need no shared memory. ``pad_shift``: there,
    16 bytes are left out behind every 2^pad_shift.
    """

    dims: tuple[Dim, ...]
    extents: tuple[int, ...]
    by_x: tuple[int, ...]
    x_word: int
    y_word: int
    direct: bool
    pad_shift: int


def _grown(extents: list[int], sizes: Sequence[int], order: Iterable[int], wanted: int) -> None:
    """Extents along ``order``, enlarged until so many elements are side by side."""
    n = 1
    for k in order:
        needed = max(extents[k], -(-wanted // n))
        fits = sizes[k] <= 2 * needed  # no short tile at the end for the sake of a power of two
        extents[k] = sizes[k] if fits else 1 << (needed - 1).bit_length()
        n *= extents[k]
        if n >= wanted or not fits:
            return


def _extents(sizes: Sequence[int], by_x: Sequence[int], itemsize: int) -> list[int]:
    extents, run = [1] * len(sizes), max(RUN // itemsize, 1) if itemsize > 1 else RUN // 2
    for order in (range(len(sizes)), by_x):
        _grown(extents, sizes, order, run)
    for k, size in enumerate(sizes):
        left = TILE // itemsize // math.prod(extents)
        if left >= 2 and extents[k] < size:
            wanted = extents[k] * left
            extents[k] = size if size <= wanted else 1 << (wanted.bit_length() - 1)
    return extents


def _word(
    order: Sequence[tuple[int, int, int]], itemsize: int, aligned: int, most_digits: int
) -> int:
    """Bytes of a word, 16, 4 or those of an element: every run and every step is a multiple of it.

    ``order``: (size, extent, stride) of each dimension, the innermost of this side first.
    """
    n, digits, whole = 1, 0, True
    numbers = [WORD // itemsize]
    for size, extent, stride in order:
        if whole and stride == n and digits < most_digits:
            numbers.append(0)  # a run so far
            n, digits = n * extent, digits + 1
            if extent < size:
                numbers.append(n // extent * size)
                whole = False
        else:
            whole = False
            numbers.append(stride)
    width = math.gcd(*numbers, n, max(aligned // itemsize, 1)) * itemsize
    return next(w for w in (WORD, 4, itemsize) if w <= width and w >= itemsize)


def conflicts(
    extents: Sequence[int], by_x: Sequence[int], itemsize: int, y_word: int, pad_shift: int
) -> int:
    """How many threads of a warp, at most, read the first elements of their words from one bank."""
    strides, n = [0] * len(extents), itemsize
    for k in by_x:
        strides[k] = n
        n *= extents[k]
    banks = [0] * _BANKS
    for lane in range(_LANES):
        at, number = 0, lane * y_word // itemsize
        for extent, stride in zip(extents, strides, strict=True):
            at += number % extent * stride
            number //= extent
        banks[(at + (at >> pad_shift << 4)) // 4 % _BANKS] += 1
    return max(banks)


def tile(dims: Iterable[Dim], itemsize: int, x_aligned: int, y_aligned: int) -> Tile:
    """The tile of a copy to a contiguous y; ``aligned``: bytes that the addresses are multiples of.

    >>> tile([Dim(512, 1, 512), Dim(512, 512, 1)], 4, 16, 16).extents
    (64, 32)
    """
    found = merged(dims)
    sizes = [d.size for d in found]
    # A stride of zero (expanded) is no run.
    by_x = sorted(range(len(found)), key=lambda k: (found[k].x == 0, found[k].x))
    extents = _extents(sizes, by_x, itemsize)
    along_y = [(d.size, e, d.y) for d, e in zip(found, extents, strict=True)]
    along_x = [(sizes[k], extents[k], found[k].x) for k in by_x]
    x_word = _word(along_x, itemsize, x_aligned, len(found))
    y_word = _word(along_y, itemsize, y_aligned, len(found))
    # Straight across: a word lies in the one dimension that is innermost on both sides.
    straight = 0
    if found[0].x == found[0].y == 1:
        both = [
            [(d.size, e, s) for d, e, s in zip(found, extents, side, strict=True)]
            for side in ([d.x for d in found], [d.y for d in found])
        ]
        straight = min(
            _word(side, itemsize, a, 1)
            for side, a in zip(both, (x_aligned, y_aligned), strict=True)
        )
    direct = straight >= min(x_word, y_word)
    if direct:
        x_word = y_word = straight
    shift = min(_PAD_SHIFTS, key=lambda shift: conflicts(extents, by_x, itemsize, y_word, shift))
    return Tile(tuple(found), tuple(extents), tuple(by_x), x_word, y_word, direct, shift)
