"""Power iteration in Triton: what it launches, and how it packs weights."""

import cases
import pytest
import torch
from cases import by_dtype

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels.triton import packing, power
from lipkernels.kernels.triton.group import group

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]

NARROW = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(70, 40), (20, 150), (2, 33, 20), (32, 128), (5, 7), (9, 2), (1, 1)]


@pytest.mark.parametrize("n_iter", [1, 4])
def test_two_launches_for_each_round(monkeypatch, n_iter):
    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(self.kernel)
            return self.kernel[grid]

    for name in ("start", "down", "across", "rounds", "finish"):
        monkeypatch.setattr(power, name, Counted(getattr(power, name)))
    monkeypatch.setattr(packing, "pack", Counted(packing.pack))
    weights = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    power.power_iteration(weights, [F.initial_vector(w) for w in weights], n_iter)
    # pack, start, finish, and all rounds of the matrices of one tile in one.
    assert len(launches) == 4 + 2 * n_iter


@by_dtype(NARROW)
@pytest.mark.parametrize("wide", [False, True])
def test_packing_copies_exactly(dtype, wide):
    weights = [torch.randn(shape, device=DEVICE).to(dtype) for shape in SHAPES]
    for chosen in (weights, [weights[3]]):  # also: every row begins at 16 bytes
        shapes = group(chosen)
        form = packing.layout(shapes, wide)
        workspace = packing.packed(chosen, shapes, wide)
        for p, matrix in enumerate(shapes.matrices):
            rows, columns = form.padded[p]
            at = form.starts[p]
            found = workspace[at : at + rows * columns].view(rows, columns)
            expected = chosen[matrix.weight].reshape(-1, matrix.rows, matrix.cols)[matrix.index]
            expected = expected.T if wide and matrix.tall else expected
            n, k = expected.shape
            assert torch.equal(found[:n, :k], expected.float())
            assert not found[n:].any() and not found[:, k:].any()
