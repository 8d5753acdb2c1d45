"""Spectral normalization against the SVD, and power iteration against its definition."""

import math

import cases
import pytest
import tolerances
import torch
from cases import on_backends_by_dtype

from lipkernels import functional as F


def oracle(w):
    x = w.double()
    return x if x.numel() == 0 else x / torch.linalg.svdvals(x)[..., :1, None]


@on_backends_by_dtype("spectral_normalize")
def test_values(case, backend, dtype):
    w = case.input(dtype, device=cases.device_of(backend))
    x, u = case.call(w, backend=backend)
    assert x.shape == w.shape and x.dtype == dtype
    assert u.shape == w.shape[:-1]
    limit = tolerances.WEIGHT_VALUES["spectral_normalize"][dtype]
    torch.testing.assert_close(x.double().cpu(), oracle(w.cpu()), rtol=0, atol=limit)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (2, 4, 6)])
def test_steps_and_tolerance_do_not_change_the_result(shape):
    w = cases.weight_of_condition(shape, 10)
    left, _, _ = torch.linalg.svd(w)
    starts = [None, left[..., 0], left[..., 2], torch.zeros(shape[:-1]).double()]
    for u in starts:
        for n_iter, tol in ((0, 1e-3), (1, 1.0), (10, 1e-3), (200, 0.0)):
            x, new_u = F.spectral_normalize(w, u=u, n_iter=n_iter, tol=tol)
            torch.testing.assert_close(x, oracle(w), rtol=0, atol=1e-10)
            torch.testing.assert_close(new_u.abs(), left[..., 0].abs(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_spoiled_start_vector_does_not_spoil_the_result(bad):
    w = cases.weight_of_condition((4, 7), 10)
    u = torch.full((4,), bad, dtype=torch.float64)
    x, new_u = F.spectral_normalize(w, u=u)
    torch.testing.assert_close(x, oracle(w), rtol=0, atol=1e-10)
    assert new_u.isfinite().all()


def test_equal_singular_values():
    w = 3 * F.polar_factor(cases.weight_of_condition((5, 8), 10))
    x, _ = F.spectral_normalize(w)
    torch.testing.assert_close(x, w / 3, rtol=0, atol=1e-10)


def test_nearly_equal_singular_values():
    left, _, right = torch.linalg.svd(cases.weight_of_condition((3, 6), 2), full_matrices=False)
    for gap in (1e-3, 1e-7, 1e-12):
        w = (left * torch.tensor([1.0, 1.0 - gap, 0.5], dtype=torch.float64)) @ right
        x, _ = F.spectral_normalize(w, u=left[:, 1])  # the wrong one
        torch.testing.assert_close(x, w, rtol=0, atol=2e-10)


def test_vector_keeps_the_dtype_of_its_start():
    w = cases.weight_of_condition((4, 7), 10).float()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        _, u = F.spectral_normalize(w, u=torch.ones(4, dtype=dtype))
        assert u.dtype == dtype
    _, u = F.spectral_normalize(w)
    assert u.dtype == torch.float32
    assert not F.spectral_normalize(w.requires_grad_())[1].requires_grad


# ----------------------------------------------------------------------------- power iteration
@on_backends_by_dtype("power_iteration")
def test_power_iteration_converges_to_the_top_triplet(case, backend, dtype):
    w = case.input(dtype, device=cases.device_of(backend))
    # The interpreter is slow, and these singular values are far enough apart.
    n_iter = 80 if cases.is_interpreted(backend) else 400
    sigma, u, v = (t.double().cpu() for t in case.call(w, n_iter=n_iter, backend=backend))
    left, values, right = torch.linalg.svd(w.double().cpu(), full_matrices=False)
    limit = tolerances.POWER_ITERATION[torch.promote_types(dtype, torch.float32)]
    assert sigma.shape == w.shape[:-2]
    torch.testing.assert_close(sigma, values[..., 0], rtol=limit, atol=0)
    torch.testing.assert_close(u.abs(), left[..., 0].abs(), rtol=0, atol=100 * limit)
    torch.testing.assert_close(v.abs(), right[..., 0, :].abs(), rtol=0, atol=100 * limit)
    torch.testing.assert_close(
        (u.unsqueeze(-1) * v.unsqueeze(-2) * w.double().cpu()).sum((-2, -1)), sigma
    )


@pytest.mark.parametrize("n_iter", [0, 1, 2, 5])
def test_power_iteration_is_its_definition(n_iter):
    w = cases.weight_of_condition((4, 7), 10) * 5
    start = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    u = start / start.norm()
    v = w.T @ u
    v = v / v.norm()
    for _ in range(n_iter):
        v = w.T @ u
        v = v / v.norm()
        u = w @ v
        u = u / u.norm()
    got = F.power_iteration(w, start, n_iter=n_iter)
    for result, expected in zip(got, (u @ w @ v, u, v), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_power_iteration_estimates_from_below():
    for seed in range(20):
        w = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)).double()
        exact = torch.linalg.matrix_norm(w, 2)
        previous = 0.0
        for n_iter in (0, 1, 3, 10):
            sigma = F.power_iteration(w, n_iter=n_iter)[0]
            assert previous <= sigma * (1 + 1e-12) <= exact * (1 + 2e-12)
            previous = sigma


def test_power_iteration_is_not_differentiable():
    w = torch.randn(3, 4, requires_grad=True)
    assert not any(part.requires_grad for part in F.power_iteration(w))


def test_power_iteration_of_zero():
    sigma, u, v = F.power_iteration(torch.zeros(3, 4))
    assert sigma == 0 and not u.any() and not v.any()


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_power_iteration_at_any_magnitude(factor):
    w = cases.weight_of_condition((4, 7), 3).float()
    sigma, u, v = F.power_iteration(w * factor)
    expected, eu, ev = F.power_iteration(w)
    assert sigma == expected * factor
    assert torch.equal(u, eu) and torch.equal(v, ev)


def test_initial_vector_has_unit_norm_and_no_zero():
    for rows in (1, 2, 5, 1000):
        u = F.initial_vector(torch.empty(2, rows, 3))
        assert u.shape == (2, rows)
        torch.testing.assert_close(u.norm(dim=-1), torch.ones(2))
        assert (u > 0).all()
