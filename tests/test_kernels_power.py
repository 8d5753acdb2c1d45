"""Power iteration by kernels for GPUs: the reference, any magnitude and start; bits in lists."""

import pytest
import torch
from cases import by_dtype, device_of, is_interpreted, on_gpu_backends, weight_of_condition
from kernel_data import assert_power_iteration

from lipkernels import functional as F

on_kernels = on_gpu_backends("power_iteration")
NARROW = (torch.float32, torch.bfloat16, torch.float16)
# One tile and several, of which one is full.
SHAPES = [(70, 40), (20, 150), (2, 33, 20), (32, 128), (5, 7), (9, 2), (1, 30), (30, 1), (1, 1)]


@on_kernels
@by_dtype(NARROW)
@pytest.mark.parametrize("n_iter", [0, 1, 2, 5])
def test_reference(dtype, n_iter, backend):
    weights = [weight_of_condition(s, 3).to(dtype).to(device_of(backend)) for s in SHAPES]
    starts = [F.initial_vector(w).flip(-1) * (i + 1) for i, w in enumerate(weights)]
    got = F.power_iteration(weights, starts, n_iter=n_iter, backend=backend)
    assert_power_iteration(got, weights, starts, n_iter)


@on_kernels
@pytest.mark.parametrize("factor", [2.0**-149, 2.0**-130, 2.0**-40, 2.0**40, 2.0**120])
def test_any_magnitude(factor, backend):
    for shape in ((70, 40), (5, 7)):
        w = ((weight_of_condition(shape, 3) * 100).round() * factor).float().to(device_of(backend))
        sigma, *vectors = F.power_iteration(w, n_iter=3, backend=backend)
        expected = F.power_iteration(w.double(), n_iter=3, backend="reference")
        assert float(expected[0]) > 0
        torch.testing.assert_close(sigma.double(), expected[0], rtol=1e-6, atol=2.0**-149)
        for part, reference in zip(vectors, expected[1:], strict=True):
            torch.testing.assert_close(part.double(), reference, rtol=0, atol=1e-6)


@on_kernels
@by_dtype((torch.float64, torch.float32, torch.bfloat16))
def test_any_start(dtype, backend):
    device = device_of(backend)
    w = weight_of_condition((6, 9), 3).float().to(device)
    direction = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 1.0], device=device)
    expected = F.power_iteration(w.double(), direction.double(), n_iter=2, backend="reference")
    for size in (1.0, 2.0**-120, 2.0**120, 2.0**-900, 2.0**900):
        start = (direction.double() * size).to(dtype)
        if not start.isfinite().all() or not start.any():
            continue
        before = start.clone()
        got = F.power_iteration(w, start, n_iter=2, backend=backend)
        assert torch.equal(start, before)
        for part, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(part.double(), reference, rtol=1e-6, atol=1e-6)


@on_kernels
@by_dtype(NARROW)
@pytest.mark.parametrize("shape", [(3, 4), (40, 33)])
def test_zero_nan_and_infinity(shape, dtype, backend):
    zero = torch.zeros(shape, device=device_of(backend), dtype=dtype)
    sigma, u, v = F.power_iteration(zero, n_iter=2, backend=backend)
    assert sigma == 0 and not u.any() and not v.any()
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = torch.randn(shape).to(zero)
        w[-1, -1] = bad
        for part in F.power_iteration(w, n_iter=2, backend=backend):
            assert part.isnan().all()


@on_kernels
@pytest.mark.parametrize("n_iter", [0, 3])
def test_a_list_is_bitwise_its_members(n_iter, backend):
    shapes = SHAPES[:6] if is_interpreted(backend) else SHAPES
    weights = [torch.randn(shape, device=device_of(backend)) for shape in shapes]
    weights[0] = weights[0].mT.contiguous().mT
    storage = torch.randn(3 + 70 * 40, device=weights[0].device)
    weights.append(storage[3:].view(70, 40))  # no 16 bytes at a time
    together = F.power_iteration(weights, n_iter=n_iter, backend=backend)
    for i, w in enumerate(weights):
        alone = F.power_iteration(w.clone(), n_iter=n_iter, backend=backend)
        for part, expected in zip(together, alone, strict=True):
            assert torch.equal(part[i], expected)


@on_kernels
def test_estimates_from_below(backend):
    for shape in ((6, 9), (40, 33)):
        w = torch.randn(shape, device=device_of(backend))
        exact = torch.linalg.matrix_norm(w.double(), 2)
        previous = 0.0
        for n_iter in (0, 1, 3, 10):
            sigma = F.power_iteration(w, n_iter=n_iter, backend=backend)[0].double()
            # What float32 rounds.
            assert previous * (1 - 1e-7) <= sigma <= exact * (1 + 1e-7)
            previous = sigma
