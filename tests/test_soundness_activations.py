"""No activation exceeds its k: Jacobians at random points, and pairs of points, in float64."""

import math

import pytest
import torch
from operator_norm import assert_within, jacobian, operator_norm
from tolerances import ATTAINED, CERTIFIED, PAIRS

import lipkernels.nn as lnn
from lipkernels.certify import lipschitz_bound
from lipkernels.nn.module import LipschitzModule

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def householder(**keywords):
    layer = lnn.HouseHolder(6, **keywords).double()
    layer.theta.data.uniform_(-10, 10)
    return layer


def lprelu(slope, num_parameters=1, **keywords):
    return lnn.LPReLU(num_parameters, slope, **keywords).double()


def lprelu_of_channels(**keywords):
    layer = lnn.LPReLU(6, **keywords).double()
    layer.weight.data.copy_(torch.tensor([-9.0, -1.0, -0.3, 0.0, 0.5, 4.0]))
    return layer


ACTIVATIONS = {
    "group_sort_2": lambda **kw: lnn.GroupSort2(**kw),
    "group_sort_3": lambda **kw: lnn.GroupSort(3, **kw),
    "full_sort": lambda **kw: lnn.FullSort(**kw),
    "max_min": lambda **kw: lnn.MaxMin(**kw),
    "abs": lambda **kw: lnn.Abs(**kw),
    "householder": householder,
    "lprelu": lambda **kw: lprelu(0.25, **kw),
    "lprelu_slope_4": lambda **kw: lprelu(4.0, **kw),
    "lprelu_slope_minus_4": lambda **kw: lprelu(-4.0, **kw),
    "lprelu_of_channels": lprelu_of_channels,
}
SHAPES = ((1, 6), (1, 6, 3))
KS = (1.0, 0.5, 3.0, 1e-3)

each_activation = pytest.mark.parametrize("name", ACTIVATIONS)


@pytest.mark.parametrize("k", KS)
@each_activation
def test_jacobians(name, k):
    """At random points, differentiable almost surely, the norm is k or less; somewhere it is k."""
    best = 0.0
    for training in (True, False):
        layer = ACTIVATIONS[name](k_coef_lip=k).train(training)
        for shape in SHAPES:
            for scale in (1e-3, 1.0, 50.0):
                matrix = jacobian(layer, torch.randn(shape, dtype=F64) * scale)
                assert_within(matrix, k, (shape, scale))
                best = max(best, operator_norm(matrix))
    assert best >= k * (1 - ATTAINED[F64])


@pytest.mark.parametrize("k", KS)
@each_activation
def test_pairs(name, k):
    """Far pairs and close ones, across every crease, and with many ties."""
    layer = ACTIVATIONS[name](k_coef_lip=k)
    n = 20_000
    x = torch.randn(n, 6, dtype=F64)
    x[: n // 4] = x[: n // 4].round()  # ties and zeros
    distance = 10.0 ** torch.empty(n, 1, dtype=F64).uniform_(-4, 1)
    y = x + distance * torch.randn(n, 6, dtype=F64)
    y[::5] = -x[::5]
    y[1::5] = x[1::5].flip(-1)
    # A thousand values near 50 lose 1e-14; pairs are at least 1e-5 apart, or equal.
    moved = (layer(x) - layer(y)).norm(dim=1)
    allowed = k * (x - y).norm(dim=1)
    slack = allowed * PAIRS + k * 64 * torch.finfo(F64).eps * (x.norm(dim=1) + y.norm(dim=1))
    assert (moved <= allowed + slack).all()


@each_activation
def test_constant_is_set_at_once(name):
    layer = ACTIVATIONS[name]()
    x = torch.randn(4, 6, dtype=F64)
    one = layer(x).detach()
    layer.set_klip_factor(0.5)
    assert isinstance(layer, LipschitzModule)
    assert layer.k_coef_lip == 0.5
    torch.testing.assert_close(layer(x), 0.5 * one)
    assert lipschitz_bound(layer).value == 0.5


@each_activation
def test_exports_are_as_sound(name):
    for k in (1.0, 0.5):
        layer = ACTIVATIONS[name](k_coef_lip=k)
        exported = layer.vanilla_export()
        x = torch.randn(5, 6, dtype=F64)
        torch.testing.assert_close(exported(x), layer(x))
        assert_within(jacobian(exported, x[:1]), k)
        if name != "householder":  # its graph has no rule: refused, see test_certify.py
            assert k <= lipschitz_bound(exported).value <= k * (1 + CERTIFIED)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_any_dimension(dim):
    shape = [3, 3, 3]
    shape[dim] = 6
    x = torch.randn(shape, dtype=F64)
    y = x + 0.5 * torch.randn_like(x)
    layers = [
        lnn.GroupSort2(dim=dim),
        lnn.GroupSort(3, dim=dim),
        lnn.FullSort(dim=dim),
        lnn.MaxMin(dim),
        lnn.HouseHolder(6, dim=dim).double(),
    ]
    for layer in layers:
        assert (layer(x) - layer(y)).norm() <= (x - y).norm() * (1 + PAIRS)
        assert_within(jacobian(layer, x), 1.0, (layer, dim))


def test_householder_reflects_for_every_angle():
    """Continuous across the mirror line, an isometry on either side: pairs beside the line."""
    for theta in torch.linspace(-7, 7, 57, dtype=F64):
        layer = lnn.HouseHolder(2).double()
        layer.theta.data.fill_(theta)
        along = torch.tensor([math.cos(theta / 2), math.sin(theta / 2)], dtype=F64)
        across = torch.tensor([-along[1], along[0]], dtype=F64)
        for t in (-3.0, 0.7, 2.0):
            x = (t * along + 1e-3 * across)[None]
            y = (t * along - 1e-3 * across)[None]
            assert (layer(x) - layer(y)).norm() <= 2e-3 * (1 + 1e-9)
            for point in (x, y):
                values = torch.linalg.svdvals(jacobian(layer, point))
                torch.testing.assert_close(values, torch.ones(2, dtype=F64))


def test_max_min_doubles_and_keeps_the_norm():
    x = torch.randn(7, 5, dtype=F64)
    y = lnn.MaxMin(k_coef_lip=0.5)(x)
    assert y.shape == (7, 10)
    torch.testing.assert_close(y.norm(dim=1), 0.5 * x.norm(dim=1))


def test_trained_parameters_stay_sound():
    """LPReLU and HouseHolder after steps with a silly learning rate."""
    layers = (lnn.LPReLU(6, k_coef_lip=0.5).double(), lnn.HouseHolder(6, k_coef_lip=0.5).double())
    for layer in layers:
        optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
        start = [p.detach().clone() for p in layer.parameters()]
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.randn(8, 6, dtype=F64)).sum().backward()
            optimizer.step()
            assert_within(jacobian(layer.eval(), torch.randn(1, 6, dtype=F64)), 0.5)
        assert any((p - s).abs().max() > 1 for p, s in zip(layer.parameters(), start, strict=True))
