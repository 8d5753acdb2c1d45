"""Permuted copies beyond what tests/test_op_sampling.py asks of every backend."""

import cases
import pytest
import torch
from cases import ANY_DTYPE, FLOATS, by_dtype

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels.triton import permutation, sampling
from lipkernels.kernels.triton.permutation import Dim, tiling

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]
OPS = (F.space_to_depth, F.depth_to_space)


def image(shape, dtype=torch.float32):
    x = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    x = x.view(dtype).squeeze(-1) if dtype != torch.bool else x[..., 0] > 127
    return x.to(DEVICE)


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def assert_moved(op, x, block, **others):
    got = op(x, block, backend="triton", **others)
    expected = op(bits(x), block, backend="reference", **others)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert torch.equal(bits(got), expected)


@by_dtype(ANY_DTYPE)
def test_every_format_is_moved_bit_by_bit(dtype):
    for op in OPS:
        for mode in ("CRD", "DCR"):
            x = image((2, 12, 4, 8), dtype)  # NaN included
            assert_moved(op, x, 2, mode=mode)
            assert_moved(op, x.permute(0, 2, 3, 1), 2, mode=mode)  # channels last in memory
            assert_moved(op, x, (2, 1), mode=mode, data_format="channels_last")


# More than one program, along both axes of a tile; sizes that end within one.
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
    ],
    ids=str,
)
def test_many_programs(shape, block):
    ph, pw = (block, block) if isinstance(block, int) else block
    n, c, h, w = shape
    for op, size in ((OPS[0], shape), (OPS[1], (n, ph * pw * c, h // ph, w // pw))):
        x = image(size, torch.int16)
        for mode in ("CRD", "DCR"):
            assert_moved(op, x, block, mode=mode)
            assert_moved(op, x.contiguous(memory_format=torch.channels_last), block, mode=mode)
            assert_moved(op, x.mT.contiguous().mT, block, mode=mode)
            assert_moved(
                op, x.movedim(1, -1).contiguous(), block, mode=mode, data_format="channels_last"
            )
            assert_moved(op, x.movedim(1, -1), block, mode=mode, data_format="channels_last")


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
    ):
        for op in OPS:
            for mode in ("CRD", "DCR"):
                assert_moved(op, x, (2, 1) if op is F.space_to_depth else (1, 2), mode=mode)


@by_dtype(FLOATS)
@pytest.mark.parametrize("scale", [0.37, 3.0, 1 / 3, 1e-42, 1e40, 2.0**-1074])
def test_scaled_values_are_the_reference_bit_by_bit(dtype, scale):
    x = torch.randn(2, 8, 6, 10, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    for op in OPS:
        for view in (x, x.contiguous(memory_format=torch.channels_last)):
            got = op(view, 2, scale=scale, backend="triton")
            expected = op(view, 2, scale=scale, backend="reference")
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_complex_images_and_gradients():
    z = torch.randn(1, 4, 4, 4, dtype=torch.complex64, device=DEVICE)
    for op in OPS:
        for x in (z, z.conj(), z.imag, z.conj().imag):  # lazy conjugates and negatives
            for scale in (1.0, 0.5):
                got = op(x, 2, scale=scale, backend="triton")
                assert torch.equal(got, op(x, 2, scale=scale, backend="reference"))
        x = torch.randn(1, 4, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda t, op=op: op(t, (1, 2), mode="DCR", scale=0.7, backend="triton"),
            x,
            fast_mode=True,
        )


def test_offsets_beyond_32_bits(monkeypatch):
    # The same kernel with 64-bit offsets, of an image that has none.
    monkeypatch.setattr(sampling, "_last_offset", lambda dims, side: 2**31)
    sampling.launch.cache_clear()
    x = image((2, 4, 6, 8))
    dims = tuple(map(Dim, x.shape, x.stride(), x.stride()))
    assert sampling.launch(dims, 4)[2]["LONG"]
    for op in OPS:
        assert_moved(op, x, 2)
        assert_moved(op, x.mT.contiguous().mT, 2, mode="DCR")
    sampling.launch.cache_clear()
    monkeypatch.undo()
    assert not sampling.launch(dims, 4)[2]["LONG"]
    beyond = (Dim(2, 2**31, 1),)
    assert sampling.launch(beyond, 4)[2]["LONG"]


def test_one_read_and_one_write(monkeypatch):
    copies = []
    monkeypatch.setattr(
        sampling, "_copied", lambda x, y, dims, scale: copies.append((x, y, scale)) or y
    )
    x = image((2, 16, 8, 8))
    last = x.contiguous(memory_format=torch.channels_last)
    for op in OPS:
        for mode in ("CRD", "DCR"):
            for data_format in ("channels_first", "channels_last"):
                op(x, 2, mode=mode, data_format=data_format, scale=0.5, backend="triton")
    F.space_to_depth(last, 2, backend="triton")
    assert len(copies) == 9
    F.depth_to_space(last.to(torch.int16), 2, backend="triton")  # runs of two: see _has_short_runs
    assert len(copies) == 11


def test_tiles():
    # (n, c, i, a, j, d) of a contiguous image with 2 x 2 blocks, to contiguous CRD.
    n, c, h, w = 3, 5, 8, 16
    x = torch.empty(n, c, h, w)
    y = torch.empty(n, 4 * c, h // 2, w // 2)
    sizes, wide, deep = sampling.block_dims(x, y, 2, 2, "CRD", False)
    down = tiling(map(Dim, sizes, wide, deep))
    assert down.flat_x and not down.flat_y
    assert down.k == (Dim(2, 1, h * w // 4),)
    assert down.q[0] == Dim(w // 2, 2, 1)
    assert down.n_q * down.n_k == x.numel()
    up = tiling(map(Dim, sizes, deep, wide))
    assert up.flat_y and not up.flat_x and up.k == (Dim(2, h * w // 4, 1),)
    assert tiling([Dim(1, 7, 9), Dim(6, 2, 2), Dim(2, 1, 1)]).q == (Dim(12, 1, 1),)
    assert len(tiling([Dim(2, 3**i, 5 ** (5 - i)) for i in range(6)]).k) <= permutation.K_DIMS
