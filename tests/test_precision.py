"""The precision of polar factors: what it may be, and who ignores it."""

import pytest
import torch

import lipkernels
from lipkernels import functional as F


def test_setting_and_context():
    assert lipkernels.get_polar_precision() == "high"
    lipkernels.set_polar_precision("fast")
    try:
        with lipkernels.polar_precision("high"):
            assert lipkernels.get_polar_precision() == "high"
        assert lipkernels.get_polar_precision() == "fast"
        with pytest.raises(KeyError), lipkernels.polar_precision("high"):
            raise KeyError
        assert lipkernels.get_polar_precision() == "fast"
    finally:
        lipkernels.set_polar_precision("high")


@pytest.mark.parametrize("precision", ["highest", "FAST", None, 1])
def test_others_are_refused(precision):
    with pytest.raises(ValueError, match=r"precision: expected one of \('high', 'fast'\), got"):
        lipkernels.set_polar_precision(precision)
    if precision is not None:  # the current one
        with pytest.raises(ValueError, match="precision: expected one of"):
            F.polar_factor(torch.eye(2), precision=precision)
    assert lipkernels.get_polar_precision() == "high"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_cpu_ignores_it(backend, dtype):
    w = torch.randn(5, 8).to(dtype)
    found = []
    for precision in ("high", "fast"):
        leaf = w.clone().requires_grad_()
        u = F.polar_factor(leaf, backend=backend, precision=precision)
        u.sum().backward()
        found.append((u.detach(), leaf.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
