"""The polar factor against the SVD: W = L S R^T has the polar factor L R^T."""

import cases
import pytest
import tolerances
import torch
from cases import FLOATS, by_dtype, on_backends_by_dtype

from lipkernels import functional as F


def oracle(w):
    left, _, right = torch.linalg.svd(w.double(), full_matrices=False)
    return left @ right


@on_backends_by_dtype("polar_factor")
def test_values(case, backend, dtype):
    w = case.input(dtype, device=cases.device_of(backend))
    u = case.call(w, backend=backend)
    assert u.shape == w.shape and u.dtype == dtype
    limit = tolerances.WEIGHT_VALUES["polar_factor"][dtype]
    torch.testing.assert_close(u.double().cpu(), oracle(w.cpu()), rtol=0, atol=limit)


@pytest.mark.parametrize("shape", [(8, 8), (6, 17), (15, 4), (32, 75), (3, 5, 9)])
@by_dtype((torch.float64, torch.float32))
def test_values_by_condition(shape, dtype):
    for condition, limit in tolerances.POLAR_BY_CONDITION[dtype].items():
        w = cases.weight_of_condition(shape, condition).to(dtype)
        difference = (F.polar_factor(w).double() - oracle(w)).abs().max().item()
        assert difference <= limit, condition


@pytest.mark.parametrize("shape", [(8, 8), (6, 17), (15, 4), (64, 64)])
@by_dtype()
def test_rows_or_columns_are_orthonormal(shape, dtype):
    for condition in (1, 10, 1000):
        w = cases.weight_of_condition(shape, condition).to(dtype)
        u = F.polar_factor(w).double()
        gram = u @ u.mT if shape[0] <= shape[1] else u.mT @ u
        error = torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=torch.float64), 2).item()
        assert error <= tolerances.ORTHOGONALITY[dtype]


@pytest.mark.parametrize("n", [16, 64, 200])
@by_dtype((torch.float16, torch.bfloat16))
def test_orthogonal_weights_keep_their_norm_in_half_precision(n, dtype):
    # Where every layer starts: an orthogonal weight, rounded to the module's dtype.
    w = torch.nn.init.orthogonal_(torch.empty(n, n), generator=torch.Generator().manual_seed(n))
    values = torch.linalg.svdvals(F.polar_factor(w.to(dtype)).double())
    assert values[0] <= 1
    assert values[0] >= 1 - torch.finfo(dtype).eps
    assert values[-1] >= 1 - 2 * torch.finfo(dtype).eps


def test_orthogonal_weights_are_fixed_points():
    w = oracle(cases.weight_of_condition((5, 9), 3))
    torch.testing.assert_close(F.polar_factor(w), w, rtol=0, atol=1e-13)
    torch.testing.assert_close(F.polar_factor(w.float()), w.float(), rtol=0, atol=1e-6)


def test_the_transpose_is_the_factor_of_the_transpose():
    # To rounding: a transposed view is copied first, so that equal values give equal bits.
    w = cases.weight_of_condition((5, 9), 10)
    torch.testing.assert_close(F.polar_factor(w.mT), F.polar_factor(w).mT, rtol=0, atol=1e-14)


def test_batch_of_conditions():
    # One member decides that the whole batch is decomposed in float64; each must still be right.
    members = [cases.weight_of_condition((4, 7), c, seed=i) for i, c in enumerate((1.0, 5.0, 1e4))]
    batch = torch.stack(members).float()
    torch.testing.assert_close(F.polar_factor(batch).double(), oracle(batch), rtol=0, atol=2e-6)


def test_zero_singular_directions_stay_zero():
    w = cases.weight_of_condition((5, 9), 3)
    w[4] = w[3]  # rank four
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    assert values[4] < 1e-12
    expected = left[:, :4] @ right[:4]
    torch.testing.assert_close(F.polar_factor(w), expected, rtol=0, atol=1e-7)
    u = F.polar_factor(w.float())
    assert u.isfinite().all()
    assert torch.linalg.svdvals(u.double())[0] <= 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scale_is_the_largest_singular_value(dtype):
    w = cases.weight_of_condition((6, 8), 10).to(dtype)
    for scale in (1e-2, 0.7, 3.0, 100.0):
        values = torch.linalg.svdvals(F.polar_factor(w, scale).double())
        slack = tolerances.WEIGHT_VALUES["polar_factor"][dtype]
        assert scale * (1 - slack) <= values[0] <= scale
