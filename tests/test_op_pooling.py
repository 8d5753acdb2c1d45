"""L2-norm and average pooling against a loop over the windows."""

import math

import cases
import pytest
import tolerances
import torch
from cases import by_dtype, on_backends_by_dtype

from lipkernels import functional as F


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def slow_sum(x, kernel_size, stride, padding, ceil_mode):
    """Output sizes from torch's own average pool; sums by hand, zeros outside the image."""
    kernel, pad = pair(kernel_size), pair(padding)
    step = kernel if stride is None else pair(stride)
    if x.numel() == 0:
        return torch.nn.functional.avg_pool2d(x.double(), kernel, step, pad, ceil_mode)
    shape = torch.nn.functional.avg_pool2d(x, kernel, step, pad, ceil_mode).shape
    out = torch.zeros(shape, dtype=torch.float64)
    h, w = x.shape[-2:]
    for i in range(shape[-2]):
        for j in range(shape[-1]):
            top, left = i * step[0] - pad[0], j * step[1] - pad[1]
            rows = slice(max(top, 0), min(top + kernel[0], h))
            columns = slice(max(left, 0), min(left + kernel[1], w))
            out[..., i, j] = x[..., rows, columns].double().sum((-2, -1))
    return out


def slow_norm(x, **window):
    return slow_sum(x.double().square(), **window).sqrt()


@on_backends_by_dtype("l2_norm_pool2d")
def test_values(case, backend, dtype):
    x = case.input(dtype)
    y = case.call(x.to(cases.device_of(backend)), backend=backend)
    assert y.dtype == dtype
    limit = tolerances.POOL_VALUES[dtype]
    expected = slow_norm(x, **case.arguments)
    torch.testing.assert_close(y.double().cpu(), expected, rtol=limit, atol=0)


@on_backends_by_dtype("scaled_avg_pool2d")
def test_means(case, backend, dtype):
    x = case.input(dtype)
    y = case.call(x.to(cases.device_of(backend)), backend=backend)
    assert y.dtype == dtype
    window = {name: value for name, value in case.arguments.items() if name != "scale"}
    factor = case.arguments["scale"] / math.prod(pair(window["kernel_size"]))
    # A sum of terms that cancel: relative to that of their magnitudes. Torch rounds the mean too.
    error = (y.double().cpu() - factor * slow_sum(x, **window)).abs()
    limit = 2 * tolerances.POOL_VALUES[dtype]
    assert (error <= limit * factor * slow_sum(x.abs(), **window)).all()


def test_half_precision_squares_do_not_overflow():
    x = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)
    assert F.l2_norm_pool2d(x, 2).item() == 600.0
    x = torch.full((1, 1, 2, 2), 1e-4, dtype=torch.float16)
    assert F.l2_norm_pool2d(x, 2).item() == pytest.approx(2e-4, rel=1e-3)


def test_gradients():
    for case in cases.without_empty(cases.of("l2_norm_pool2d", "scaled_avg_pool2d")):
        if case.layout != "contiguous" or math.prod(case.shape) > 150:
            continue
        x = case.input(torch.float64).requires_grad_()

        def call(t, case=case):
            return case.call(t, **({"eps": 0.0} if case.op == "l2_norm_pool2d" else {}))

        assert torch.autograd.gradcheck(call, x), str(case)
        assert torch.autograd.gradgradcheck(call, x), str(case)


def test_eps_guards_the_gradient_as_stated():
    x = torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]], dtype=torch.float64, requires_grad=True)
    for eps in (0.0, 0.5, 5.0):
        y = F.l2_norm_pool2d(x, 2, eps=eps)
        assert y.item() == 5.0
        (grad,) = torch.autograd.grad(y, x)
        torch.testing.assert_close(grad, x.detach() / (5.0 + eps))


@by_dtype()
def test_gradient_of_an_empty_window_is_zero(dtype):
    x = torch.zeros(1, 1, 2, 4, dtype=dtype)
    x[..., 2:] = 1.0
    x.requires_grad_()
    F.l2_norm_pool2d(x, 2, eps=1e-20).sum().backward()
    assert not x.grad[..., :2].any()
    torch.testing.assert_close(x.grad[..., 2:], torch.full((1, 1, 2, 2), 0.5, dtype=dtype))


def test_the_mean_over_the_whole_image():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    y = F.scaled_avg_pool2d(x, None, scale=20**0.5)
    torch.testing.assert_close(y, x.sum((-2, -1), keepdim=True) / 20**0.5)
    torch.testing.assert_close(y, F.scaled_avg_pool2d(x, (5, 4), scale=20**0.5))
    assert torch.equal(F.scaled_avg_pool2d(x[0], None), x[0].mean((-2, -1), keepdim=True))


def test_means_of_half_precision_do_not_overflow():
    x = torch.full((1, 1, 16, 16), 300.0, dtype=torch.float16)
    for kernel in (16, None):
        assert F.scaled_avg_pool2d(x, kernel, scale=16.0).item() == 4800.0


def test_the_average_on_a_cpu_is_made_of_torchs_own_operations():
    x = torch.randn(4, 2, 3, 6, 6, dtype=torch.float64)
    for window in ((2,), (3, 2, 1), (None,)):

        def pool(t, window=window):
            return F.scaled_avg_pool2d(t, *window, scale=1.5)

        expected = torch.stack([pool(image) for image in x])
        torch.testing.assert_close(torch.func.vmap(pool)(x), expected)
        values, tangents = torch.func.jvp(pool, (x[0],), (x[1],))
        torch.testing.assert_close(values, expected[0])
        torch.testing.assert_close(tangents, expected[1])
