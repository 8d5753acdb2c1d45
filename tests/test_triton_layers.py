"""Layers without weights on the Triton backend: eager, compiled and exported, as the reference."""

import pytest
import torch
from layer_table import LAYERS

pytest.importorskip("triton")

import lipkernels.nn as lnn
from lipkernels import backends, use_backend

DEVICE = "cpu" if backends.is_interpreted() else "cuda"
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]
NAMES = ("Invertible", "GroupSort", "FullSort", "ScaledL2Norm", "ScaledAdaptiveL2Norm")
WEIGHTLESS = [layer for layer in LAYERS if layer.name.startswith(NAMES)]


def run(function, x):
    """The output and the input's gradient."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, x, weights)[0]


@pytest.mark.parametrize("layer", WEIGHTLESS, ids=str)
def test_layer(layer):
    module, x = layer.make(k_coef_lip=0.5).to(DEVICE), layer.input().to(DEVICE)
    with use_backend("reference"):
        expected = run(module, x)
    torch._dynamo.reset()
    with use_backend("triton"):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for function in (module, compiled):
            for got, value in zip(run(function, x), expected, strict=True):
                torch.testing.assert_close(got, value, rtol=2e-6, atol=1e-6)
        program = torch.export.export(module.eval(), (x,)).module()
        torch.testing.assert_close(program(x), expected[0], rtol=2e-6, atol=1e-6)
    torch._dynamo.reset()


def test_net_under_autocast():
    net = lnn.Sequential(
        lnn.InvertibleDownSampling(2),
        lnn.GroupSort2(),
        lnn.ScaledL2NormPool2d(2),
        lnn.FullSort(),
        lnn.InvertibleUpSampling(2, mode="DCR"),
    )
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype=dtype):
            with use_backend("reference"):
                expected = run(net, x.to(dtype))
            with use_backend("triton"):
                got = run(net, x.to(dtype))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
