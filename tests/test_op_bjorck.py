"""The named Bjorck iteration against an unrolled loop in float64."""

import cases
import pytest
import tolerances
import torch
from cases import on_backends_by_dtype

from lipkernels import functional as F


def oracle(w, beta=0.5, n_iter=15, tol=0.0):
    x = w.double()
    if x.numel() == 0:
        return x
    x = x / torch.linalg.svdvals(x)[..., :1, None]
    for _ in range(n_iter):
        step = (1 + beta) * x - beta * x @ x.mT @ x
        if (torch.linalg.matrix_norm(step - x) <= tol).all():
            break
        x = step
    return x


@on_backends_by_dtype("bjorck")
def test_values(case, backend, dtype):
    w = case.input(dtype, device=cases.device_of(backend))
    # In the interpreter, which hands float64 on to the reference; test_triton_bjorck.py has all 15.
    n_iter = 4 if cases.is_interpreted(backend) and dtype != torch.float64 else 15
    x, u = case.call(w, n_iter=n_iter, backend=backend)
    assert x.shape == w.shape and x.dtype == dtype
    assert u.shape == w.shape[:-1]
    limit = tolerances.WEIGHT_VALUES["bjorck"][dtype]
    torch.testing.assert_close(x.double().cpu(), oracle(w.cpu(), n_iter=n_iter), rtol=0, atol=limit)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6), (2, 3, 5)])
@pytest.mark.parametrize("beta", [0.5, 0.25, 0.03])
@pytest.mark.parametrize("n_iter", [0, 1, 2, 3, 7, 30])
def test_beta_and_steps(shape, beta, n_iter):
    w = cases.weight_of_condition(shape, 20)
    x, _ = F.bjorck(w, beta=beta, n_iter=n_iter)
    torch.testing.assert_close(x, oracle(w, beta, n_iter), rtol=0, atol=1e-10)


def test_tolerance_stops_the_iteration():
    w = cases.weight_of_condition((5, 8), 20)
    for tol in (1.0, 0.1, 1e-3):
        x, _ = F.bjorck(w, n_iter=100, tol=tol)
        torch.testing.assert_close(x, oracle(w, n_iter=100, tol=tol), rtol=0, atol=1e-10)
    assert not torch.allclose(F.bjorck(w, n_iter=100, tol=0.1)[0], F.bjorck(w, n_iter=100)[0])


def test_many_steps_reach_the_polar_factor():
    w = cases.weight_of_condition((5, 8), 10)
    torch.testing.assert_close(F.bjorck(w, n_iter=40)[0], F.polar_factor(w), rtol=0, atol=1e-12)


def test_no_step_is_spectral_normalization():
    w = cases.weight_of_condition((5, 8), 10)
    expected, u = F.spectral_normalize(w)
    x, v = F.bjorck(w, n_iter=0)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
    assert torch.equal(u, v)


def test_the_start_vector_changes_nothing():
    w = cases.weight_of_condition((5, 8), 10)
    expected, _ = F.bjorck(w, n_iter=3)
    left, _, _ = torch.linalg.svd(w)
    for u in (left[:, 0], left[:, 4], -left[:, 1], torch.zeros(5).double()):
        x, v = F.bjorck(w, n_iter=3, u=u, n_iter_spectral=1)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(v.abs(), left[:, 0].abs(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n_iter", [1, 4, 15])
def test_no_singular_value_exceeds_the_scale(n_iter):
    for condition in (1, 10, 1e6):
        for dtype in cases.FLOATS:
            w = cases.weight_of_condition((6, 9), condition).to(dtype)
            for beta in (0.5, 0.1):
                x, _ = F.bjorck(w, 0.8, beta=beta, n_iter=n_iter)
                assert torch.linalg.svdvals(x.double())[0] <= 0.8
