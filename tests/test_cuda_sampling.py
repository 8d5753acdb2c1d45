"""Permuted copies in CUDA beyond what tests/test_op_sampling.py asks of every backend."""

import ctypes
import math

import pytest
import torch
from cases import ANY_DTYPE, FLOATS, by_dtype
from cuda_kernels import DEVICE, MARKS, in_every_order

from lipkernels import functional as F
from lipkernels.kernels.cuda import library, sampling
from lipkernels.kernels.cuda.tiles import TILE, WORD, Dim, conflicts, tile

pytestmark = MARKS
OPS = (F.space_to_depth, F.depth_to_space)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def image(shape, dtype=torch.float32):
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype).to(DEVICE)
    x = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    x = x.view(dtype).squeeze(-1) if dtype != torch.bool else x[..., 0] > 127
    return x.to(DEVICE)


def bits(x):
    return x if x.is_complex() else x.view(BITS[x.itemsize])


def assert_moved(op, x, block, **others):
    got = op(x, block, backend="cuda", **others)
    expected = op(bits(x), block, backend="reference", **others)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert torch.equal(bits(got), expected)


@by_dtype((*ANY_DTYPE, torch.complex64, torch.complex128))
def test_every_format_is_moved_bit_by_bit(dtype):
    for op in OPS:
        for mode in ("CRD", "DCR"):
            x = image((2, 12, 4, 8), dtype)  # NaN included
            assert_moved(op, x, 2, mode=mode)
            assert_moved(op, x.permute(0, 2, 3, 1), 2, mode=mode)  # channels last in memory


# More than one tile, in every dimension; sizes that end within one.
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((2, 4, 64, 48), 2),
        ((1, 8, 33, 42), (3, 1)),
        ((1, 80, 8, 34), (1, 2)),
        ((1, 72, 12, 20), 4),
        ((1, 4, 72, 60), (8, 2)),
        ((1, 9, 36, 39), 3),
        ((1, 4, 130, 70), 1),
        ((3, 16, 14, 14), 2),
    ],
    ids=str,
)
def test_many_tiles(shape, block):
    ph, pw = (block, block) if isinstance(block, int) else block
    n, c, h, w = shape
    for op, size in ((OPS[0], shape), (OPS[1], (n, ph * pw * c, h // ph, w // pw))):
        for dtype in (torch.int16, torch.uint8):
            x = image(size, dtype)
            for mode in ("CRD", "DCR"):
                last = {"mode": mode, "data_format": "channels_last"}
                assert_moved(op, x, block, mode=mode)
                assert_moved(op, x.contiguous(memory_format=torch.channels_last), block, mode=mode)
                assert_moved(op, x.mT.contiguous().mT, block, mode=mode)
                assert_moved(op, x.movedim(1, -1).contiguous(), block, **last)
                assert_moved(op, x.movedim(1, -1), block, **last)


def test_expanded_and_overlapping_strides():
    base = image((1, 4, 6, 8))
    for x in (
        base.expand(3, 4, 6, 8),
        base[:, :1].expand(2, 8, 6, 8),
        base[..., :1].expand(1, 4, 6, 8),
        base[:, :1, :1, :1].expand(2, 4, 6, 8),
        torch.as_strided(base, (2, 4, 4, 4), (3, 2, 5, 1)),
        base.flip(1)[:, ::2],
        base.transpose(1, 2),
        base.transpose(1, 3),
        base.flatten()[1:].unflatten(0, (1, 1, 1, -1))[..., :190].reshape(1, 1, 10, 19)[..., 1:],
    ):
        for op in OPS:
            for mode in ("CRD", "DCR"):
                block = (2, 1) if op is F.space_to_depth else (1, 2)
                if op is F.depth_to_space and x.shape[1] % 2:
                    continue
                assert_moved(op, x, block, mode=mode)


def test_unaligned_addresses():
    for dtype in (torch.uint8, torch.float16, torch.float32, torch.float64):
        for offset in (1, 2, 3, 4, 8):
            x = image((1 + 2 * 4 * 8 * 16,), dtype)[offset % 2 :][: 2 * 4 * 8 * 16]
            x = torch.cat((x[:offset], x))[offset:].view(2, 4, 8, 16)
            assert x.data_ptr() % WORD == offset * dtype.itemsize % WORD
            for op in OPS:
                assert_moved(op, x, 2)
                assert_moved(op, x, 2, data_format="channels_last", mode="DCR")


@by_dtype(FLOATS)
@pytest.mark.parametrize("scale", [0.37, 3.0, 1 / 3, 1e-42, 1e40, 2.0**-1074])
def test_scaled_values_are_the_reference_bit_by_bit(dtype, scale):
    x = torch.randn(2, 8, 6, 10, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    for op in OPS:
        for view in (x, x.contiguous(memory_format=torch.channels_last)):
            got = op(view, 2, scale=scale, backend="cuda")
            expected = op(view, 2, scale=scale, backend="reference")
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_complex_images_and_gradients():
    z = torch.randn(1, 4, 4, 4, dtype=torch.complex64, device=DEVICE)
    for op in OPS:
        for x in (z, z.conj(), z.imag, z.conj().imag):  # lazy conjugates and negatives
            for scale in (1.0, 0.5):
                got = op(x, 2, scale=scale, backend="cuda")
                assert torch.equal(got, op(x, 2, scale=scale, backend="reference"))
        x = torch.randn(1, 4, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)

        def call(t, op=op):
            return op(t, (1, 2), mode="DCR", scale=0.7, backend="cuda")

        assert torch.autograd.gradcheck(call, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


def test_the_same_in_every_order_of_threads():
    x = image((2, 6, 20, 28), torch.float16)
    last = x.contiguous(memory_format=torch.channels_last)
    for view in (x, last):
        for op, block in ((F.space_to_depth, 2), (F.depth_to_space, (1, 3))):
            expected = op(bits(view), block, backend="reference")
            for got in in_every_order(lambda: op(view, block, backend="cuda")):  # noqa: B023
                assert torch.equal(bits(got), expected)


def test_contiguous_copies():
    for x in (image((3, 5, 40, 24)), image((2, 7, 9), torch.uint8), image((4, 6), torch.int64)):
        for view in (x.mT, x.transpose(0, 1), x.contiguous(), x[1:]):
            got = sampling.contiguous(view)
            assert got.is_contiguous() and torch.equal(bits(got), bits(view))


def test_op_and_its_fake_agree():
    x = torch.randn(2, 4, 4, 6, device=DEVICE, requires_grad=True)
    for name in ("space_to_depth", "depth_to_space"):
        op = getattr(torch.ops.lipkernels, name).default
        torch.library.opcheck(op, (x, 2, 1, "CRD", False, 0.5, "cuda"))


def test_compiled():
    def function(x):
        return F.depth_to_space(F.space_to_depth(x, 2, backend="cuda") * 2, 2, backend="cuda")

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 6, device=DEVICE, requires_grad=True)
    assert torch.equal(compiled(x), 2 * x)
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], torch.full_like(x, 2))


# ------------------------------------------------------------------------------------- the tiles
def dims_of(shape, down, mode="CRD", last=False, channels_last_memory=False):
    """The copy of ``shape``, the wide image, to or from its deep one, with blocks of 2 x 2."""
    wide = torch.empty(shape, device="meta")
    if last:
        n, h, w, c = shape
        deep = torch.empty(n, h // 2, w // 2, 4 * c, device="meta")
    else:
        n, c, h, w = shape
        deep = torch.empty(n, 4 * c, h // 2, w // 2, device="meta")
    if channels_last_memory:
        wide = wide.contiguous(memory_format=torch.channels_last)
    sizes, x, y = sampling._block_dims(wide, deep, 2, 2, mode, last)
    return list(map(Dim, sizes, *((x, y) if down else (y, x))))


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
