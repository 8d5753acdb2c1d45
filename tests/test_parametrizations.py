"""The constraints on weights of other modules, through torch.nn.utils.parametrize."""

import copy
import math

import pytest
import tolerances
import torch
from cases import FLOATS, by_dtype, weight_of_condition
from torch import nn
from torch.nn.utils import parametrize

import lipkernels.nn as lnn
from lipkernels import functional as F
from lipkernels import parametrizations as P

MAKE = {
    "polar": (P.PolarFactor, F.polar_factor),
    "spectral": (P.SpectralNormalization, lambda w, k=1.0: F.spectral_normalize(w, k)[0]),
    "bjorck": (
        lambda k_coef_lip=1.0: P.Bjorck(k_coef_lip, maxiter_bjorck=3, eps_bjorck=1e-9),
        lambda w, k=1.0: F.bjorck(w, k, n_iter=3)[0],
    ),
    "frobenius": (P.FrobeniusNormalization, F.frobenius_normalize),
    "rows": (
        lambda k_coef_lip=1.0: P.FrobeniusNormalization(k_coef_lip, disjoint_neurons=True),
        lambda w, k=1.0: F.frobenius_normalize(w, k, per_row=True),
    ),
}


def norm(w):
    return torch.linalg.matrix_norm(w.detach().double(), 2).item()


@pytest.mark.parametrize("name", MAKE)
@by_dtype(FLOATS)
def test_values(name, dtype):
    make, function = MAKE[name]
    w = weight_of_condition((5, 8), 10).to(dtype)
    result = make()(w)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result, function(w), rtol=0, atol=tolerances.WEIGHT_VALUES["polar_factor"][dtype] + 1e-10
    )
    torch.testing.assert_close(
        make(0.25)(w),
        function(w, 0.25),
        rtol=0,
        atol=1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-6,
    )


@pytest.mark.parametrize("name", MAKE)
def test_gradient(name):
    make, _ = MAKE[name]
    w = weight_of_condition((3, 5), 3).requires_grad_()
    assert torch.autograd.gradcheck(make(2.0).eval(), w)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("shape", [(6,), (4, 2, 3), (4, 2, 3, 3), (2, 1, 2, 2, 2)])
def test_other_shapes_have_their_first_dimension_as_rows(name, shape):
    make, function = MAKE[name]
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    result = make()(w)
    expected = function(w.reshape(shape[0], -1)).reshape(shape)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("module", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_weights(name, module):
    torch.manual_seed(0)
    make, function = MAKE[name]
    rnn = module(3, 4, batch_first=True)
    plain = copy.deepcopy(rnn)
    raw = rnn.weight_hh_l0.detach().clone()
    parametrize.register_parametrization(rnn, "weight_hh_l0", make(0.5))
    assert torch.equal(rnn.parametrizations.weight_hh_l0.original, raw)
    torch.testing.assert_close(rnn.weight_hh_l0, function(raw, 0.5), rtol=0, atol=1e-6)
    x = torch.randn(2, 5, 3)
    out, _ = rnn(x)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(rnn.weight_hh_l0)
    torch.testing.assert_close(out, plain(x)[0], rtol=0, atol=1e-6)
    out.sum().backward()
    gradient = rnn.parametrizations.weight_hh_l0.original.grad
    assert gradient.shape == raw.shape and gradient.isfinite().all() and gradient.any()
    names = dict(rnn.named_parameters())
    assert "weight_hh_l0" not in names and "parametrizations.weight_hh_l0.original" in names


def test_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    parametrize.register_parametrization(attention, "in_proj_weight", P.PolarFactor())
    parametrize.register_parametrization(attention.out_proj, "weight", P.SpectralNormalization(0.5))
    assert norm(attention.in_proj_weight) == pytest.approx(1.0, abs=1e-6)
    assert norm(attention.out_proj.weight) == pytest.approx(0.5, abs=1e-6)
    x = torch.randn(2, 5, 8, requires_grad=True)
    for training in (True, False):
        attention.train(training)
        out, _ = attention(x, x, x)
        attention.zero_grad()
        out.pow(2).sum().backward()
        for part in (
            attention.parametrizations.in_proj_weight,
            attention.out_proj.parametrizations.weight,
        ):
            assert part.original.grad.any() and part.original.grad.isfinite().all()


@pytest.mark.parametrize("name", MAKE)
def test_state_dict_has_the_raw_weight_alone(name):
    make, _ = MAKE[name]
    one, two = nn.Linear(5, 3), nn.Linear(5, 3)
    for layer in (one, two):
        parametrize.register_parametrization(layer, "weight", make())
    one(torch.randn(2, 5))
    state = one.state_dict()
    assert set(state) == {"bias", "parametrizations.weight.original"}
    two.load_state_dict(state, strict=True)
    torch.testing.assert_close(two.weight, one.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("keep", [True, False])
def test_remove_parametrizations(name, keep):
    make, _ = MAKE[name]
    layer = nn.Linear(5, 3)
    raw = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", make())
    constrained = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=keep)
    assert not hasattr(layer, "parametrizations") and type(layer) is nn.Linear
    assert isinstance(layer.weight, nn.Parameter)
    torch.testing.assert_close(
        layer.weight.detach(), constrained if keep else raw, rtol=0, atol=1e-6
    )


def test_assignment_sets_the_raw_weight():
    layer = nn.Linear(5, 3)
    parametrize.register_parametrization(layer, "weight", P.PolarFactor())
    w = torch.randn(3, 5)
    layer.weight = w
    assert torch.equal(layer.parametrizations.weight.original, w)
    assert torch.equal(layer.weight, F.polar_factor(w))


@pytest.mark.parametrize("name", MAKE)
def test_training_and_copies(name):
    torch.manual_seed(0)
    make, function = MAKE[name]
    layer = nn.Linear(5, 3)
    parametrize.register_parametrization(layer, "weight", make())
    steps = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = torch.randn(4, 5), torch.zeros(4, 3)
    losses = []
    for _ in range(10):
        steps.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    raw = layer.parametrizations.weight.original.detach()
    torch.testing.assert_close(layer.weight.detach(), function(raw), rtol=0, atol=1e-6)
    other = copy.deepcopy(layer.eval())
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.parametrizations.weight.original.zero_()
    assert layer.weight.any() and not other.weight.any()


def test_other_dtypes_and_modes():
    layer = nn.Linear(5, 3)
    parametrize.register_parametrization(layer, "weight", P.SpectralNormalization())
    with torch.inference_mode():
        layer(torch.randn(1, 5))
    layer(torch.randn(1, 5)).sum().backward()
    layer.double()
    layer(torch.randn(1, 5, dtype=torch.float64)).sum().backward()
    assert norm(layer.weight) == pytest.approx(1.0, abs=1e-9)
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and norm(layer.weight) <= 1


def test_cached():
    layer = nn.Linear(5, 3)
    parametrize.register_parametrization(layer, "weight", P.PolarFactor())
    with parametrize.cached():
        assert layer.weight is layer.weight


def test_settings():
    assert (
        P.SpectralNormalization().constraint == lnn.SpectralLinear(1, 1, eps_bjorck=None).constraint
    )
    assert P.PolarFactor().constraint == lnn.SpectralLinear(1, 1).constraint
    assert P.Bjorck().constraint == lnn.SpectralLinear(1, 1, maxiter_bjorck=15).constraint
    whole = lnn.FrobeniusLinear(1, 1, disjoint_neurons=False).constraint
    assert P.FrobeniusNormalization().constraint == whole
    assert (
        P.FrobeniusNormalization(disjoint_neurons=True).constraint
        == lnn.FrobeniusLinear(1, 1).constraint
    )


@pytest.mark.parametrize("k", [0, -1.0, math.nan, math.inf, True, "1", None], ids=repr)
@pytest.mark.parametrize("name", MAKE)
def test_constants_that_are_none(name, k):
    make, _ = MAKE[name]
    with pytest.raises((ValueError, TypeError), match=r"k_coef_lip: expected.*got"):
        make(k)


def test_settings_out_of_range():
    for make, keywords in (
        (P.Bjorck, {"beta_bjorck": 0.7}),
        (P.Bjorck, {"maxiter_bjorck": 0}),
        (P.Bjorck, {"eps_bjorck": -1.0}),
        (P.SpectralNormalization, {"maxiter_spectral": 0}),
        (P.SpectralNormalization, {"eps_spectral": 0.0}),
    ):
        with pytest.raises(ValueError, match=r"expected.*got"):
            make(**keywords)


def test_the_bound_holds_under_autocast():
    layer = nn.Linear(64, 64)
    parametrize.register_parametrization(layer, "weight", P.PolarFactor())
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight.detach()
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.bfloat16().float())
    assert torch.linalg.svdvals(weight.double()).max() <= 1.0
