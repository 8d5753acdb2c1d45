"""Permuted copies in CUDA beyond test_kernels_sampling.py: addresses, threads, tiles."""

import ctypes
import math

import pytest
import torch
from cuda_kernels import DEVICE, MARKS, in_every_order
from kernel_data import any_bytes, assert_moved, bits

from lipkernels import functional as F
from lipkernels.kernels.blocks import Dim, empty_deep, to_depth, to_space
from lipkernels.kernels.cuda import library, sampling
from lipkernels.kernels.cuda.tiles import TILE, WORD, conflicts, tile

pytestmark = MARKS
OPS = (F.space_to_depth, F.depth_to_space)


def test_unaligned_addresses():
    for dtype in (torch.uint8, torch.float16, torch.float32, torch.float64):
        for offset in (1, 2, 3, 4, 8):
            x = any_bytes((1 + 2 * 4 * 8 * 16,), dtype).to(DEVICE)[offset % 2 :][: 2 * 4 * 8 * 16]
            x = torch.cat((x[:offset], x))[offset:].view(2, 4, 8, 16)
            assert x.data_ptr() % WORD == offset * dtype.itemsize % WORD
            for op in OPS:
                assert_moved(op, x, 2, "cuda")
                assert_moved(op, x, 2, "cuda", data_format="channels_last", mode="DCR")


def test_the_same_in_every_order_of_threads():
    x = any_bytes((2, 6, 20, 28), torch.float16).to(DEVICE)
    last = x.contiguous(memory_format=torch.channels_last)
    for view in (x, last):
        for op, block in ((F.space_to_depth, 2), (F.depth_to_space, (1, 3))):
            expected = op(bits(view), block, backend="reference")
            for got in in_every_order(lambda: op(view, block, backend="cuda")):  # noqa: B023
                assert torch.equal(bits(got), expected)


def test_contiguous_copies():
    for shape, dtype in (
        ((3, 5, 40, 24), torch.float32),
        ((2, 7, 9), torch.uint8),
        ((4, 6), torch.int64),
    ):
        x = any_bytes(shape, dtype).to(DEVICE)
        for view in (x.mT, x.transpose(0, 1), x.contiguous(), x[1:]):
            got = sampling.contiguous(view)
            assert got.is_contiguous() and torch.equal(bits(got), bits(view))


# ------------------------------------------------------------------------------------- the tiles
def dims_of(shape, down, mode="CRD", last=False, channels_last_memory=False):
    """The copy of ``shape``, the wide image, to or from its deep one, with blocks of 2 x 2."""
    wide = torch.empty(shape, device="meta")
    deep = empty_deep(wide, 2, 2, last)
    if channels_last_memory:
        wide = wide.contiguous(memory_format=torch.channels_last)
    if down:
        return to_depth(wide, deep, 2, 2, mode, last)
    return to_space(deep, wide, 2, 2, mode, last)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("mode", ["CRD", "DCR"])
def test_words_of_16_bytes_where_images_are_aligned(itemsize, down, mode):
    for shape, layout in (
        ((16, 64, 64, 64), {}),
        ((16, 64, 64, 64), {"channels_last_memory": True}),
        ((16, 64, 64, 64), {"last": True}),
        ((128, 64, 32, 32), {}),
        ((32, 256, 14, 28), {}),
        ((8, 512, 14, 14), {}),
    ):
        found = tile(dims_of(shape, down, mode, **layout), itemsize, WORD, WORD)
        assert (found.x_word, found.y_word) == (WORD, WORD), (shape, layout, found)
        assert TILE / 4 <= math.prod(found.extents) * itemsize <= 4 * TILE


def test_words_are_as_narrow_as_rows_and_addresses_ask_for():
    across = [Dim(6, 32, 1), Dim(32, 1, 6)]
    assert (tile(across, 4, 16, 16).x_word, tile(across, 4, 16, 16).y_word) == (16, 16)
    assert tile(across, 4, 8, 16).x_word == 4
    assert tile([Dim(6, 33, 1), Dim(33, 1, 6)], 4, 16, 16).x_word == 4
    assert tile([Dim(8, 1, 1), Dim(5, 9, 8)], 2, 16, 16).x_word == 2  # rows that start anywhere
    same = tile([Dim(8, 1, 1), Dim(5, 16, 8)], 2, 16, 16)
    assert same.direct and same.x_word == same.y_word == 16
    assert tile([Dim(1, 7, 9), Dim(6, 2, 2), Dim(2, 1, 1)], 4, 16, 16).dims == (Dim(12, 1, 1),)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("mode", ["CRD", "DCR"])
def test_what_threads_read_together_is_spread_over_the_banks(itemsize, down, mode):
    for layout in ({}, {"channels_last_memory": True}, {"last": True}):
        found = tile(dims_of((16, 64, 64, 64), down, mode, **layout), itemsize, WORD, WORD)
        if not found.direct:
            worst = conflicts(found.extents, found.by_x, itemsize, found.y_word, found.pad_shift)
            assert worst <= 4, (layout, found)


def test_offsets_beyond_32_bits():
    # Rows 2^33 bytes apart, as if: what the kernel would add to an address.
    d = sampling._described((Dim(2, 2**31, 4), Dim(4, 1, 1)), 4, 16, 16, 0)
    assert d.x[1] == 2**33 and d.size[1] == 2 and d.dims == 2


def test_a_description_that_is_none_is_an_error():
    x = torch.zeros(4, device=DEVICE)
    for dims, itemsize in ((0, 4), (7, 4), (1, 3)):
        d = sampling._described((Dim(4, 1, 1),), 4, 16, 16, 0)
        wrong = type(d).from_buffer_copy(d)
        wrong.dims, wrong.itemsize = dims, itemsize
        with pytest.raises(library.CudaError) as caught:
            sampling._permuted_copy(DEVICE, x.data_ptr(), x.data_ptr(), ctypes.byref(wrong), 1.0)
        assert caught.value.code == 1
