"""L2-norm pooling in Triton against the reference: layouts, gradients, special values."""

import math

import cases
import pytest
import tolerances
import torch
from cases import by_dtype

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels import pooling as ops
from lipkernels.kernels.triton import pooling as kernels

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]
# (shape, kernel, stride, padding, ceil_mode): more than one program, and each kind of plan.
LARGE = {
    "tiles": ((3, 5, 42, 36), 2, 2, 0, False),
    "wide_tiles": ((1, 3, 20, 96), (5, 8), (5, 8), 0, False),
    "rows": ((70, 3, 9, 7), (9, 7), (9, 7), 0, False),
    "long_rows": ((1, 3, 33, 32), (33, 32), (33, 32), 0, False),
    "windows": ((2, 3, 23, 31), 3, 2, 1, False),
    "ceil": ((2, 5, 15, 17), (4, 3), (3, 2), (2, 1), True),
    "dense": ((1, 2, 21, 30), (3, 4), 1, (1, 2), False),
    "cut": ((2, 3, 17, 33), 2, 2, 0, False),
}


def image(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def arguments(kernel, stride, padding, ceil_mode):
    return {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}


def value_and_gradient(x, backend, **others):
    x = x.detach().requires_grad_()
    y = F.l2_norm_pool2d(x, backend=backend, **others)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    (gradient,) = torch.autograd.grad(y, x, weights)
    return y.detach(), gradient


def strides(x):
    """Of the dimensions that have more than one entry: others may have any."""
    return [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def assert_same(x, **others):
    y, gradient = value_and_gradient(x, "triton", **others)
    expected, expected_gradient = value_and_gradient(x, "reference", **others)
    assert y.dtype == x.dtype and strides(y) == strides(expected)
    limit = tolerances.POOL_VALUES[x.dtype]
    torch.testing.assert_close(y, expected, rtol=limit, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=4 * limit, atol=limit)


@by_dtype()
def test_every_case(dtype):
    for case in cases.without_empty(cases.of("l2_norm_pool2d")):
        assert_same(case.input(dtype, device=DEVICE), **case.arguments, eps=0.25)


@pytest.mark.parametrize("name", LARGE)
def test_many_programs(name):
    shape, *others = LARGE[name]
    x = image(shape)
    assert_same(x, **arguments(*others))
    assert_same(x.half().contiguous(memory_format=torch.channels_last), **arguments(*others))


def test_plans():
    def kind(shape, kernel, stride=None, padding=0, last=False):
        stride = kernel if stride is None else stride
        return kernels.plan(shape, [kernel] * 2, [stride] * 2, [padding] * 2, False, last, 4)[
            1
        ].kind

    assert kind((2, 3, 8, 8), 2) == kind((2, 3, 8, 8), 4) == kind((2, 3, 4, 4), 4) == "tiles"
    assert kind((2, 3, 8, 8), 8) == kind((2, 3, 7, 7), 7) == "rows"
    assert kind((2, 3, 9, 9), 2) == kind((2, 3, 9, 9), 3) == "windows"
    assert kind((2, 3, 8, 8), 2, 1) == kind((2, 3, 8, 8), 2, 2, 1) == "windows"
    assert kind((2, 3, 8, 8), 2, last=True) == kind((2, 3, 8, 8), 8, last=True) == "windows"


def test_layout_of_the_result_is_the_reference():
    base = image((2, 6, 8, 8))
    single = image((2, 1, 1, 8))
    for x in (
        base.contiguous(memory_format=torch.channels_last)[:, ::2],
        base.mT,
        base.transpose(0, 1),
        base.permute(0, 3, 2, 1),
        base[:, :1].contiguous(memory_format=torch.channels_last),
        base[:1].expand(2, 6, 8, 8),
        base[:, :, :1].contiguous(memory_format=torch.channels_last),
    ):
        assert_same(x, kernel_size=1 if x.shape[2] == 1 else 2)
    assert_same(single.contiguous(memory_format=torch.channels_last), kernel_size=(1, 2))
    assert_same(base[0].permute(2, 0, 1), kernel_size=(3, 2))


@pytest.mark.parametrize("special", [math.nan, math.inf, -0.0, 1e-30, 1e30])
@pytest.mark.parametrize("kernel", [2, 8])
def test_special_values_and_empty_windows(special, kernel):
    x = image((1, 2, 8, 8))
    x[:, :, :4, :4] = 0.0
    x[0, 0, 1, 1] = special
    for eps in (1e-6, 0.0):
        for layout in (torch.contiguous_format, torch.channels_last):
            case = x.contiguous(memory_format=layout)
            got = value_and_gradient(case, "triton", kernel_size=kernel, eps=eps)
            expected = value_and_gradient(case, "reference", kernel_size=kernel, eps=eps)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_eps_is_that_of_the_gradient_in_float64():
    x = torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]], dtype=torch.float64, device=DEVICE)
    for eps in (1e-6, 1 / 3, 5.0):
        _, gradient = value_and_gradient(x, "triton", kernel_size=2, eps=eps)
        torch.testing.assert_close(gradient, -x / (5 + eps), rtol=1e-15, atol=0)


def test_second_derivative():
    for kernel, stride, padding in ((2, 2, 0), (4, 4, 0), (3, 2, 1)):
        x = image((1, 1, 4, 4), torch.float64).requires_grad_()

        def call(t, others=(kernel, stride, padding)):
            return F.l2_norm_pool2d(t, *others, eps=0.0, backend="triton")

        assert torch.autograd.gradcheck(call, x)
        assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


def test_ops_and_their_fakes_agree():
    pool = ([2, 3], [2, 2], [1, 0], True)
    base = image((2, 4, 6, 8))
    for x in (base, base.contiguous(memory_format=torch.channels_last), base.mT, base[0]):
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        torch.library.opcheck(ops.l2_norm_pool2d, (x, *pool, 1e-6, "triton"))
        y = ops.l2_norm_pool2d(x.detach(), *pool, 1e-6, "triton")
        for backend in ("triton", "reference"):
            call = (torch.ones_like(y), x.detach(), y, *pool, 1e-6, backend)
            torch.library.opcheck(ops.l2_norm_pool2d_backward, call)


def test_compiled():
    def function(x):
        return F.l2_norm_pool2d(x * 2, 2, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (3, 5):
        x = image((n, 2, 4, 6)).requires_grad_()
        (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(got, 8 * x.detach(), rtol=1e-5, atol=1e-5)


def test_no_images():
    x = torch.empty((0, 3, 4, 4), device=DEVICE, requires_grad=True)
    y = F.l2_norm_pool2d(x, 2, backend="triton")
    assert y.shape == (0, 3, 2, 2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == x.shape


def test_offsets_beyond_32_bits(monkeypatch):
    # The same kernels with 64-bit offsets, of images that have none.
    settings = kernels.plan
    pool = ([2, 2], [2, 2], [0, 0], False, False, 4)
    assert settings((2**15, 2**15, 2, 2), *pool)[1].constants["LONG"]
    assert not settings((2**14, 2**14, 2, 2), *pool)[1].constants["LONG"]

    def with_long(*args):
        size, how = settings(*args)
        how.constants["LONG"] = True
        return size, how

    monkeypatch.setattr(kernels, "plan", with_long)
    for name in ("tiles", "rows", "windows"):
        shape, *others = LARGE[name]
        assert_same(image((2, *shape[1:])), **arguments(*others))
