"""GroupSort in one pass: values and the permutation, and the permutation of gradients.

    pairs          one comparison; ONE saved bit a pair, eight pairs to a byte, lowest bit first
    up to 32       an element's place is how many of its group come before it: no exchange at all
    up to 1024     a bitonic sort of 64-bit keys: the value's bits in order, then its position
    more           and 64-bit formats from 33 on: the reference (torch's stable sort)

Ties keep their order and NaN goes last, as in a stable sort. Values are moved, never computed with:
the sign of a zero and the bits of a NaN stay. x has the shape (outer, groups, group_size, inner).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton.offsets import is_long
from lipkernels.kernels.triton.sampling import contiguous
from lipkernels.reference import sorting as reference

NUM_WARPS = 4
_RANKED, _SORTED = 32, 1024
_TILE_BYTES = 8192
_SORT_ELEMENTS = 1024


@triton.jit
def _comparable(x):
    """Half precision in float32, which Triton's interpreter can compare too."""
    narrow: tl.constexpr = x.dtype == tl.float16 or x.dtype == tl.bfloat16
    return x.to(tl.float32) if narrow else x


@triton.jit
def _comes_before(a, b):
    """a < b, and numbers before NaN."""
    return (a < b) | ((b != b) & (a == a))


@triton.jit(do_not_specialize=["n", "inner"])
def sort_pairs(
    x,
    y,
    swaps,
    n,  # pairs, over VN
    inner,  # over VI
    BLOCK: tl.constexpr,
    VN: tl.constexpr,
    VI: tl.constexpr,
    ADJACENT: tl.constexpr,
    SORT: tl.constexpr,
    LONG: tl.constexpr,
):
    """``SORT``: y = the sorted pairs, and write ``swaps``; otherwise exchange as ``swaps`` says."""
    program = tl.program_id(0)
    if LONG:
        program, n, inner = program.to(tl.int64), n.to(tl.int64), inner.to(tl.int64)
    pair = program * BLOCK + tl.arange(0, BLOCK)
    byte = program * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)
    inside = pair < n * VN
    has_byte = byte * 8 < n * VN
    flat = program * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    at = pair // (inner * VI) * (2 * inner * VI) + pair % (inner * VI)
    if ADJACENT:  # a pair lies side by side
        both = tl.load(x + flat, mask=flat < 2 * n * VN, other=0)
        a, b = tl.split(tl.reshape(both, (BLOCK, 2)))
    else:
        a = tl.load(x + at, mask=inside, other=0)
        b = tl.load(x + at + inner * VI, mask=inside, other=0)
    if SORT:
        swap = _comes_before(_comparable(b), _comparable(a))
        bits = tl.reshape(swap, (BLOCK // 8, 8)).to(tl.int32) << bit[None, :]
        tl.store(swaps + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=has_byte)
    else:
        bits = tl.load(swaps + byte, mask=has_byte, other=0).to(tl.int32)
        swap = tl.reshape((bits[:, None] >> bit[None, :]) & 1, (BLOCK,)) != 0
    low, high = tl.where(swap, b, a), tl.where(swap, a, b)
    if ADJACENT:
        both = tl.reshape(tl.join(low, high), (2 * BLOCK,))
        tl.store(y + flat, both, mask=flat < 2 * n * VN)
    else:
        tl.store(y + at, low, mask=inside)
        tl.store(y + at + inner * VI, high, mask=inside)


@triton.jit(do_not_specialize=["n", "inner", "size"])
def rank_groups(
    x,
    y,
    index,
    n,  # elements, over VN
    inner,  # over VI
    size,
    BLOCK: tl.constexpr,
    VN: tl.constexpr,
    VI: tl.constexpr,
    LONG: tl.constexpr,
):
    """y, index: the elements and their positions, each written to its place in its group."""
    program = tl.program_id(0)
    if LONG:
        program, n, inner = program.to(tl.int64), n.to(tl.int64), inner.to(tl.int64)
    e = program * BLOCK + tl.arange(0, BLOCK)
    inside = e < n * VN
    row = e // (inner * VI)
    position = row % size
    group = row // size * size * (inner * VI) + e % (inner * VI)
    own = tl.load(x + e, mask=inside)
    key = _comparable(own)
    place = tl.zeros((BLOCK,), tl.int32)
    for j in range(size):
        other = _comparable(tl.load(x + group + j * (inner * VI), mask=inside))
        before = _comes_before(other, key)
        tied = (j < position) & (_comes_before(key, other) == 0)  # then they are equal or before
        place += (before | tied).to(tl.int32)
    to = group + place * (inner * VI)
    tl.store(y + to, own, mask=inside)
    tl.store(index + to, position.to(index.dtype.element_ty), mask=inside)


@triton.jit
def _ordered(x):
    """An int32 in the order of x, of at most 32 bits: zeros equal, NaN last."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        bits = tl.where(x == 0, 0, bits)
        result = tl.where(x != x, 0x7FFFFFFF, bits)
    else:
        result = x.to(tl.int32)
    return result


@triton.jit(do_not_specialize=["n", "inner", "size"])
def sort_groups(
    x,
    y,
    index,
    n,  # columns: a group at one inner position
    inner,
    size,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,  # a power of two
    LONG: tl.constexpr,
):
    """y, index: columns sorted by (value, position)."""
    program = tl.program_id(0)
    if LONG:
        program, n, inner = program.to(tl.int64), n.to(tl.int64), inner.to(tl.int64)
    column = program * ROWS + tl.arange(0, ROWS)
    position = tl.arange(0, SIZE)
    inside = (column < n)[:, None] & (position < size)[None, :]
    first = column // inner * (size * inner) + column % inner
    at = first[:, None] + position[None, :] * inner
    value = _ordered(_comparable(tl.load(x + at, mask=inside, other=0)))
    # What pads a group comes last: no number or NaN is larger, and no position.
    value = tl.where(inside, value, 0x7FFFFFFF)
    keys = (value.to(tl.int64) << 32) | position[None, :].to(tl.int64)
    order = (tl.sort(keys, dim=1) & 0xFFFFFFFF).to(tl.int32)
    moved = tl.load(x + first[:, None] + order * inner, mask=inside)
    tl.store(y + at, moved, mask=inside)
    tl.store(index + at, order.to(index.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "inner", "size"])
def move_in_groups(
    x,
    y,
    index,
    n,  # elements, over VN
    inner,  # over VI
    size,
    BLOCK: tl.constexpr,
    VN: tl.constexpr,
    VI: tl.constexpr,
    GATHER: tl.constexpr,
    LONG: tl.constexpr,
):
    """``GATHER``: y = x at ``index`` of its group; otherwise y at ``index`` = x."""
    program = tl.program_id(0)
    if LONG:
        program, n, inner = program.to(tl.int64), n.to(tl.int64), inner.to(tl.int64)
    e = program * BLOCK + tl.arange(0, BLOCK)
    inside = e < n * VN
    group = e // (inner * VI) // size * size * (inner * VI) + e % (inner * VI)
    other = group + tl.load(index + e, mask=inside, other=0).to(tl.int32) * (inner * VI)
    if GATHER:
        tl.store(y + e, tl.load(x + other, mask=inside), mask=inside)
    else:
        tl.store(y + other, tl.load(x + e, mask=inside), mask=inside)


def _inner(x: Tensor, dim: int) -> int:
    return math.prod(x.shape[dim + 1 :])


def pair_settings(n: int, inner: int, itemsize: int) -> dict[str, Any]:
    """The constants of ``sort_pairs``."""
    most = 16 // itemsize
    return {
        # Two loads of 16 single bytes in flight are more than the registers hold.
        "BLOCK": _TILE_BYTES // 2 // max(itemsize, 2),
        "VN": math.gcd(n, most),
        "VI": math.gcd(inner, most),
        "ADJACENT": inner == 1,
        "LONG": is_long(2 * n),
        "num_warps": NUM_WARPS,
    }


def element_settings(n: int, inner: int, itemsize: int) -> dict[str, Any]:
    """The constants of ``rank_groups`` and ``move_in_groups``."""
    most = 16 // itemsize
    return {
        "BLOCK": _TILE_BYTES // 2 // itemsize,
        "VN": math.gcd(n, most),
        "VI": math.gcd(inner, most),
        "LONG": is_long(n),
        "num_warps": NUM_WARPS,
    }


def column_settings(n: int, size: int) -> dict[str, Any]:
    """The constants of ``sort_groups``."""
    padded = 1 << (size - 1).bit_length()
    return {
        "ROWS": max(_SORT_ELEMENTS // padded, 1),
        "SIZE": padded,
        "LONG": is_long(n * size),
        "num_warps": NUM_WARPS,
    }


def _readable(x: Tensor) -> Tensor:
    """Contiguous, and of a format that Triton knows."""
    x = contiguous(x)
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _on_pairs(x: Tensor, y: Tensor, swaps: Tensor, dim: int, sort: bool) -> None:
    n, inner = x.numel() // 2, _inner(x, dim)
    settings = {**pair_settings(n, inner, x.itemsize), "SORT": sort}
    grid = (-(-n // settings["BLOCK"]),)
    sizes = {"n": n // settings["VN"], "inner": inner // settings["VI"]}
    sort_pairs[grid](_readable(x), _readable(y), swaps, **sizes, **settings)


def _on_elements(
    kernel: Any, x: Tensor, y: Tensor, index: Tensor, group_size: int, dim: int, **others: bool
) -> None:
    n, inner = x.numel(), _inner(x, dim)
    settings = element_settings(n, inner, x.itemsize)
    grid = (-(-n // settings["BLOCK"]),)
    sizes = {"n": n // settings["VN"], "inner": inner // settings["VI"], "size": group_size}
    kernel[grid](_readable(x), _readable(y), index, **sizes, **others, **settings)


def group_sort(x: Tensor, group_size: int, dim: int) -> tuple[Tensor, Tensor]:
    """As :func:`lipkernels.reference.sorting.group_sort`; for pairs the index is packed bits."""
    y = x.new_empty(x.shape)
    if group_size == 2:
        swaps = x.new_empty((-(-x.numel() // 16),), dtype=torch.uint8)
        if x.numel():
            _on_pairs(x, y, swaps, dim, True)
        return y, swaps
    if x.numel() == 0 or group_size > (_RANKED if x.itemsize == 8 else _SORTED):
        return reference.group_sort(x, group_size, dim)
    index = x.new_empty(x.shape, dtype=reference.index_dtype(group_size))
    if group_size <= _RANKED:
        _on_elements(rank_groups, x, y, index, group_size, dim)
        return y, index
    n = x.numel() // group_size
    settings = column_settings(n, group_size)
    grid = (-(-n // settings["ROWS"]),)
    sizes = {"n": n, "inner": _inner(x, dim), "size": group_size}
    sort_groups[grid](_readable(x), _readable(y), index, **sizes, **settings)
    return y, index


def _moved(x: Tensor, index: Tensor, group_size: int, dim: int, gather: bool) -> Tensor:
    y = x.new_empty(x.shape)
    if x.numel() and group_size == 2:
        _on_pairs(x, y, index.contiguous(), dim, False)  # an exchange is its own inverse
    elif x.numel():
        _on_elements(move_in_groups, x, y, index.contiguous(), group_size, dim, GATHER=gather)
    return y


def gather_groups(x: Tensor, index: Tensor, group_size: int, dim: int) -> Tensor:
    """As :func:`lipkernels.reference.sorting.gather_groups`, of this file's index."""
    return _moved(x, index, group_size, dim, True)


def scatter_groups(grad: Tensor, index: Tensor, group_size: int, dim: int) -> Tensor:
    """As :func:`lipkernels.reference.sorting.scatter_groups`, of this file's index."""
    return _moved(grad, index, group_size, dim, False)
