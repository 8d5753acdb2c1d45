"""Frobenius normalization against sums of squares in Python's exact arithmetic."""

import math

import cases
import pytest
import tolerances
import torch
from cases import by_dtype, on_backends_by_dtype

from lipkernels import functional as F


def slow(matrix, per_row):
    """``matrix``: list of rows of floats."""
    norms = [math.sqrt(math.fsum(x * x for x in row)) for row in matrix]
    if not per_row:
        norms = [math.sqrt(math.fsum(n * n for n in norms))] * len(matrix)
    return [[x / n for x in row] for row, n in zip(matrix, norms, strict=True)]


def oracle(w, per_row=False):
    if w.numel() == 0:
        return w.double()
    blocks = w.double().reshape(-1, *w.shape[-2:])
    return torch.tensor([slow(b.tolist(), per_row) for b in blocks], dtype=torch.float64).reshape(
        w.shape
    )


@on_backends_by_dtype("frobenius_normalize")
@pytest.mark.parametrize("per_row", [False, True])
def test_values(case, backend, dtype, per_row):
    w = case.input(dtype, device=cases.device_of(backend))
    x = case.call(w, per_row=per_row, backend=backend)
    assert x.shape == w.shape and x.dtype == dtype
    limit = tolerances.WEIGHT_VALUES["frobenius_normalize"][dtype]
    torch.testing.assert_close(x.double().cpu(), oracle(w.cpu(), per_row), rtol=0, atol=limit)


def test_rows_of_very_different_magnitudes():
    w = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0], [5.0, 0.0]])
    x = F.frobenius_normalize(w, per_row=True)
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


@by_dtype()
def test_norm_is_the_scale_and_never_more(dtype):
    for seed in range(30):
        w = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for scale in (0.3, 1.0, 7.0):
            eps = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 1e-12)
            norm = F.frobenius_normalize(w, scale).double().norm()
            assert scale * (1 - 2 * eps) <= norm <= scale
            norms = F.frobenius_normalize(w, scale, per_row=True).double().norm(dim=1)
            assert (norms <= scale).all() and (norms >= scale * (1 - 2 * eps)).all()
