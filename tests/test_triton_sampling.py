"""Permuted copies in Triton beyond test_kernels_sampling.py: offsets, passes, tiles."""

import cases
import pytest
import torch
from kernel_data import any_bytes, assert_moved

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels.blocks import Dim, to_depth, to_space
from lipkernels.kernels.triton import permutation, sampling
from lipkernels.kernels.triton.permutation import tiling

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]
OPS = (F.space_to_depth, F.depth_to_space)


def test_offsets_beyond_32_bits(monkeypatch):
    # The same kernel with 64-bit offsets, of an image that has none.
    monkeypatch.setattr(sampling, "_last_offset", lambda dims, side: 2**31)
    sampling.launch.cache_clear()
    x = any_bytes((2, 4, 6, 8), torch.float32).to(DEVICE)
    dims = tuple(map(Dim, x.shape, x.stride(), x.stride()))
    assert sampling.launch(dims, 4)[2]["LONG"]
    for op in OPS:
        assert_moved(op, x, 2, "triton")
        assert_moved(op, x.mT.contiguous().mT, 2, "triton", mode="DCR")
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
    x = any_bytes((2, 16, 8, 8), torch.float32).to(DEVICE)
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
    down = tiling(to_depth(x, y, 2, 2, "CRD", False))
    assert down.flat_x and not down.flat_y
    assert down.k == (Dim(2, 1, h * w // 4),)
    assert down.q[0] == Dim(w // 2, 2, 1)
    assert down.n_q * down.n_k == x.numel()
    up = tiling(to_space(y, x, 2, 2, "CRD", False))
    assert up.flat_y and not up.flat_x and up.k == (Dim(2, h * w // 4, 1),)
    assert tiling([Dim(1, 7, 9), Dim(6, 2, 2), Dim(2, 1, 1)]).q == (Dim(12, 1, 1),)
    assert len(tiling([Dim(2, 3**i, 5 ** (5 - i)) for i in range(6)]).k) <= permutation.K_DIMS
