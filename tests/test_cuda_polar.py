"""The polar factor in CUDA: accuracy, the bound without a tolerance, what is saved, equal bits."""

import ctypes
import pathlib
import re
import shutil
import subprocess

import pytest
import simt
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from cases import weight_of_condition
from cuda_kernels import DEVICE, MARKS, SEEDS, in_every_order

from lipkernels.kernels.cuda import library, polar

pytestmark = MARKS

SHAPES = [(1, 9), (12, 1), (6, 9), (20, 20), (40, 33), (16, 27)]
SCALES = [1.5, 0.7, 3.0, 1.0, 2.0, 0.3]
# Of the polar factor before the margin that roundings to a format cost.
ORTHOGONALITY = 1e-6  # 3.7e-7
NORM = 5e-7  # 1.8e-7
VALUES = {1: 5e-7, 10: 1e-6, 100: 5e-6, 1000: 5e-5}  # 1.1e-7, 1.9e-7, 6e-7, 7e-6
FACTOR = {1: 1e-6, 10: 2e-6, 100: 5e-6, 1000: 5e-5}  # 2e-7, 4e-7, 9e-7, 5e-6


def run(weights, scales=None, dtype=torch.float32):
    """Results, and a (factor, spectrum, scalars) for each, on the CPU."""
    device = [w.to(DEVICE) for w in weights]
    results, saved = polar.forward(device, scales or [1.0] * len(weights), dtype)
    saved = [t.cpu() for t in saved]
    return [r.cpu() for r in results], [saved[i : i + 3] for i in range(0, len(saved), 3)]


def wide(x):
    return x.mT if x.shape[-2] > x.shape[-1] else x


def largest(x):
    return torch.linalg.svdvals(x.double()).amax()


def check(weight, condition):
    """U, P or P^-1 and the numbers, against an SVD in float64."""
    (result,), ((factor, spectrum, scalars),) = run([weight])
    u, w = wide(result.double() / scalars[1].double()), wide(weight.double() / scalars[0].double())
    left, p, right = torch.linalg.svd(w, full_matrices=False)
    eye = torch.eye(len(p), dtype=torch.float64)
    assert torch.linalg.matrix_norm(u @ u.mT - eye, 2) <= ORTHOGONALITY
    assert largest(u) <= 1 + NORM and largest(result) <= 1
    torch.testing.assert_close(u, left @ right, rtol=0, atol=VALUES[condition])
    square = weight.shape[-2] == weight.shape[-1]
    exact = (left * (p if square else 1 / p)) @ left.mT
    difference = torch.linalg.norm(factor.double() - exact)
    assert difference <= FACTOR[condition] * torch.linalg.norm(exact)
    assert p[0] * (1 - 1e-6) <= -spectrum[0] <= 1.5 * p[0]
    if len(p) > 1:
        assert p[-1] / len(p) ** 0.25 * (1 - 1e-5) <= spectrum[1] <= p[-1] * (1 + 1e-5)
    assert not spectrum[2:].any()
    assert 1 <= weight.abs().max() / scalars[0] < 2


@pytest.mark.parametrize("condition", list(VALUES))
@pytest.mark.parametrize("shape", [(5, 5), (13, 17), (64, 9), (33, 35)], ids=str)
def test_accuracy_by_condition(shape, condition):
    check(weight_of_condition(shape, condition).float(), condition)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 6), (7, 1), (16, 16), (17, 16), (32, 65), (64, 64), (64, 65), (66, 63)]
)
def test_accuracy_at_edges(shape):
    check(weight_of_condition(shape, 10).float(), 10)


@pytest.mark.parametrize("shape", [(9, 513), (1030, 4)], ids=str)
def test_many_columns_are_shared_by_a_cluster(shape):
    assert polar.cluster_of(*shape, DEVICE) > 1 or not polar.has_clusters(DEVICE)
    check(weight_of_condition(shape, 10).float(), 10)


@pytest.mark.parametrize("shape", [(65, 65), (90, 66), (65, 130)], ids=str)
def test_sides_up_to_128(shape):
    weight = weight_of_condition(shape, 10).float()
    if not polar.fits(weight.to(DEVICE)):
        pytest.skip("this device has no clusters, or too little shared memory")
    check(weight, 10)


def test_a_long_row_sums_without_a_drift():
    """Tensor cores cut sums off: X X^T would come out too small, and U too large."""
    check(
        torch.full((2, 4000), 0.1) * torch.tensor([[1.0], [-1.0]]) + torch.randn(2, 4000) * 0.3, 1
    )


@pytest.mark.parametrize("dtype", list(polar.FORMATS), ids=str)
def test_bad_weights_stay_within_the_bound(dtype):
    names = ["Hilbert", "1e38", *BAD_WEIGHTS]
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(names))]
    scales = [SCALES[i % len(SCALES)] for i in range(len(names))]
    rows, columns = (torch.arange(n) for n in shapes[0])
    weights = [1 / (1.0 + rows[:, None] + columns[None, :])]
    weights.append(torch.randn(shapes[1]).clamp(-3, 3) * 1e38)
    for name, shape in zip(names[2:], shapes[2:], strict=True):
        weights.append(bad_weight(name, shape, torch.float32))
    results, saved = run(weights, scales, dtype)
    for name, result, scale, parts in zip(names, results, scales, saved, strict=True):
        assert result.dtype == dtype
        assert result.isfinite().all() and largest(result) <= scale, name
        assert all(part.isfinite().all() for part in parts), name


@pytest.mark.parametrize("name", ["rank one plus noise", "graded", "near ties", "duplicate rows"])
def test_bad_weights_of_several_tiles_stay_within_the_bound(name):
    for shape in ((64, 66), (48, 48)):
        (result,), _ = run([bad_weight(name, shape, torch.float32)])
        assert result.isfinite().all() and largest(result) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_near_the_bound(dtype):
    eps = torch.finfo(dtype).eps
    weights = [torch.nn.init.orthogonal_(torch.empty(s)).to(dtype) for s in SHAPES]
    results, _ = run(weights, SCALES, dtype)
    for result, scale in zip(results, SCALES, strict=True):
        assert scale * (1 - 3.5 * eps) <= largest(result) <= scale


def test_weights_that_are_not_finite_give_nan():
    for bad in (torch.nan, torch.inf):
        w = torch.randn(5, 7)
        w[2, 3] = bad
        for dtype in polar.FORMATS:
            (result, other), ((factor, *_), _) = run([w, torch.eye(4)], dtype=dtype)
            assert result.isnan().all() and other.isfinite().all()
            assert factor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights(dtype):
    for shape in ((6, 8), (8, 4), (5, 7)):
        w = weight_of_condition(shape, 5).to(dtype)
        (result,), _ = run([w])
        (expected,), _ = run([w.float()])
        assert torch.equal(result, expected)


def test_powers_of_two_change_nothing():
    w = weight_of_condition((5, 9), 10).float()
    (expected,), _ = run([w])
    for power in (2.0**-60, 2.0**60, 2.0**-120):
        (result,), _ = run([w * power])
        assert torch.equal(result, expected)


def test_unaligned_weights_and_batches_are_bitwise_the_same():
    w = weight_of_condition((3, 8, 12), 10).float()
    storage = torch.cat([torch.zeros(1), w.flatten()])
    unaligned = storage[1:].view(w.shape)
    (together, shifted), _ = run([w, unaligned.to(DEVICE)])
    for i in range(3):
        (alone,), _ = run([w[i]])
        assert torch.equal(alone, together[i]) and torch.equal(alone, shifted[i])
        (turned,), _ = run([w[i].mT])  # strides of another order
        torch.testing.assert_close(turned.mT, alone, rtol=0, atol=1e-6)


def test_a_list_is_bitwise_its_members():
    weights = [weight_of_condition(s, 30, i).float() for i, s in enumerate(SHAPES)] * 10
    assert len(weights) > 48  # more than one launch has
    together, saved = run(weights)
    for i, w in enumerate(weights[: len(SHAPES)]):
        (alone,), (parts,) = run([w])
        assert torch.equal(alone, together[i]) and torch.equal(alone, together[i + len(SHAPES)])
        assert all(torch.equal(a, b) for a, b in zip(parts, saved[i], strict=True))


@pytest.mark.skipif(
    not library.is_simt(), reason="the order of threads is the SIMT shim's to choose"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_threads_gives_the_same_bits(dtype):
    weights = [weight_of_condition(s, 10).float() for s in ((12, 12), (9, 513), (40, 33), (65, 66))]
    found = in_every_order(lambda: run(weights, dtype=dtype))
    for results, saved in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0][0], strict=True))
        for parts, others in zip(saved, found[0][1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(parts, others, strict=True))


@pytest.mark.skipif(not library.is_simt(), reason="the SIMT shim finds missing barriers")
def test_a_missing_barrier_in_the_kernel_is_seen(tmp_path, monkeypatch):
    """Between z X, written to shared memory, and its products with itself."""
    shutil.copytree(simt.ROOT / "csrc", tmp_path / "csrc")
    file = tmp_path / "csrc" / "cuda" / "polar.h"
    barrier = (
        "      __syncthreads();\n      if (is_z == at_last) this->add_symmetric(gram, y, y, CHUNK);"
    )
    text = file.read_text()
    assert text.count(barrier) == 1
    file.write_text(text.replace(barrier, barrier.split("\n")[1]))
    out = tmp_path / "broken.so"
    command = ["g++", "-std=gnu++17", "-O1", "-march=native", "-fno-gnu-unique", "-DLK_SIMT"]
    source = str(pathlib.Path(file).with_suffix(".cu"))
    subprocess.run([*command, "-fPIC", "-shared", "-x", "c++", source, "-o", str(out)], check=True)
    broken = ctypes.CDLL(str(out))
    broken.lk_polar_small.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 4, ctypes.c_void_p]
    monkeypatch.setattr(
        polar, "_small", lambda _, *arguments: broken.lk_polar_small(*arguments, None)
    )
    w = weight_of_condition((20, 33), 10).float()
    found = []
    for seed in SEEDS:
        broken.lk_simt_seed(seed)
        found.append(run([w])[0][0])
    assert not all(torch.equal(found[0], x) for x in found[1:]) or found[0].isnan().any()


def test_saved_square_factor_is_symmetric_to_the_bit():
    _, ((factor, _, _),) = run([weight_of_condition((40, 40), 10).float()])
    assert torch.equal(factor, factor.mT)


def test_the_schedule_is_that_of_triton():
    schedule = pytest.importorskip("lipkernels.kernels.triton.schedule")
    text = (simt.ROOT / "csrc" / "cuda" / "polar.h").read_text()
    for name, row in zip(("GROW", "NEAR", "NEXT"), schedule.COEFFICIENTS, strict=True):
        written = re.search(rf"{name}\[5\] = {{(.*)}};", text)
        assert written is not None
        assert tuple(float(c.rstrip("f")) for c in written[1].split(", ")) == row
    assert f"POLAR_STEPS = {schedule.STEPS};" in text
    assert f"POLAR_DONE = {schedule.DONE.value:.0e}".replace("e-0", "e-") + "f;" in text


def test_what_fits():
    def weight(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    assert polar.fits(weight(64, 9000)) and polar.fits(weight(9000, 64, dtype=torch.bfloat16))
    side = polar.largest_side(DEVICE)
    assert polar.fits(weight(2, side, side + 1)) and not polar.fits(weight(side + 1, side + 1))
    assert not polar.fits(weight(8, 8, dtype=torch.float64))


def test_workspace_and_shared_memory_are_what_the_kernel_uses():
    assert polar.workspace_size(16, 64) == 16 * 64 * 2
    assert polar.workspace_size(65, 33) == 64 * 64 * 3
    assert polar.workspace_size(65, 66) == 128 * 64 * 4
