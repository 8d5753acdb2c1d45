"""Sequential's k is really the network's: exact norms of chains, Jacobians of nets with creases."""

import copy
import math

import pytest
import torch
from operator_norm import assert_within, jacobian, matrix_of, operator_norm
from tolerances import ATTAINED, CERTIFIED, PAIRS
from torch import nn

import lipkernels.nn as lnn
from lipkernels.certify import lipschitz_bound

F32_ATTAINED = ATTAINED[torch.float32]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def square(k=1.0, **others):
    return lnn.SpectralLinear(4, 4, k_coef_lip=k, **others)


def exact_norm(net, shape=(4,)):
    """Of a net of linear layers, from its weights as stored."""
    return operator_norm(matrix_of(net.vanilla_export().double(), shape))


def constants(net):
    return [m.k_coef_lip for m in net.modules() if isinstance(m, (lnn.SpectralLinear,))]


# ---------------------------------------------------------------------------- k is the network's
@pytest.mark.parametrize("k", [1.0, 5.0, 0.2, 1e-3, 300.0])
@pytest.mark.parametrize("own", [(5.0, 5.0), (1.0, 1.0), (0.1, 7.0), (1e-4, 1e4, 3.0)])
def test_k_is_the_networks(k, own):
    """The peers: 25 for a promised 1, and 1 for a promised 5. Here k, whatever the layers had."""
    net = lnn.Sequential(*(square(c) for c in own), k_coef_lip=k)
    norm = exact_norm(net)
    assert k * (1 - F32_ATTAINED) <= norm <= k
    assert math.isclose(net.lipschitz_constant, k, rel_tol=1e-12)
    ratios = [a / b for a, b in zip(constants(net), own, strict=True)]
    assert max(ratios) / min(ratios) == pytest.approx(1.0)


NESTED = {
    "flat": lambda: lnn.Sequential(square(2.0), square(3.0), square(4.0), k_coef_lip=0.7),
    "lipschitz_inside": lambda: lnn.Sequential(
        square(2.0), lnn.Sequential(square(3.0), square(4.0), k_coef_lip=12.0), k_coef_lip=0.7
    ),
    "plain_inside": lambda: lnn.Sequential(
        square(2.0), nn.Sequential(square(3.0), nn.Identity(), square(4.0)), k_coef_lip=0.7
    ),
    "both": lambda: lnn.Sequential(
        nn.Sequential(square(2.0), lnn.Sequential(square(3.0), nn.Sequential(square(4.0)))),
        k_coef_lip=0.7,
    ),
    "empty_ones": lambda: lnn.Sequential(
        nn.Sequential(), square(9.0), lnn.Sequential(), k_coef_lip=0.7
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_containers(name):
    net = NESTED[name]()
    for k in (None, 3.0, 0.05):
        if k is not None:
            net.set_klip_factor(k)
        k = net.k_coef_lip
        assert k * (1 - F32_ATTAINED) <= exact_norm(net) <= k
        net(torch.randn(2, 4))
        assert exact_norm(net) <= lipschitz_bound(net).value <= k * (1 + CERTIFIED)
        for module in net.modules():  # a nested container promises what it keeps
            if isinstance(module, lnn.Sequential):
                assert exact_norm(module) <= module.k_coef_lip * (1 + 1e-12)


def test_nested_container_whose_layers_were_changed():
    """It counts as what its layers multiply to, not as what it once promised."""
    for own in (0.25, 4.0):
        layer = square()
        inner = lnn.Sequential(layer, square())
        layer.set_klip_factor(own)
        net = lnn.Sequential(inner, square(), k_coef_lip=2.0)
        net(torch.randn(2, 4))
        assert 2.0 * (1 - F32_ATTAINED) <= exact_norm(net) <= 2.0


def test_a_layer_used_twice():
    for own in (0.5, 1.0, 5.0):
        layer = square(own)
        net = lnn.Sequential(layer, nn.ReLU(), layer, k_coef_lip=3.0)
        assert layer.k_coef_lip == pytest.approx(math.sqrt(3.0))
        chain = nn.Sequential(layer, layer)
        matrix = matrix_of(lnn.Sequential(*chain, k_coef_lip=3.0).vanilla_export().double(), (4,))
        assert_within(matrix, 3.0)
        net(torch.randn(2, 4))


def test_a_layer_inside_and_outside_of_a_nested_container():
    for own in (0.5, 1.0, 5.0):
        layer = square(own)
        net = lnn.Sequential(lnn.Sequential(layer, k_coef_lip=own), layer, square(), k_coef_lip=2.0)
        net(torch.randn(2, 4))
        assert math.isclose(net.lipschitz_constant, 2.0, rel_tol=1e-12)
        assert exact_norm(net) <= 2.0


def test_convolutions_pools_and_linear_layers():
    """A chain of linear layers of many kinds, the whole as one dense matrix."""
    for mode in ("zeros", "circular", "symmetric"):
        net = lnn.Sequential(
            lnn.SpectralConv2d(2, 4, 3, padding=1, padding_mode=mode, k_coef_lip=2.0),
            lnn.InvertibleDownSampling(2, k_coef_lip=0.3),
            lnn.FrobeniusConv2d(16, 3, 2, stride=2, k_coef_lip=5.0),
            nn.AvgPool2d(1),
            lnn.ScaledAvgPool2d(1, k_coef_lip=7.0),
            nn.Flatten(),
            lnn.FrobeniusLinear(3, 5),
            lnn.SpectralLinear(5, 3),
            k_coef_lip=1.5,
        )
        assert math.isclose(net.lipschitz_constant, 1.5, rel_tol=1e-12)
        norm = exact_norm(net, (2, 4, 4))
        assert norm <= lipschitz_bound(net).value <= 1.5 * (1 + CERTIFIED)
        assert norm <= 1.5


def test_transposed_and_upsampled():
    net = lnn.Sequential(
        lnn.SpectralConvTranspose2d(2, 4, 2, stride=2),
        lnn.InvertibleUpSampling(2, k_coef_lip=3.0),
        lnn.SpectralConv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        k_coef_lip=0.9,
    )
    assert exact_norm(net, (2, 2, 2)) <= 0.9


@pytest.mark.parametrize("k", [1.0, 0.25, 4.0])
def test_networks_with_activations(k):
    """Jacobians at random points, and pairs, of a net with every kind of activation."""
    net = lnn.Sequential(
        lnn.SpectralConv1d(1, 6, 3, padding=1, padding_mode="circular"),
        lnn.GroupSort2(k_coef_lip=2.0),
        nn.MaxPool1d(3, 2),
        lnn.HouseHolder(6),
        lnn.LPReLU(6, init=4.0),
        nn.Flatten(),
        lnn.SpectralLinear(18, 8, k_coef_lip=6.0, eps_bjorck=None),
        nn.LeakyReLU(3.0),
        lnn.MaxMin(k_coef_lip=0.1),
        lnn.SpectralLinear(16, 16),
        lnn.FullSort(),
        nn.Softplus(),
        lnn.FrobeniusLinear(16, 3),
        k_coef_lip=k,
    )
    assert math.isclose(net.lipschitz_constant, k, rel_tol=1e-12)
    wide = net.vanilla_export().double()  # the same weights, rounded to float32 by now
    for _ in range(20):
        x = torch.randn(1, 1, 8, dtype=torch.float64)
        assert_within(jacobian(wide, x), k)
        y = x + 10 ** torch.empty(1).uniform_(-3, 1).item() * torch.randn_like(x)
        assert (wide(x) - wide(y)).norm() <= k * (x - y).norm() * (1 + PAIRS)


def test_plain_layers_are_counted():
    """Constants of plain torch layers that are not one take their part of k."""
    for plain, constant in (
        (nn.LeakyReLU(5.0), 5.0),
        (nn.Sigmoid(), 0.25),
        (nn.MaxPool1d(3, 1), math.sqrt(3)),
        (nn.AvgPool1d(2), 1 / math.sqrt(2)),
        (nn.ELU(2.0), 2.0),
        (nn.ReLU(), 1.0),
    ):
        net = lnn.Sequential(plain, square(), k_coef_lip=2.0)
        assert net[1].k_coef_lip == pytest.approx(2.0 / constant)
        x = torch.randn(400, 1, 4)
        if isinstance(plain, (nn.MaxPool1d, nn.AvgPool1d)):
            net[1] = lnn.SpectralLinear(plain(x).shape[-1], 4, k_coef_lip=2.0 / constant)
        wide = net.vanilla_export().double()
        y = x + 0.1 * torch.randn_like(x)
        moved = (wide(x.double()) - wide(y.double())).flatten(1).norm(dim=1)
        assert (moved <= 2.0 * (x - y).double().flatten(1).norm(dim=1) * (1 + PAIRS)).all()


def test_frobenius_rows_count_with_the_root():
    """Each neuron is k-Lipschitz, the layer k sqrt(out): the chain pays for it."""
    layer = lnn.FrobeniusLinear(4, 9, k_coef_lip=2.0)
    assert layer.lipschitz_constant == 6.0
    layer.raw_weight.data.fill_(1.0)  # all neurons equal: the norm of the layer is 6
    assert operator_norm(layer.weight) >= 6.0 * (1 - F32_ATTAINED)
    net = lnn.Sequential(layer, k_coef_lip=2.0)
    assert layer.k_coef_lip == pytest.approx(2.0 / 3.0)
    assert 2.0 * (1 - F32_ATTAINED) <= exact_norm(net) <= 2.0
    whole = lnn.FrobeniusLinear(4, 9, disjoint_neurons=False, k_coef_lip=2.0)
    assert whole.lipschitz_constant == 2.0
    whole.raw_weight.data.fill_(1.0)
    assert_within(whole.weight, 2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_formats(dtype):
    net = lnn.Sequential(square(3.0), square(0.1), square(7.0), k_coef_lip=1.3).to(dtype)
    assert exact_norm(net) <= 1.3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matrix = torch.eye(4, dtype=torch.float64)
        for layer in net:
            matrix = layer.weight.detach().double() @ matrix
    assert_within(matrix, 1.3)


# --------------------------------------------------------------------------------- later changes
def grow_by_append(net):
    net.append(square(2.0))


def grow_by_insert(net):
    net.insert(0, square(2.0))


def grow_by_extend(net):
    net.extend([square(2.0), square()])


def grow_by_item(net):
    net[1] = square(3.0)


def grow_by_layer(net):
    net[0].set_klip_factor(1.7)


def grow_by_attribute(net):
    net[0].k_coef_lip = 1.7


def grow_by_plain_layer(net):
    net.append(nn.LeakyReLU(2.0))


def grow_inside(net):
    net[2][0].set_klip_factor(1.7)


GROWTHS = (
    grow_by_append,
    grow_by_insert,
    grow_by_extend,
    grow_by_item,
    grow_by_layer,
    grow_by_attribute,
    grow_by_plain_layer,
    grow_inside,
)


@pytest.mark.parametrize("grow", GROWTHS, ids=lambda f: f.__name__)
def test_a_chain_that_outgrew_its_constant(grow):
    """An error in the next forward; set_klip_factor makes it sound again."""
    net = lnn.Sequential(square(), square(), nn.Sequential(square()))
    x = torch.randn(2, 4)
    net(x)
    grow(net)
    with pytest.raises(ValueError, match="multiply to at most k_coef_lip = 1, got"):
        net(x)
    net.set_klip_factor(1.0)
    net(x)
    linear = nn.Sequential(*(m for m in net.modules() if isinstance(m, lnn.SpectralLinear)))
    matrix = torch.eye(4, dtype=torch.float64)
    for layer in linear:
        matrix = layer.weight.detach().double() @ matrix
    assert_within(matrix, 1.0)


def test_a_chain_that_shrank_is_still_sound():
    net = lnn.Sequential(square(), square(), k_coef_lip=2.0)
    del net[1]
    net(torch.randn(2, 4))
    assert exact_norm(net) <= 2.0
    net.append(square(0.1))
    net(torch.randn(2, 4))
    assert exact_norm(net) <= 2.0


def test_unbounded_layer_appended():
    net = lnn.Sequential(square())
    net.append(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="layer '1' is a Linear, which has none"):
        net(torch.randn(2, 4))


def test_slicing_leaves_the_layers_alone():
    net = lnn.Sequential(square(2.0), square(3.0), nn.Identity(), square(4.0), k_coef_lip=5.0)
    before = constants(net)
    for part in (net[:2], net[1:], net[::2], net[:0], net[:]):
        assert isinstance(part, lnn.Sequential)
        assert part.k_coef_lip == pytest.approx(math.prod(constants(part)))
        assert constants(net) == before
        part(torch.randn(2, 4))
        assert exact_norm(part) <= part.k_coef_lip * (1 + 1e-12)
    assert net[:2][0] is net[0]
    net(torch.randn(2, 4))
    assert isinstance(net[1], lnn.SpectralLinear)


def test_copies_are_independent():
    net = lnn.Sequential(square(), square(), k_coef_lip=2.0)
    other = copy.deepcopy(net)
    other.set_klip_factor(9.0)
    assert exact_norm(net) <= 2.0
    assert 9.0 * (1 - F32_ATTAINED) <= exact_norm(other) <= 9.0


def test_dropout_in_training_counts():
    """Survivors are doubled in training: the chain pays for it there."""
    net = lnn.Sequential(square(), nn.Dropout(0.5), k_coef_lip=1.0)
    assert net[0].k_coef_lip == pytest.approx(0.5)
    net.eval()(torch.randn(2, 4))
    held = lnn.Sequential(square(), nn.Dropout(0.5).eval(), k_coef_lip=1.0)
    held.eval()(torch.randn(2, 4))
    with pytest.raises(ValueError, match="got 2"):
        held.train()(torch.randn(2, 4))


def test_condense_once_for_a_layer_used_twice():
    """Few Bjorck steps are no projection: a second condensation would change the map."""
    layer = square(1.0, maxiter_bjorck=1, bias=False)
    layer.raw_weight.data.copy_(torch.randn(4, 4))
    net = lnn.Sequential(layer, nn.Identity(), layer)
    once = copy.deepcopy(layer)
    net.condense()
    once.condense()
    torch.testing.assert_close(layer.raw_weight, once.raw_weight)


# --------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Linear(4, 4), "Linear"),
        (nn.Conv1d(1, 1, 1), "Conv1d"),
        (nn.BatchNorm1d(4), "BatchNorm1d"),
        (nn.LayerNorm(4), "LayerNorm"),
        (nn.GELU(), "GELU"),
        (nn.PReLU(), "PReLU"),
        (nn.Hardshrink(), "Hardshrink"),
        (nn.Softplus(threshold=0.5), "Softplus"),
        (nn.Bilinear(2, 2, 2), "Bilinear"),
        (nn.Upsample(scale_factor=2), "Upsample"),
    ],
)
def test_unbounded_layers_are_named(layer, name):
    with pytest.raises(ValueError, match=f"layer '1' is a {name}, which has none"):
        lnn.Sequential(square(), layer)
    with pytest.raises(ValueError, match=f"layer '0.2' is a {name}, which has none"):
        lnn.Sequential(nn.Sequential(square(), nn.ReLU(), layer))


def test_subclasses_with_another_forward_are_named():
    class Louder(nn.ReLU):
        def forward(self, x):
            return 3 * super().forward(x)

    class Twice(nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    class LouderPool(nn.MaxPool1d):
        def forward(self, x):
            return 3 * super().forward(x)

    for layer in (Louder(), Twice(square()), LouderPool(2)):
        with pytest.raises(ValueError, match=f"is a {type(layer).__name__}, which has none"):
            lnn.Sequential(square(), layer)


def test_constants_that_nothing_can_adjust():
    lnn.Sequential(nn.ReLU(), k_coef_lip=2.0)(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="expected layers whose constants multiply to at most"):
        lnn.Sequential(nn.ReLU(), k_coef_lip=0.5)
    activations = lnn.Sequential(lnn.GroupSort2(k_coef_lip=4.0), lnn.Abs(), k_coef_lip=0.5)
    x, y = torch.randn(2, 50, 4, dtype=torch.float64)
    moved = (activations(x) - activations(y)).norm(dim=1)
    assert (moved <= 0.5 * (x - y).norm(dim=1) * (1 + PAIRS)).all()


@pytest.mark.parametrize("k", [0.0, -1.0, math.inf, math.nan])
def test_impossible_constants(k):
    with pytest.raises(ValueError, match="k_coef_lip: expected a positive finite number"):
        lnn.Sequential(square(), k_coef_lip=k)
    net = lnn.Sequential(square())
    with pytest.raises(ValueError, match="k_coef_lip: expected a positive finite number"):
        net.set_klip_factor(k)
    assert net.k_coef_lip == 1.0
