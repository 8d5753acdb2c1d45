"""Average pooling in Triton against the reference: layouts, gradients, special values."""

import math

import cases
import pytest
import tolerances
import torch
from cases import by_dtype

pytest.importorskip("triton")

import lipkernels
import lipkernels.nn as lnn
from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels import avg_pooling as ops
from lipkernels.kernels.triton import pooling as kernels

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]
# (shape, kernel, stride, padding, ceil_mode): more than one program of each kind of plan.
LARGE = {
    "tiles": ((2, 3, 42, 36), 2, 2, 0, False),
    "rows": ((70, 3, 9, 7), None, None, 0, False),
    "windows": ((1, 3, 23, 31), 3, 2, 1, True),
}


def image(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def value_and_gradient(x, backend, *window, scale=1.3):
    x = x.detach().requires_grad_()
    y = F.scaled_avg_pool2d(x, *window, scale=scale, backend=backend)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    (gradient,) = torch.autograd.grad(y, x, weights)
    return y.detach(), gradient


def strides(x):
    """Of the dimensions that have more than one entry: others may have any."""
    return [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def assert_same(x, *window):
    """Values within a few roundings: the reference has one more, of the mean."""
    y, gradient = value_and_gradient(x, "triton", *window)
    expected, expected_gradient = value_and_gradient(x, "reference", *window)
    assert y.dtype == x.dtype and strides(y) == strides(expected)
    assert gradient.dtype == x.dtype
    limit = 4 * tolerances.POOL_VALUES[x.dtype]
    torch.testing.assert_close(y, expected, rtol=limit, atol=limit)
    torch.testing.assert_close(gradient, expected_gradient, rtol=limit, atol=limit)


@by_dtype()
def test_every_case(dtype):
    for case in cases.without_empty(cases.of("scaled_avg_pool2d")):
        window = {name: value for name, value in case.arguments.items() if name != "scale"}
        assert_same(case.input(dtype, device=DEVICE), *window.values())


@pytest.mark.parametrize("name", LARGE)
def test_many_programs(name):
    shape, *window = LARGE[name]
    assert_same(image(shape), *window)
    assert_same(image(shape, torch.float16).contiguous(memory_format=torch.channels_last), *window)


def test_the_image_is_not_kept_for_backward():
    x = image((1, 2, 4, 4)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.scaled_avg_pool2d(x, 2, backend="triton")
    assert kept == []


@pytest.mark.parametrize("special", [math.nan, math.inf, -0.0, 1e-40, 1e38])
def test_special_values(special):
    x = image((1, 2, 4, 4))
    x[0, 0, 1, 1] = special
    for layout in (torch.contiguous_format, torch.channels_last):
        case = x.contiguous(memory_format=layout)
        got = value_and_gradient(case, "triton", 2)
        for a, b in zip(got, value_and_gradient(case, "reference", 2), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_the_scale_of_float64_is_one():
    x = image((1, 1, 3, 3), torch.float64)
    for scale in (1 / 3, 1e-200):
        y, gradient = value_and_gradient(x, "triton", None, scale=scale)
        torch.testing.assert_close(y, x.mean((-2, -1), keepdim=True) * scale, rtol=1e-15, atol=0)
        torch.testing.assert_close(gradient, -torch.ones_like(x) * scale / 9, rtol=1e-15, atol=0)


def test_derivatives_of_any_order():
    for window in ((2,), (None,), (3, 2, 1)):  # a kernel of each kind
        x = image((1, 1, 4, 4), torch.float64).requires_grad_()

        def call(t, window=window):
            return F.scaled_avg_pool2d(t, *window, scale=0.7, backend="triton")

        assert torch.autograd.gradcheck(call, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


def test_ops_and_their_fakes_agree():
    pool = ([2, 3], [2, 2], [1, 0], True, 1.5)
    base = image((2, 4, 6, 8))
    for x in (base.contiguous(memory_format=torch.channels_last), base[0]):
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        torch.library.opcheck(ops.scaled_avg_pool2d, (x, *pool, "triton"))
        y = ops.scaled_avg_pool2d(x.detach(), *pool, "triton")
        grad = torch.ones_like(y).requires_grad_()
        call = (grad, list(x.shape), x.dim() == 4, *pool, "triton")
        torch.library.opcheck(ops.scaled_avg_pool2d_backward, call)


def test_layers_compiled():
    net = lnn.Sequential(lnn.ScaledAvgPool2d(2), lnn.ScaledAdaptiveAvgPool2d(), k_coef_lip=2.0)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for n in (3, 5):
        x = image((n, 2, 4, 6)).requires_grad_()
        with lipkernels.use_backend("triton"):
            y = compiled(x)
        (got,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y, net(x))
        torch.testing.assert_close(got, torch.full_like(x, 2.0 / 24**0.5))


def test_no_images():
    x = torch.empty((0, 3, 4, 4), device=DEVICE, requires_grad=True)
    y = F.scaled_avg_pool2d(x, 2, backend="triton")
    assert y.shape == (0, 3, 2, 2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == x.shape


def test_one_launch_each_way(monkeypatch):
    launched = []
    kind = type(kernels.GATHER["tiles"])
    run = kind.run

    def counted(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    value_and_gradient(image((1, 2, 4, 4)), "triton", 2)
    assert launched == ["gather_tiles", "spread_tiles"]
