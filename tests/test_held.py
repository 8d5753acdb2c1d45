"""Linear layers with held weights: gradients of the products against projected gradients."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import lipkernels.nn as lnn
from lipkernels import functional as F
from lipkernels.reference import retract as reference

# (batch, in, out): which way is the cheapest depends on all three.
SIZES = {
    "wide": (7, 40, 12),
    "wide-tiny-batch": (2, 20, 16),
    "wide-large-batch": (200, 40, 12),
    "tall": (7, 12, 40),
    "tall-tiny-batch": (1, 16, 20),
    "square": (3, 16, 16),
    "square-half": (9, 16, 16),
    "one-output": (5, 8, 1),
    "one-input": (5, 1, 8),
    "empty-batch": (0, 6, 4),
}


def held_layer(inputs, outputs, k=1.5, dtype=torch.float64, **keywords):
    torch.manual_seed(0)
    layer = lnn.SpectralLinear(inputs, outputs, k_coef_lip=k, dtype=dtype, **keywords)
    layer.condense()
    layer.hold()
    assert layer.is_held()
    return layer


def expected(layer, x, delta):
    """The gradients by the definition: of x, of the raw weight, of the bias."""
    raw, flat = layer.raw_weight.detach(), delta.reshape(-1, delta.shape[-1])
    whole = flat.mT @ x.detach().reshape(-1, x.shape[-1])
    return delta @ raw, F.project_tangent(whole, raw, layer.matrix_scale()), flat.sum(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("for_input", [True, False])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_gradients(size, for_input, bias):
    batch, inputs, outputs = size
    layer = held_layer(inputs, outputs, bias=bias)
    x = torch.randn(batch, inputs, dtype=torch.float64, requires_grad=for_input)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.raw_weight, layer.bias))
    delta = torch.randn_like(y)
    y.backward(delta)
    d_x, d_raw, d_bias = expected(layer, x, delta)
    torch.testing.assert_close(layer.raw_weight.grad, d_raw)
    assert (x.grad is None) != for_input
    if for_input:
        torch.testing.assert_close(x.grad, d_x)
    if bias:
        torch.testing.assert_close(layer.bias.grad, d_bias)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 0, 12)])
def test_any_number_of_leading_dimensions(shape):
    layer = held_layer(12, 10)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 10)
    delta = torch.randn_like(y)
    y.backward(delta)
    d_x, d_raw, d_bias = expected(layer, x, delta)
    for found, exact in ((x.grad, d_x), (layer.raw_weight.grad, d_raw), (layer.bias.grad, d_bias)):
        torch.testing.assert_close(found, exact)


def test_every_way_gives_the_projection():
    torch.manual_seed(0)
    chosen = set()
    for batch, inputs, outputs in SIZES.values():
        w = 0.5 * F.polar_factor(torch.randn(outputs, inputs, dtype=torch.float64))
        a = torch.randn(batch, outputs, dtype=torch.float64)
        b = torch.randn(batch, inputs, dtype=torch.float64)
        exact = reference.project(a.mT @ b, w, 0.5)
        for c in (None, b @ w.mT):
            for d in (None, a @ w):
                found = reference.project_product(a, b, c, d, w, 0.5)
                torch.testing.assert_close(found, exact)
        costs = reference._multiplications(batch, *sorted((outputs, inputs)))
        chosen.add(min(costs, key=costs.__getitem__))
    assert chosen == set(costs)


def test_float32_keeps_its_digits_beside_a_large_bias():
    # The outputs, bias included, would give the projection about 1e-3 here.
    layer = held_layer(48, 32, dtype=torch.float32)
    with torch.no_grad():
        layer.bias.fill_(1e4)
    x = torch.randn(8, 48)
    y = layer(x)
    delta = torch.randn_like(y)
    y.backward(delta)
    _, exact, _ = expected(layer.double(), x.double(), delta.double())
    error = (layer.raw_weight.grad.double() - exact).norm() / exact.norm()
    assert error <= 1e-6


def test_gradients_of_gradients():
    held, free = held_layer(10, 8), lnn.SpectralLinear(10, 8, k_coef_lip=1.5, dtype=torch.float64)
    free.load_state_dict(held.state_dict())
    free.condense()
    found = []
    for layer in (held, free):
        x = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(3, 10).requires_grad_()
        (grad,) = torch.autograd.grad(torch.cos(layer(x)).sum(), x, create_graph=True)
        (grad.square().sum() + layer(x).square().sum()).backward()
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    assert held.is_held()
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-7)


def test_one_weight_used_twice():
    layer = held_layer(10, 10)
    x = torch.randn(3, 10, dtype=torch.float64)
    h = layer(x)
    h.retain_grad()
    y = layer(torch.tanh(h))
    delta = torch.randn_like(y)
    y.backward(delta)
    _, first, _ = expected(layer, x, h.grad)
    _, second, _ = expected(layer, torch.tanh(h), delta)
    torch.testing.assert_close(layer.raw_weight.grad, first + second)


@pytest.mark.parametrize("k", [1e-30, 1e-3, 1e3, 1e30])
def test_extreme_constants(k):
    layer = held_layer(16, 12, k=k, dtype=torch.float32)
    x = torch.randn(4, 16)
    delta = torch.randn(4, 12)
    layer(x).backward(delta)
    exact = F.project_tangent((delta.mT @ x).double(), layer.raw_weight.detach().double(), k)
    error = (layer.raw_weight.grad.double() - exact).norm() / exact.norm()
    assert error <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_projected_in_float32(dtype):
    layer = held_layer(16, 12, dtype=dtype)
    x = torch.randn(4, 16).to(dtype)
    y = layer(x)
    delta = torch.randn_like(y)
    y.backward(delta)
    _, exact, _ = expected(layer, x, delta)
    assert torch.equal(layer.raw_weight.grad, exact)


def test_forward_mode_and_transforms_pass_through_held_weights():
    layer = held_layer(6, 4)
    x, v = torch.randn(2, 3, 6, dtype=torch.float64)
    along = v @ layer.raw_weight.detach().mT
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, along)
    _, pushed = torch.func.jvp(layer, (x,), (v,))
    torch.testing.assert_close(pushed, along, rtol=1e-6, atol=1e-6)


def test_wrong_inputs_raise_as_ever():
    layer = held_layer(6, 4)
    with pytest.raises(ValueError, match="expected 6 entries"):
        layer(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.zeros(2, 6))
