"""Certificates: never below the true norm, tight where promised, and refused where unknown."""

import copy
import math
import operator
from fractions import Fraction

import pytest
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from operator_norm import (
    is_above_a_gain,
    is_upper_bound,
    jacobian,
    matrix_of,
    operator_norm,
)
from pathological import PATHOLOGICAL, orthogonal
from tolerances import CERTIFIED, PAIRS
from torch import fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import lipkernels
import lipkernels.nn as lnn
from lipkernels import vanilla_export
from lipkernels.certify import LipschitzBound, lipschitz_bound, spectral_norm_bound

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------ one matrix: sound
SMALL_SHAPES = ((1, 1), (1, 4), (5, 1), (2, 2), (2, 3), (3, 3), (4, 2), (4, 4), (3, 6), (5, 5))


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_never_below_the_norm(name):
    """Ten shapes, fifteen draws: 26 x 150 matrices, each decided in rational arithmetic."""
    failures = []
    for shape in SMALL_SHAPES:
        for _ in range(15):
            matrix = PATHOLOGICAL[name](*shape)
            bound = spectral_norm_bound(matrix)
            if not is_upper_bound(matrix, bound):
                failures.append((shape, bound, matrix))
    assert not failures


@pytest.mark.parametrize("name", [n for n in PATHOLOGICAL if n not in ("zero", "smallest")])
def test_larger_matrices(name):
    """Up to 24 x 24: above the exact gain of the vector that the SVD takes for the top one."""
    for shape in ((24, 24), (7, 30), (30, 5)):
        matrix = PATHOLOGICAL[name](*shape)
        assert is_above_a_gain(matrix, spectral_norm_bound(matrix))


def test_rounding_of_long_sums():
    """Equal entries, whose float64 sums of products all round the same way."""
    failures = []
    for shape in ((1, 3000), (2, 1000), (700, 1), (1, 17)):
        for step in range(12):
            matrix = torch.full(shape, 0.1 + step / 13, dtype=F64)
            if not is_upper_bound(matrix, spectral_norm_bound(matrix)):
                failures.append((shape, step))
    assert not failures


def test_the_oracle_itself():
    """The exact criterion tells a bound from one that is short by an ulp."""
    eye = torch.eye(3, dtype=F64)
    assert is_upper_bound(eye, 1.0)
    assert not is_upper_bound(eye, math.nextafter(1.0, 0.0))
    three_four = torch.tensor([[3.0, 4.0]], dtype=F64)
    assert is_upper_bound(three_four, 5.0)
    assert not is_upper_bound(three_four, math.nextafter(5.0, 0.0))
    matrix = torch.randn(4, 6, dtype=F64)
    norm = operator_norm(matrix)
    assert is_upper_bound(matrix, norm * (1 + 1e-14))
    assert not is_upper_bound(matrix, norm * (1 - 1e-14))
    assert is_upper_bound(torch.zeros(2, 2), 0.0)
    assert is_above_a_gain(matrix, norm * (1 + 1e-14))
    assert not is_above_a_gain(matrix, norm * (1 - 1e-14))


# ------------------------------------------------------------------------------ one matrix: tight
def test_tight_for_orthogonal_float32():
    """Within 1e-6 of the norm, at the sizes of real layers."""
    for shape in ((1, 1), (8, 8), (64, 27), (27, 64), (64, 576), (256, 256), (10, 784)):
        for weight in (
            orthogonal(*shape).float(),
            lipkernels.functional.polar_factor(torch.randn(shape)),
        ):
            bound = spectral_norm_bound(weight)
            norm = operator_norm(weight)
            assert norm * (1 - 1e-12) <= bound <= norm * (1 + CERTIFIED)


@pytest.mark.parametrize("name", [n for n in PATHOLOGICAL if n not in ("zero", "smallest")])
def test_tight_for_the_others(name):
    """Within 1e-6 of the norm, exactly: a bound smaller by that would be refuted."""
    for shape in SMALL_SHAPES[3:]:
        matrix = PATHOLOGICAL[name](*shape)
        bound = spectral_norm_bound(matrix)
        if matrix.any() and math.isfinite(bound) and bound > 1e-300:
            assert not is_upper_bound(matrix, bound * (1 - CERTIFIED)), (shape, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype(dtype):
    for name in BAD_WEIGHTS:
        weight = bad_weight(name, (4, 5), dtype)
        assert is_upper_bound(weight, spectral_norm_bound(weight))


def test_not_finite():
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (F64, torch.float32, torch.bfloat16):
            weight = torch.zeros(3, 4, dtype=dtype)
            weight[1, 2] = bad
            assert spectral_norm_bound(weight) == math.inf
    overflow = torch.full((9, 9), 1.7e308, dtype=F64)
    assert spectral_norm_bound(overflow) == math.inf


def test_empty_and_zero():
    for shape in ((0, 0), (0, 3), (3, 0)):
        assert spectral_norm_bound(torch.empty(shape)) == 0.0
    assert spectral_norm_bound(torch.zeros(3, 4)) == 0.0


def test_layouts_and_inputs_kept():
    matrix = torch.randn(6, 4)
    expected = spectral_norm_bound(matrix)
    before = matrix.clone()
    assert spectral_norm_bound(matrix.T.contiguous().T) == pytest.approx(expected)
    assert spectral_norm_bound(matrix.repeat_interleave(2, 1)[:, ::2]) == expected
    assert spectral_norm_bound(nn.Parameter(matrix)) == expected
    assert torch.equal(matrix, before)


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        spectral_norm_bound(torch.zeros(3))
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        spectral_norm_bound(torch.zeros(2, 3, 3))
    for dtype in (torch.complex64, torch.int64, torch.bool):
        with pytest.raises(TypeError, match="expected a floating-point dtype"):
            spectral_norm_bound(torch.zeros(2, 2, dtype=dtype))


# ---------------------------------------------------------------------------------- linear chains
def exact_norm(model, shape):
    """Of a plain torch model of linear layers, its weights as stored.

    Parametrized weights are fixed first, in place: they may not be computed anew in float64.
    """
    for module in list(model.modules()):
        if is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight")
    return operator_norm(matrix_of(copy.deepcopy(model).double(), shape))


def plain_chains():
    yield nn.Linear(5, 3), (5,)
    yield nn.Linear(1, 1, bias=False), (1,)
    yield nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 2)), (4,)
    for mode in ("zeros", "reflect", "replicate", "circular"):
        yield nn.Conv1d(2, 3, 3, padding=2, padding_mode=mode), (2, 5)
        yield nn.Conv2d(1, 4, (2, 3), (1, 2), 1, (2, 1), padding_mode=mode), (1, 5, 4)
        yield nn.Conv1d(4, 4, 4, padding="same", groups=2, padding_mode=mode), (4, 4)
    yield nn.Conv3d(2, 2, 2, padding=1, groups=2), (2, 2, 3, 2)
    yield nn.Conv1d(2, 2, 3, dilation=2, stride=2), (2, 9)
    yield nn.Conv1d(1, 5, 5, dilation=5, stride=5), (1, 26)
    yield nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)
    yield nn.ConvTranspose2d(2, 2, 2, stride=1, groups=2), (2, 3, 3)
    yield nn.ConvTranspose3d(1, 2, 2, stride=2), (1, 2, 2, 2)
    yield nn.ConvTranspose1d(1, 2, 4, dilation=2, stride=2), (1, 5)
    yield nn.BatchNorm1d(4).eval(), (4,)
    yield nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2, eps=1e-2)).eval(), (2, 3)
    yield nn.BatchNorm2d(3, affine=False).eval(), (3, 2, 2)
    for divisor in (None, 1, 3, 9, -2):
        for pool in (
            nn.AvgPool2d(2, divisor_override=divisor),
            nn.AvgPool2d(3, 1, 1, divisor_override=divisor),
            nn.AvgPool2d((1, 3), 2, (0, 1), True, divisor_override=divisor),
            nn.AvgPool2d(3, 2, 1, True, False, divisor_override=divisor),
        ):
            yield pool, (1, 5, 5)
    yield nn.AvgPool1d(3, 1, 1, count_include_pad=False), (2, 5)
    yield nn.AvgPool1d(2, ceil_mode=True), (2, 5)
    yield nn.AvgPool3d(2, 1, 1), (1, 3, 2, 3)
    yield nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 2, 1), nn.Flatten()), (1, 4, 4)
    yield nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(1, 1, 3), nn.PixelShuffle(1)), (1, 3, 3)
    yield nn.Sequential(nn.Unflatten(1, (2, 3)), nn.ChannelShuffle(2), nn.Flatten()), (6,)
    yield nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 3), nn.Dropout1d(0.2)).eval(), (3,)
    yield parametrizations.orthogonal(nn.Linear(4, 4)), (4,)
    yield parametrizations.spectral_norm(nn.Conv1d(2, 2, 3, padding=1)).eval(), (2, 5)
    yield parametrizations.weight_norm(nn.Linear(4, 3)), (4,)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("trained", [False, True])
def test_plain_linear_chains(trained):
    """Bound >= exact norm; and tight for a single linear or normalization layer."""
    for model, shape in plain_chains():
        if trained:
            for p in model.parameters():
                p.data.mul_(3).add_(torch.randn_like(p))
            for module in model.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    module.running_var.uniform_(1e-3, 2)
                    module.running_mean.normal_()
        result = lipschitz_bound(model)
        norm = exact_norm(model, shape)
        assert isinstance(result, LipschitzBound)
        assert result.value == float(result)
        assert norm <= result.value * (1 + 1e-12), model
        if isinstance(model, (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)):
            assert result.value <= norm * (1 + CERTIFIED)


def test_bound_is_attained_by_orthogonal_kernels():
    """Kernels whose matrix is square orthogonal: the bound is the norm, on some image size."""
    for mode, padding, size in (("zeros", 2, 7), ("circular", 2, 2), ("replicate", 2, 1)):
        layer = nn.Conv1d(1, 3, 3, padding=padding, padding_mode=mode, bias=False)
        layer.weight.data.copy_(orthogonal(3, 3).reshape(3, 1, 3))
        norm = exact_norm(layer, (1, size))
        assert norm <= lipschitz_bound(layer).value <= norm * (1 + CERTIFIED)


def test_the_largest_group_counts():
    for make in (nn.Conv1d, nn.ConvTranspose1d):
        for largest in range(3):
            layer = make(3, 3, 1, groups=3, bias=False)
            layer.weight.data.fill_(0.5)[largest] = -4.0
            assert 4.0 <= lipschitz_bound(layer).value <= 4.0 * (1 + CERTIFIED)
            assert exact_norm(layer, (3, 2)) == pytest.approx(4.0)


def test_constrained_layers_within_1e_6():
    for layer, shape in (
        (lnn.SpectralLinear(7, 5, k_coef_lip=3.0), (7,)),
        (lnn.SpectralLinear(5, 7, eps_bjorck=None), (5,)),
        (lnn.FrobeniusLinear(5, 7, disjoint_neurons=False), (5,)),
        (lnn.SpectralConv1d(1, 3, 3, padding=1), (1, 6)),
        (lnn.SpectralConvTranspose1d(4, 1, 4, stride=2), (4, 5)),
    ):
        layer.raw_weight.data.normal_()
        norm = exact_norm(layer.vanilla_export(), shape)
        bound = lipschitz_bound(layer).value
        assert norm <= bound <= layer.k_coef_lip * (1 + CERTIFIED)
        exported = lipschitz_bound(vanilla_export(layer)).value
        assert exported == pytest.approx(bound, rel=CERTIFIED)


def test_constrained_weight_is_bounded_and_not_believed():
    """A layer whose constraint lies is caught: the bound is of the weight that forward uses."""

    class Lie:
        uses_vector = False

        def __call__(self, matrices, scales, us, dtype, check):
            return [5 * matrices[0]], us

    layer = lnn.SpectralLinear(4, 4)
    layer.constraint = Lie()
    norm = operator_norm(layer.weight)
    assert norm > 4
    assert norm <= lipschitz_bound(layer).value <= norm * (1 + CERTIFIED)
    half = lnn.SpectralLinear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operator_norm(half.weight) <= lipschitz_bound(half).value <= 1 + CERTIFIED


# ----------------------------------------------------------------------------- nets with creases
def bent_nets():
    conv = lnn.SpectralConv2d(1, 4, 3, padding=1, padding_mode="symmetric")
    image = (1, 6, 6)
    yield (
        lnn.Sequential(
            conv,
            lnn.GroupSort2(),
            lnn.ScaledL2NormPool2d(2),
            lnn.MaxMin(),
            nn.Flatten(),
            lnn.SpectralLinear(72, 5),
            lnn.FullSort(),
            lnn.FrobeniusLinear(5, 3),
            k_coef_lip=2.0,
        ),
        image,
    )
    yield (
        nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.LeakyReLU(2.0),
            nn.MaxPool2d(3, 1, 1),
            nn.BatchNorm2d(3),
            nn.ELU(1.7),
            nn.AvgPool2d(3, 2, 1, True, False),
            nn.Flatten(),
            nn.Linear(27, 6),
            nn.PReLU(6, init=2.5),
            nn.Linear(6, 2),
            nn.Sigmoid(),
        ).eval(),
        image,
    )
    yield nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Softplus(beta=3)), image
    yield nn.Sequential(nn.MaxPool2d((2, 3), 1, dilation=(1, 2), ceil_mode=True)), image
    yield nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Softshrink(0.1), nn.Hardtanh(-2, 2)), image
    yield (
        nn.Sequential(nn.Flatten(), nn.MaxPool1d(4, 2), nn.ReLU6(), nn.LogSigmoid(), nn.Softsign()),
        image,
    )
    yield nn.Sequential(nn.Tanhshrink(), nn.ConstantPad2d(1, 3.0), nn.PReLU(1, -3.0)), image


def test_nets_with_creases():
    """Never below the Jacobian's norm at random points, nor below a pair's quotient."""
    for net, shape in bent_nets():
        bound = lipschitz_bound(net).value
        wide = copy.deepcopy(vanilla_export(net)).double()
        for scale in (0.1, 1.0, 5.0):
            x = torch.randn(1, *shape, dtype=F64) * scale
            assert operator_norm(jacobian(wide, x)) <= bound * (1 + 1e-12), net
            y = x + 0.01 * torch.randn_like(x)
            assert (wide(x) - wide(y)).norm() <= bound * (x - y).norm() * (1 + PAIRS)


@pytest.mark.parametrize("module", [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d])
def test_max_pools_attain_their_bound(module):
    """A single bright pixel wins every window that sees it: sqrt of how many do."""
    n_dims = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}[module]
    for kernel, stride, dilation in ((2, 1, 1), (3, 2, 1), (3, 2, 2), (2, 3, 1), (3, 1, 2)):
        pool = module(kernel, stride, dilation=dilation)
        size = 9
        best = 0.0
        for position in range(size):
            x = torch.zeros(1, 1, *(size,) * n_dims, dtype=F64)
            x[(0, 0, *(position,) * n_dims)] = 1.0
            best = max(best, float(pool(x).norm()))
        bound = lipschitz_bound(pool).value
        assert best <= bound * (1 + 1e-12)
        assert best >= bound * (1 - 1e-12)


def test_dropout_by_mode():
    net = nn.Sequential(nn.Dropout(0.75), nn.Linear(3, 3))
    evaluated = lipschitz_bound(net.eval()).value
    assert lipschitz_bound(net.train()).value >= 4 * evaluated
    assert lipschitz_bound(nn.Dropout(1.0)).value == math.inf


# ------------------------------------------------------------------------------- exported models
EXPORTS = {
    "group_sort_2": (lambda: lnn.GroupSort2(k_coef_lip=0.5), (6, 2)),
    "group_sort_3": (lambda: lnn.GroupSort(3), (6,)),
    "group_sort_last": (lambda: lnn.GroupSort(2, dim=-1, k_coef_lip=3.0), (2, 4)),
    "full_sort": (lambda: lnn.FullSort(k_coef_lip=2.0), (5,)),
    "max_min": (lambda: lnn.MaxMin(k_coef_lip=0.5), (4, 2)),
    "abs": (lambda: lnn.Abs(k_coef_lip=2.0), (4,)),
    "lprelu": (lambda: lnn.LPReLU(init=4.0, k_coef_lip=0.3), (4,)),
    "average": (lambda: lnn.ScaledAvgPool2d(3, 2, 1, k_coef_lip=2.0), (1, 5, 5)),
    "norm": (lambda: lnn.ScaledL2NormPool2d(3, 2, 1, True), (1, 5, 5)),
    "global_average": (lambda: lnn.ScaledAdaptiveAvgPool2d(k_coef_lip=3.0), (2, 3, 4)),
    "global_norm": (lambda: lnn.ScaledAdaptiveL2NormPool2d(k_coef_lip=0.1), (2, 3, 4)),
    "down": (lambda: lnn.InvertibleDownSampling((2, 1), mode="DCR", k_coef_lip=2.0), (2, 4, 4)),
    "up": (lambda: lnn.InvertibleUpSampling(2, data_format="channels_last"), (2, 2, 8)),
    "linear": (lambda: lnn.SpectralLinear(4, 3, k_coef_lip=2.0), (4,)),
    "conv": (lambda: lnn.SpectralConv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 5)),
    "transposed": (lambda: lnn.SpectralConvTranspose1d(3, 2, 3, stride=2), (3, 4)),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_are_bounded_from_the_file_alone(name):
    make, shape = EXPORTS[name]
    layer = make()
    exported = vanilla_export(layer)
    bound = lipschitz_bound(exported).value
    assert layer.k_coef_lip * (1 - CERTIFIED) <= bound <= layer.k_coef_lip * (1 + CERTIFIED)
    wide = exported.double()
    for _ in range(3):
        x = torch.randn(1, *shape, dtype=F64)
        assert operator_norm(jacobian(wide, x)) <= bound * (1 + 1e-12)


def test_exported_network():
    net = next(bent_nets())[0]
    plain = nn.Sequential(*vanilla_export(net)[1:])
    bound = lipschitz_bound(plain)
    assert bound.value <= lipschitz_bound(net[1:]).value * (1 + CERTIFIED)
    with pytest.raises(TypeError, match=r"module '0\.0' .*no rule"):  # symmetric padding
        lipschitz_bound(vanilla_export(net))
    with pytest.raises(TypeError, match="cannot be bounded: a graph with operations that have no"):
        lipschitz_bound(lnn.HouseHolder(4).vanilla_export())


def graph(build):
    """A GraphModule of one input from ``build(graph, input)``, as a file could hold."""
    g = fx.Graph()
    x = g.placeholder("x")
    g.output(build(g, x))
    return fx.GraphModule(nn.Module(), g)


REFUSED_GRAPHS = {
    "sum of two": lambda g, x: g.call_function(torch.add, (x, x)),
    "product": lambda g, x: g.call_function(torch.mul, (x, x)),
    "one norm": lambda g, x: g.call_function(torch.linalg.vector_norm, (x, 1)),
    "one norm by name": lambda g, x: g.call_function(torch.linalg.vector_norm, (x,), {"ord": 1}),
    "concatenated": lambda g, x: g.call_function(torch.cat, ((x, x),)),
    "sorting order": lambda g, x: g.call_function(
        torch.ops.aten.index, (g.call_method("sort", (x,)), 1)
    ),
    "square": lambda g, x: g.call_function(torch.square, (x,)),
    "root": lambda g, x: g.call_function(torch.sqrt, (x,)),
    "averaged": lambda g, x: g.call_function(torch.nn.functional.avg_pool2d, (x, 2)),
    "expanded": lambda g, x: g.call_method("expand", (x, 9, -1)),
    "repeated": lambda g, x: g.call_method("repeat", (x, 2)),
    "nan times": lambda g, x: g.call_function(operator.mul, (x, math.nan)),
    "infinity times": lambda g, x: g.call_function(operator.mul, (x, math.inf)),
    "another module": lambda g, x: g.call_function(torch.softmax, (x, 1)),
}


@pytest.mark.parametrize("name", REFUSED_GRAPHS)
def test_graphs_without_a_rule_are_refused(name):
    with pytest.raises(TypeError, match="no rule, among"):
        lipschitz_bound(graph(REFUSED_GRAPHS[name]))


def test_scale_in_a_graph_is_read():
    for k in (3.0, -3.0, 0.5):
        module = graph(lambda g, x, k=k: g.call_function(operator.mul, (x, k)))
        assert abs(k) <= lipschitz_bound(module).value <= abs(k) * (1 + CERTIFIED)


# ------------------------------------------------------------------------------------- containers
def test_a_layer_used_twice_counts_twice():
    layer = nn.Linear(3, 3)
    layer.weight.data.copy_(2 * torch.eye(3))
    for net in (
        nn.Sequential(layer, layer),
        nn.Sequential(layer, nn.Sequential(layer)),
        nn.Sequential(nn.Sequential(layer), nn.Sequential(nn.Identity(), layer)),
    ):
        assert 4.0 <= lipschitz_bound(net).value <= 4.0 * (1 + CERTIFIED)
        assert exact_norm(net, (3,)) == pytest.approx(4.0)


def test_layers_are_reported_by_name():
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), lnn.SpectralLinear(3, 2)))
    bound = lipschitz_bound(net)
    assert set(bound.layers) == {"0", "1.0", "1.1"}
    assert math.prod(bound.layers.values()) <= bound.value
    assert "network" in str(bound)
    assert lipschitz_bound(nn.Sequential()).value == 1.0
    assert lipschitz_bound(nn.ReLU()).layers == {"ReLU": 1.0}


def test_bad_parameters_give_infinity():
    for bad in (math.nan, math.inf):
        for make in (
            lambda: nn.Linear(3, 3),
            lambda: nn.Conv1d(1, 1, 2),
            lambda: nn.PReLU(3),
            lambda: lnn.SpectralLinear(3, 3),
            lambda: lnn.HouseHolder(4),
            lambda: lnn.LPReLU(),
        ):
            layer = make()
            next(layer.parameters()).data.view(-1)[0] = bad
            assert lipschitz_bound(layer).value == math.inf
            net = nn.Sequential(nn.Linear(3, 3), layer)
            assert lipschitz_bound(net).value == math.inf
        biased = nn.Linear(3, 3)
        biased.bias.data[0] = bad
        assert lipschitz_bound(biased).value == math.inf
        normalized = nn.BatchNorm1d(3).eval()
        normalized.running_var[0] = bad
        assert lipschitz_bound(normalized).value == math.inf
    dead = nn.BatchNorm1d(3, eps=0.0).eval()
    dead.running_var[1] = 0.0
    assert lipschitz_bound(dead).value == math.inf
    dead.running_var[1] = -1.0
    assert lipschitz_bound(dead).value == math.inf
    assert lipschitz_bound(nn.LeakyReLU(math.nan)).value == math.inf
    assert lipschitz_bound(nn.ELU(math.nan)).value == math.inf
    zero, infinite = nn.Linear(3, 3), nn.Dropout(1.0)
    zero.weight.data.zero_()
    assert lipschitz_bound(nn.Sequential(zero, infinite)).value == math.inf
    assert lipschitz_bound(nn.Sequential(infinite, zero)).value == math.inf


# --------------------------------------------------------------------------------------- refusals
class LouderLinear(nn.Linear):
    def forward(self, x):
        return 100 * super().forward(x)


class LouderConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 100 * super()._conv_forward(x, weight, bias)


class LouderTransposed(nn.ConvTranspose1d):
    def forward(self, x, output_size=None):
        return 100 * super().forward(x, output_size)


class LouderSigmoid(nn.Sigmoid):
    def forward(self, x):
        return 100 * super().forward(x)


class LouderLeakyReLU(nn.LeakyReLU):
    def forward(self, x):
        return 100 * super().forward(x)


class LouderMaxPool(nn.MaxPool2d):
    def forward(self, x):
        return 100 * super().forward(x)


class LouderAvgPool(nn.AvgPool2d):
    def forward(self, x):
        return 100 * super().forward(x)


class LouderDropout(nn.Dropout):
    def forward(self, x):
        return 100 * super().forward(x)


class LouderBatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        return 100 * super().forward(x)


class LouderSpectral(lnn.SpectralLinear):
    def forward(self, x):
        return 100 * super().forward(x)


class LouderSpectralConv(lnn.SpectralConv1d):
    def _conv_forward(self, x, weight, bias):
        return 100 * super()._conv_forward(x, weight, bias)


class TwiceSequential(nn.Sequential):
    def forward(self, x):
        return super().forward(super().forward(x))


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


REFUSED = {
    "linear subclass": lambda: LouderLinear(3, 3),
    "conv subclass": lambda: LouderConv(1, 1, 1),
    "transposed subclass": lambda: LouderTransposed(1, 1, 1),
    "sigmoid subclass": lambda: LouderSigmoid(),
    "leaky subclass": lambda: LouderLeakyReLU(),
    "max pool subclass": lambda: LouderMaxPool(2),
    "average pool subclass": lambda: LouderAvgPool(2),
    "dropout subclass": lambda: LouderDropout(),
    "batch norm subclass": lambda: LouderBatchNorm(3).eval(),
    "constrained subclass": lambda: LouderSpectral(3, 3),
    "constrained conv subclass": lambda: LouderSpectralConv(1, 1, 1),
    "sequential subclass": lambda: TwiceSequential(nn.ReLU()),
    "residual": lambda: Residual(nn.Linear(3, 3)),
    "batch norm in training": lambda: nn.BatchNorm1d(3).train(),
    "batch norm without statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(),
    "layer norm": lambda: nn.LayerNorm(3),
    "gelu": lambda: nn.GELU(),
    "softmax": lambda: nn.Softmax(1),
    "hardshrink": lambda: nn.Hardshrink(),
    "threshold": lambda: nn.Threshold(0.1, 20.0),
    "softplus with a step": lambda: nn.Softplus(1.0, 0.5),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "bilinear": lambda: nn.Bilinear(2, 2, 2),
    "embedding": lambda: nn.Embedding(3, 3),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d(1),
    "reflection": lambda: nn.ReflectionPad2d(1),
    "instance norm": lambda: nn.InstanceNorm1d(3),
    "module list": lambda: nn.ModuleList([nn.ReLU()]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_modules_are_named(name):
    module = REFUSED[name]()
    kind = type(module).__name__
    with pytest.raises(TypeError, match=rf"the model \({kind}\) cannot be bounded: .+"):
        lipschitz_bound(module)
    net = nn.Sequential(nn.ReLU(), nn.Sequential(module)).train(module.training)
    with pytest.raises(TypeError, match=rf"module '1\.0' \({kind}\) cannot be bounded"):
        lipschitz_bound(net)


def test_subclasses_that_only_rename_are_bounded():
    class Mine(nn.Linear):
        pass

    class MineConstrained(lnn.SpectralConv1d):
        pass

    assert lipschitz_bound(Mine(3, 3)).value > 0
    assert lipschitz_bound(MineConstrained(1, 1, 1)).value <= 1 + CERTIFIED


def test_hooks_are_refused():
    for register in (
        lambda m: m.register_forward_hook(lambda m, x, y: 100 * y),
        lambda m: m.register_forward_pre_hook(lambda m, x: (100 * x[0],)),
    ):
        for pick in (lambda net: net[0], lambda net: net[1], lambda net: net):
            net = nn.Sequential(nn.Linear(3, 3), lnn.GroupSort(3))
            handle = register(pick(net))
            with pytest.raises(TypeError, match="forward hooks"):
                lipschitz_bound(net)
            handle.remove()
            lipschitz_bound(net)


def test_old_weight_norm_is_refused():
    """It sets the weight in a forward pre-hook: the attribute may be stale."""
    with pytest.warns(FutureWarning):
        layer = weight_norm(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="forward hooks"):
        lipschitz_bound(layer)
    old = nn.utils.spectral_norm(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="forward hooks"):
        lipschitz_bound(old)


def test_hooks_of_grouped_weights_are_known():
    net = nn.Sequential(lnn.SpectralLinear(3, 3), lnn.SpectralLinear(3, 3))
    with lipkernels.grouped(net):
        assert lipschitz_bound(net).value <= 1 + CERTIFIED


def test_replaced_forward_is_refused():
    for layer in (nn.Linear(3, 3), nn.ReLU(), lnn.SpectralLinear(3, 3), nn.Sequential(nn.ReLU())):
        layer.forward = lambda x: 100 * x
        with pytest.raises(TypeError, match="its forward was replaced on the instance"):
            lipschitz_bound(layer)
    conv = nn.Conv1d(1, 1, 1)
    conv._conv_forward = lambda x, w, b: 100 * x
    with pytest.raises(TypeError, match="cannot be bounded"):
        lipschitz_bound(conv)


def test_attributes_that_forward_does_not_read():
    """kernel_size is a record, and a plain convolution takes images of any size."""
    layer = nn.Conv1d(1, 3, 3, padding=1, bias=False)
    expected = lipschitz_bound(layer).value
    layer.kernel_size = (1,)
    layer.input_size = (1,)
    layer.in_features = 17
    assert lipschitz_bound(layer).value == expected
    assert exact_norm(layer, (1, 6)) <= expected


def test_declared_constants():
    class Declared(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k = k

        def certified_lipschitz_constant(self):
            return self.k

    assert lipschitz_bound(nn.Sequential(Declared(2.0), Declared(3))).value == pytest.approx(6.0)
    assert lipschitz_bound(Declared(math.nan)).value == math.inf
    assert lipschitz_bound(Declared(math.inf)).value == math.inf
    with pytest.raises(TypeError, match="is negative"):
        lipschitz_bound(nn.Sequential(Declared(-1.0), nn.Linear(3, 3)))


def test_certifying_changes_nothing():
    net = nn.Sequential(lnn.SpectralLinear(4, 4, eps_bjorck=None), nn.BatchNorm1d(4).eval())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = lipschitz_bound(net).value
    assert lipschitz_bound(net).value == pytest.approx(first, rel=1e-12)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in net.parameters())


def test_values_do_not_depend_on_the_default_dtype():
    net = nn.Sequential(nn.Linear(4, 4), lnn.ScaledAvgPool2d(2))
    expected = lipschitz_bound(net).value
    try:
        torch.set_default_dtype(torch.float64)
        assert lipschitz_bound(net).value == expected
        torch.set_default_dtype(torch.float16)
        assert lipschitz_bound(net).value == expected
        assert spectral_norm_bound(torch.eye(3, dtype=F64) * 1e200) >= 1e200
        assert spectral_norm_bound(torch.eye(3, dtype=F64) * 1e-200) <= 1.1e-200
    finally:
        torch.set_default_dtype(torch.float32)


def test_global_hooks_are_refused():
    handle = torch_module.register_module_forward_hook(lambda m, x, y: 100 * y)
    try:
        with pytest.raises(TypeError, match="forward hooks"):
            lipschitz_bound(nn.Linear(3, 3))
    finally:
        handle.remove()
    assert lipschitz_bound(nn.Linear(3, 3)).value < math.inf


def test_the_network_bound_covers_the_product():
    """Rounded outwards at every layer: the product of the layers' bounds, in rationals."""
    for _ in range(20):
        slopes = (1 + torch.rand(30, dtype=F64)).tolist()
        bound = lipschitz_bound(nn.Sequential(*map(nn.LeakyReLU, slopes)))
        product = math.prod(map(Fraction, slopes))
        assert product <= Fraction(bound.value) <= product * (1 + Fraction(CERTIFIED))
        assert list(bound.layers.values()) == slopes


def test_an_export_is_bounded_as_autocast_rounds_it():
    plain = vanilla_export(lnn.SpectralLinear(64, 64))
    rounded = torch.linalg.svdvals(plain.weight.detach().bfloat16().double()).max().item()
    with torch.autocast("cpu", torch.bfloat16):
        assert rounded <= lipschitz_bound(plain).value <= rounded * 1.001
    assert lipschitz_bound(plain).value < rounded
