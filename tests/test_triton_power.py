"""Power iteration in Triton against the reference: one tile and several, any magnitude."""

import cases
import pytest
import tolerances
import torch
from cases import by_dtype, weight_of_condition

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels.triton import packing, power
from lipkernels.kernels.triton.group import group

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]

NARROW = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(70, 40), (20, 150), (2, 33, 20), (32, 128), (5, 7), (9, 2), (1, 1)]


def assert_same(got, expected):
    limit = tolerances.POWER_ITERATION[torch.float32]
    for parts, references in zip(got, expected, strict=True):
        for part, reference in zip(parts, references, strict=True):
            assert part.dtype == torch.float32 and part.shape == reference.shape
            torch.testing.assert_close(
                part.double(), reference, rtol=limit, atol=limit * float(reference.abs().max())
            )


@by_dtype(NARROW)
@pytest.mark.parametrize("n_iter", [0, 1, 2, 5])
def test_reference(dtype, n_iter):
    weights = [weight_of_condition(shape, 3).to(dtype).to(DEVICE) for shape in SHAPES]
    starts = [F.initial_vector(w).flip(-1) * (i + 1) for i, w in enumerate(weights)]
    got = F.power_iteration(weights, starts, n_iter=n_iter, backend="triton")
    wide = [w.double() for w in weights]
    assert_same(got, F.power_iteration(wide, starts, n_iter=n_iter, backend="reference"))


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
