"""The named Bjorck iteration in Triton, against the reference in float64."""

import cases
import pytest
import torch

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]

VALUES = 2e-6  # 1e-6
GRADIENT = 5e-6  # 7e-7


@pytest.mark.parametrize(
    ("shape", "n_iter", "tol"),
    [((5, 8), 3, 0.0), ((9, 4), 15, 0.0), ((2, 4, 6), 5, 0.05), ((6, 6), 0, 0.0), ((5, 8), 9, 0.1)],
)
def test_values_and_gradients(shape, n_iter, tol):
    w = cases.weight_of_condition(shape, 20).float()
    narrow = w.to(DEVICE, copy=True).requires_grad_()
    wide = w.double().requires_grad_()
    gamma = torch.randn(shape)
    x, _ = F.bjorck(narrow, 1.5, n_iter=n_iter, tol=tol, beta=0.4, backend="triton")
    exact, _ = F.bjorck(wide, 1.5, n_iter=n_iter, tol=tol, beta=0.4, backend="reference")
    assert torch.linalg.svdvals(x.detach().double().cpu()).max() <= 1.5
    torch.testing.assert_close(x.double().cpu(), exact, rtol=0, atol=1.5 * VALUES)
    x.backward(gamma.to(DEVICE))
    exact.backward(gamma.double())
    difference = torch.linalg.norm(narrow.grad.double().cpu() - wide.grad)
    assert difference <= GRADIENT * torch.linalg.norm(wide.grad)


def test_half_precision_is_within_the_bound_and_near_the_reference():
    w = cases.weight_of_condition((5, 8), 20).to(torch.bfloat16)
    x, _ = F.bjorck(w.to(DEVICE), 1.5, n_iter=4, backend="triton")
    exact, _ = F.bjorck(w.double(), 1.5, n_iter=4, backend="reference")
    assert x.dtype == torch.bfloat16
    assert torch.linalg.svdvals(x.double().cpu()).max() <= 1.5
    assert (x.double().cpu() - exact).abs().max() <= 1.5 * torch.finfo(torch.bfloat16).eps
