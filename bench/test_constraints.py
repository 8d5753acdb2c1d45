"""Forward and backward of one constrained weight, by constraint and shape: `make bench`."""

import pytest
import torch

import lipkernels.nn as lnn

SHAPES = ((64, 576), (256, 256), (256, 2304))
CONSTRAINTS = {
    "polar": {},
    "spectral": {"eps_bjorck": None},
    "bjorck_15": {"maxiter_bjorck": 15},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_forward_and_backward(benchmark, constraint, shape):
    torch.manual_seed(0)
    rows, cols = shape
    layer = lnn.SpectralLinear(cols, rows, bias=False, **CONSTRAINTS[constraint])
    grad = torch.randn(shape)
    benchmark(lambda: layer.weight.backward(grad))
    weight = layer.weight.detach().double()
    benchmark.extra_info["norm"] = torch.linalg.matrix_norm(weight, 2).item()
    assert benchmark.extra_info["norm"] <= 1.0
