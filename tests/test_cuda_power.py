"""Power iteration in CUDA against the reference: blocks and clusters, any magnitude and order."""

import collections

import cases
import cuda_kernels
import pytest
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from cases import by_dtype, weight_of_condition
from kernel_data import assert_power_iteration

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels.cuda import library, power

pytestmark = cuda_kernels.MARKS
DEVICE = cases.device_of("cuda")
NARROW = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(70, 40), (20, 150), (2, 33, 20), (5, 7), (9, 2), (1, 30), (30, 1), (1, 1)]


@pytest.fixture
def clusters(monkeypatch):
    """Blocks with little shared memory, so that small matrices need clusters."""
    if library.is_simt() or torch.cuda.get_device_capability() >= (9, 0):
        return lambda size: monkeypatch.setattr(power, "_room", lambda index: (size, 8))
    return pytest.skip("no clusters before compute capability 9.0")


@pytest.mark.parametrize("condition", [1, 10, 100])
def test_by_condition(condition):
    weights = [weight_of_condition(s, condition).float().to(DEVICE) for s in ((64, 65), (33, 12))]
    starts = [F.initial_vector(w) for w in weights]
    assert_power_iteration(power.power_iteration(weights, starts, 3), weights, starts, 3)


@by_dtype(NARROW)
@pytest.mark.parametrize("n_iter", [0, 1, 4])
def test_clusters(clusters, dtype, n_iter):
    shapes = [(70, 40), (24, 150), (65, 33), (320, 16), (9, 2)]
    weights = [weight_of_condition(shape, 3).to(dtype).to(DEVICE) for shape in shapes]
    starts = [F.initial_vector(w) for w in weights]
    used = set()
    for room in (10_000, 6_000, 4_500, 3_000, 2_500):
        clusters(room)
        chosen = [i for i, w in enumerate(weights) if power.fits(w)]
        some, us = [weights[i] for i in chosen], [starts[i] for i in chosen]
        used |= {power._cluster_of(w) for w in some}
        assert_power_iteration(power.power_iteration(some, us, n_iter), some, us, n_iter)
    assert used == {1, 2, 4, 8}


def test_blocks_without_rows(clusters):
    clusters(5_000)
    w = weight_of_condition((17, 64), 3).float().to(DEVICE)  # blocks of 8 rows
    assert power._cluster_of(w) == 4
    start = F.initial_vector(w)
    assert_power_iteration(power.power_iteration([w], [start], 2), [w], [start], 2)


@pytest.mark.parametrize("room", [0, 10_000])
def test_any_order_of_threads_gives_the_same_bits(clusters, room):
    if room:
        clusters(room)
    weights = [
        weight_of_condition(s, 3).float().to(DEVICE) for s in ((70, 40), (24, 150), (13, 17))
    ]
    starts = [F.initial_vector(w) for w in weights]
    first, *others = cuda_kernels.in_every_order(lambda: power.power_iteration(weights, starts, 2))
    for other in others:
        for parts, expected in zip(other, first, strict=True):
            assert all(map(torch.equal, parts, expected))


@pytest.mark.parametrize("factor", [2.0**-149, 2.0**-130, 2.0**-40, 2.0**40, 2.0**120])
def test_any_magnitude_in_clusters(clusters, factor):
    clusters(10_000)
    for shape in ((70, 40), (5, 7)):
        w = ((weight_of_condition(shape, 3) * 100).round() * factor).float().to(DEVICE)
        sigma, *vectors = F.power_iteration(w, n_iter=3, backend="cuda")
        expected = F.power_iteration(w.double(), n_iter=3, backend="reference")
        assert float(expected[0]) > 0
        torch.testing.assert_close(sigma.double(), expected[0], rtol=1e-6, atol=2.0**-149)
        for part, reference in zip(vectors, expected[1:], strict=True):
            torch.testing.assert_close(part.double(), reference, rtol=0, atol=1e-6)


def test_what_float32_cannot_square():
    # The start has hardly any of the first direction; the third is hardly there at all.
    w = torch.diag(torch.tensor([1.0, 0.5, 1e-30, 3e-38], device=DEVICE))
    for start, sigma in (([0.0, 0, 1, 0], 1e-30), ([0, 0, 0, 1.0], 3e-38), ([1e-30, 0, 1, 0], 1.0)):
        u = torch.tensor(start, device=DEVICE)
        got = F.power_iteration(w, u, n_iter=2, backend="cuda")[0]
        torch.testing.assert_close(got, torch.tensor(sigma, device=DEVICE), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [*BAD_WEIGHTS])
def test_bad_weights(name):
    weights = [bad_weight(name, shape, torch.float32).to(DEVICE) for shape in ((13, 17), (40, 24))]
    sigmas, lefts, rights = F.power_iteration(weights, n_iter=4, backend="cuda")
    for w, sigma, u, v in zip(weights, sigmas, lefts, rights, strict=True):
        norm = torch.linalg.matrix_norm(w.double(), 2)
        assert 0 <= sigma.double() <= norm * (1 + 2.0**-23) + 2.0**-149, name  # rounded
        for vector in (u, v):
            length = torch.linalg.vector_norm(vector.double())
            assert (length == 0 and sigma == 0) or abs(length - 1) <= 1e-6, name


@by_dtype(NARROW)
def test_zero_nan_and_infinity_in_clusters(clusters, dtype):
    clusters(4_000)
    zero = torch.zeros(40, 33, device=DEVICE, dtype=dtype)
    assert power._cluster_of(zero) > 1
    sigma, u, v = F.power_iteration(zero, n_iter=2, backend="cuda")
    assert sigma == 0 and not u.any() and not v.any()
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = torch.randn(40, 33, device=DEVICE).to(dtype)
        w[-1, -1] = bad
        for part in F.power_iteration(w, n_iter=2, backend="cuda"):
            assert part.isnan().all()


def test_one_launch_for_all_rounds_and_clusters_of_a_size(monkeypatch, clusters):
    launches = []

    def counted(device, problems, count, *others):
        launches.append((count, others[-1]))

    monkeypatch.setattr(power, "_run", counted)
    weights = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    starts = [F.initial_vector(w) for w in weights]
    power.power_iteration(weights, starts, 7)
    assert launches == [(len(SHAPES) + 1, 1)]  # a batch of two
    launches.clear()
    clusters(9_000)
    power.power_iteration(weights, starts, 7)
    expected = collections.Counter()
    for w in weights:
        expected[power._cluster_of(w)] += len(w) if w.dim() == 3 else 1
    assert len(expected) > 1
    assert sorted(launches) == sorted((n, cluster) for cluster, n in expected.items())


def test_more_than_a_launch_takes():
    weights = torch.randn(150, 3, 5, device=DEVICE)
    got = F.power_iteration(weights, n_iter=2, backend="cuda")
    for k in (0, 63, 64, 149):
        alone = F.power_iteration(weights[k].clone(), n_iter=2, backend="cuda")
        assert all(torch.equal(part[k], one) for part, one in zip(got, alone, strict=True))


def test_what_is_too_large_goes_elsewhere(clusters):
    large = torch.randn(400, 130, device=DEVICE)
    clusters(20_000)
    assert not power.fits(large)
    assert not power.fits(large[:2, :2].double())
    if backends.why_not("triton", large.device) is not None:  # the reference computes it
        got = F.power_iteration([large, large[:9, :9]], n_iter=2, backend="cuda")
        expected = F.power_iteration([large, large[:9, :9]], n_iter=2, backend="reference")
        assert all(torch.equal(part[0], one[0]) for part, one in zip(got, expected, strict=True))
