"""Invertible sampling against its index formula, one element at a time."""

import itertools

import cases
import pytest
import torch
from cases import ANY_DTYPE, FLOATS, by_dtype, on_backends

from lipkernels import functional as F


def raw(x):
    """Comparable bits: torch compares no 8-bit floats."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 and x.dtype.is_floating_point else x


def pair(block):
    return (block, block) if isinstance(block, int) else block


def slow_space_to_depth(x, block, mode):
    ph, pw = pair(block)
    n, c, h, w = x.shape
    out = torch.empty(n, c * ph * pw, h // ph, w // pw, dtype=x.dtype)
    for s, k, i, j in itertools.product(range(n), range(c), range(h), range(w)):
        a, d = i % ph, j % pw
        channel = k * ph * pw + a * pw + d if mode == "CRD" else (a * pw + d) * c + k
        out[s, channel, i // ph, j // pw] = x[s, k, i, j]
    return out


def slow_depth_to_space(x, block, mode):
    ph, pw = pair(block)
    n, channels, h, w = x.shape
    c = channels // (ph * pw)
    out = torch.empty(n, c, h * ph, w * pw, dtype=x.dtype)
    for s, k, i, j in itertools.product(range(n), range(c), range(h * ph), range(w * pw)):
        a, d = i % ph, j % pw
        channel = k * ph * pw + a * pw + d if mode == "CRD" else (a * pw + d) * c + k
        out[s, k, i, j] = x[s, channel, i // ph, j // pw]
    return out


SLOW = {"space_to_depth": slow_space_to_depth, "depth_to_space": slow_depth_to_space}
SAMPLING = ("space_to_depth", "depth_to_space")


@on_backends(*SAMPLING)
def test_values(case, backend):
    x = case.input(torch.float32)
    expected = SLOW[case.op](x, **case.arguments)
    moved = x.to(cases.device_of(backend))
    assert torch.equal(case.call(moved, backend=backend).cpu(), expected)
    last = case.call(
        moved.movedim(1, -1).contiguous(), data_format="channels_last", backend=backend
    )
    assert torch.equal(last.cpu(), expected.movedim(1, -1))
    assert last.is_contiguous()
    view = case.call(moved.movedim(1, -1), data_format="channels_last", backend=backend)
    assert torch.equal(view, last)


@pytest.mark.parametrize("op", SAMPLING)
@by_dtype(ANY_DTYPE)
def test_every_dtype(op, dtype):
    for case in cases.without_empty(cases.of(op)):
        x = case.input(dtype)
        y = case.call(x)
        assert y.dtype == dtype
        assert torch.equal(raw(y), SLOW[op](raw(x), **case.arguments))


@pytest.mark.parametrize("mode", ["CRD", "DCR"])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_each_is_the_inverse_of_the_other(mode, data_format):
    x = torch.randn(2, 12, 6, 12)
    settings = {"mode": mode, "data_format": data_format}
    for block in (1, 2, (3, 1), (2, 6)):
        down = F.space_to_depth(x, block, scale=2.0, **settings)
        assert torch.equal(F.depth_to_space(down, block, scale=0.5, **settings), x)
    up = F.depth_to_space(x, 2, **settings)
    assert torch.equal(F.space_to_depth(up, 2, **settings), x)


def test_torch_and_numpy_agree():
    x = torch.randn(2, 3, 4, 6)
    down = F.space_to_depth(x, 2)
    assert torch.equal(down, torch.nn.functional.pixel_unshuffle(x, 2))
    assert torch.equal(F.depth_to_space(down, 2), torch.nn.functional.pixel_shuffle(down, 2))


@pytest.mark.parametrize("op", SAMPLING)
@by_dtype(FLOATS)
def test_scale(op, dtype):
    case = cases.Case(op, "scaled", (1, 8, 4, 4), arguments={"block": 2})
    x = case.input(dtype)
    y = case.call(x, scale=0.37)
    assert y.dtype == dtype
    torch.testing.assert_close(y, case.call(x) * 0.37, rtol=0, atol=0)


@pytest.mark.parametrize("op", SAMPLING)
@by_dtype((torch.int64, torch.uint8, torch.bool))
def test_scale_of_an_integer_image_raises(op, dtype):
    x = torch.ones(1, 4, 2, 2, dtype=dtype)
    with pytest.raises(TypeError, match=r"floating-point.*scale.*got"):
        getattr(F, op)(x, 2, scale=0.5)


@pytest.mark.parametrize("op", SAMPLING)
def test_gradients(op):
    for case in cases.without_empty(cases.of(op)):
        if case.layout != "contiguous" or len(case.shape) > 4:
            continue
        x = case.input(torch.float64).requires_grad_()

        def call(t, case=case):
            return case.call(t, scale=0.7)

        assert torch.autograd.gradcheck(call, x)
        assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("op", SAMPLING)
def test_gradient_is_the_scaled_inverse(op):
    inverse = {"space_to_depth": F.depth_to_space, "depth_to_space": F.space_to_depth}[op]
    for mode in ("CRD", "DCR"):
        for data_format in ("channels_first", "channels_last"):
            x = torch.randn(2, 12, 6, 12, requires_grad=True)
            settings = {"mode": mode, "data_format": data_format, "scale": 0.5}
            y = getattr(F, op)(x, (2, 3), **settings)
            grad = torch.randn_like(y)
            y.backward(grad)
            assert torch.equal(x.grad, inverse(grad, (2, 3), **settings))
