"""Strict mode: the certificate of the stored weight itself proves the layer's constant."""

import math

import pytest
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from layer_table import CONSTRAINED
from operator_norm import is_upper_bound, operator_norm
from pathological import PATHOLOGICAL, orthogonal
from torch import nn

import lipkernels
import lipkernels.nn as lnn
from lipkernels import vanilla_export
from lipkernels.certify import largest_norm, lipschitz_bound, shrunk, spectral_norm_bound

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What rounding to the format can cost: a half format has few weights close to a given one.
COST = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 0.03,
    torch.float16: 0.004,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------- one matrix
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shrunk_matrices_are_within_the_limit_and_hardly_smaller(dtype):
    for shape in ((1, 1), (1, 7), (5, 5), (8, 64), (40, 24), (64, 64)):
        for make in (
            lambda shape: orthogonal(*shape),
            lambda shape: torch.randn(shape, dtype=torch.float64),
            lambda shape: torch.ones(shape, dtype=torch.float64),
        ):
            matrix = make(shape).to(dtype)
            norm = operator_norm(matrix)
            for limit in (norm * (1 - 1e-9), norm * 0.9, 0.37 * norm, norm / 3):
                result = shrunk(matrix, limit)
                assert result.dtype == dtype and result.shape == matrix.shape
                assert spectral_norm_bound(result) <= limit
                assert operator_norm(result) >= limit * (1 - COST[dtype])
            assert torch.equal(shrunk(matrix, 2 * norm), matrix)


@pytest.mark.parametrize("family", PATHOLOGICAL)
def test_shrunk_pathological_matrices(family):
    for shape in ((1, 3), (4, 2), (5, 5)):
        matrix = PATHOLOGICAL[family](*shape)
        bound = spectral_norm_bound(matrix)
        if not math.isfinite(bound):
            with pytest.raises(ValueError, match="expected finite entries and a finite norm"):
                shrunk(matrix, 1.0)
            continue
        for limit in (bound, bound * (1 - 1e-12), bound / 2, 1e-3 * bound):
            result = shrunk(matrix, limit)
            assert spectral_norm_bound(result) <= limit
            assert is_upper_bound(result, limit)


def test_shrunk_extremes():
    assert not shrunk(torch.ones(2, 2), 0.0).any()
    assert shrunk(torch.empty(0, 3), 0.0).shape == (0, 3)
    matrix = torch.ones(2, 2)
    result = shrunk(matrix, 5.0)
    result.zero_()
    assert matrix.all()  # a copy
    with pytest.raises(ValueError, match="limit: expected a number >= 0"):
        shrunk(matrix, math.nan)
    with pytest.raises(ValueError, match="expected finite entries"):
        shrunk(torch.full((2, 2), math.nan), 1.0)


def test_largest_norm_keeps_the_product_below():
    for k in (1.0, 0.1, 3.0, 1e-30, 7e22):
        for factor in (1.0, math.sqrt(2), math.sqrt(3), 1.7, 40.0):
            norm = largest_norm(k, factor)
            assert norm * factor * (1 + 2.0**-52) <= k
            assert norm * factor >= k * (1 - 1e-15)


# --------------------------------------------------------------------------------------- layers
def bounds_of(module):
    """Certified constants of the layers with weights, symmetric padding left out."""
    if isinstance(module, nn.Sequential):
        module = module[-1]
    return lipschitz_bound(module).value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_exported_layers_prove_their_constant(layer, dtype):
    for k in (1.0, 0.3, 2.5):
        module = layer.trained(dtype=dtype, k_coef_lip=k)
        strict, plain = module.vanilla_export(strict=True), module.vanilla_export()
        assert bounds_of(strict) <= module.lipschitz_constant
        if "sized" not in layer.name:
            # Images of any size cost a sized layer a real factor.
            assert bounds_of(strict) >= bounds_of(plain) * (1 - COST[dtype])
        after = module.vanilla_export()
        for p, q in zip(after.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)  # the layer itself is left as it was


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_disjoint_neurons_prove_each_output(dtype):
    layer = lnn.FrobeniusLinear(30, 7, k_coef_lip=0.7, dtype=dtype)
    for weight in (torch.randn(7, 30), torch.ones(7, 30), torch.randn(1, 30).expand(7, 30)):
        layer.raw_weight.data.copy_(weight)
        exported = layer.vanilla_export(strict=True)
        for row in exported.weight:
            assert spectral_norm_bound(row.unsqueeze(0)) <= 0.7
            assert is_upper_bound(row.unsqueeze(0), 0.7)
        assert lipschitz_bound(exported).value <= layer.lipschitz_constant


def test_every_group_is_scaled_by_itself():
    layer = lnn.SpectralConv1d(4, 4, 3, groups=2)
    plain, strict = layer.vanilla_export(), layer.vanilla_export(strict=True)
    limit = largest_norm(1.0, layer.operator_factor())
    for before, after in zip(plain.weight.chunk(2), strict.weight.chunk(2), strict=True):
        assert spectral_norm_bound(after.reshape(2, -1)) <= limit
        if spectral_norm_bound(before.reshape(2, -1)) <= limit:
            assert torch.equal(before, after)


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_raw_weights(name):
    layer = lnn.SpectralLinear(6, 4)
    layer.raw_weight.data.copy_(bad_weight(name, (4, 6), torch.float32))
    assert lipschitz_bound(layer.vanilla_export(strict=True)).value <= 1.0


def test_a_nan_weight_is_refused():
    layer = lnn.SpectralLinear(3, 3)
    layer.raw_weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="expected finite entries"):
        layer.vanilla_export(strict=True)


# ------------------------------------------------------------------------------------- networks
def network(dtype=None, k=1.0):
    linear = lnn.SpectralLinear(36, 8, dtype=dtype)
    return lnn.Sequential(
        lnn.SpectralConv2d(1, 4, 3, padding=1, dtype=dtype),
        lnn.GroupSort2(),
        lnn.Sequential(lnn.ScaledAvgPool2d(2), nn.Flatten(), linear),
        lnn.MaxMin(),
        lnn.FrobeniusLinear(16, 3, dtype=dtype),
        k_coef_lip=k,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: nn.Sequential(net, nn.ReLU())])
def test_networks(dtype, wrap):
    net = wrap(network(dtype, 2.0))
    exported = vanilla_export(net, strict=True)
    promised = {
        name: module.lipschitz_constant
        for name, module in net.named_modules()
        if getattr(module, "constraint", None) is not None
    }
    bound = lipschitz_bound(exported)
    assert len(promised) == 3
    for name, constant in promised.items():
        assert bound.layers[name] <= constant
    assert bound.value <= 2.0 * (1 + 1e-12)


def test_a_shared_layer_stays_one_layer():
    layer = lnn.SpectralLinear(4, 4)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    exported = vanilla_export(net, strict=True)
    assert exported[0] is exported[2]
    assert lipschitz_bound(exported).layers["0"] <= 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_condense_stores_weights_that_prove_their_constant(dtype):
    net = network(dtype)
    lipkernels.condense(net, strict=True)
    plain = network(dtype)
    plain = vanilla_export(plain)  # torch modules of the same shapes
    own = dict(net.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(own[name])
    for name, module in net.named_modules():
        if getattr(module, "constraint", None) is not None:
            assert lipschitz_bound(plain).layers[name] <= module.lipschitz_constant
    again = {name: p.clone() for name, p in net.named_parameters()}
    lipkernels.condense(net)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, again[name], rtol=COST[dtype], atol=COST[dtype])
