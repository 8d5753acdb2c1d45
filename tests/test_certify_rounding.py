"""The bound of a forward pass's rounding: never below what is computed, in every format."""

import copy
import itertools
import math
import operator
import warnings
from fractions import Fraction

import pytest
import torch
from layer_table import LAYERS
from torch import fx, nn
from torch.nn.utils import parametrizations

import lipkernels
import lipkernels.nn as lnn
from lipkernels.certify import certified_radius, forward_error, lipschitz_bound

F64 = torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def norms(x):
    return x.double().flatten(1).norm(dim=1)


def perturbed(x, radius):
    """A point of x's format within ``radius`` (N,) of each sample, and nearly that far away."""
    direction = torch.randn_like(x.double())
    step = direction / norms(direction).reshape(-1, *[1] * (x.dim() - 1))
    step = step * radius.reshape(-1, *[1] * (x.dim() - 1))
    for shrink in (0.999, 0.9, 0.5, 0.0):  # the format may be too coarse for a small radius
        y = (x.double() + shrink * step).to(x.dtype)
        near = norms(y.double() - x.double()) <= radius
        x2 = torch.where(near.reshape(-1, *[1] * (x.dim() - 1)), y, x)
        if bool(near.all()):
            return x2
    return x


def assert_covered(model, x, radii=(0.0, 1e-3, 1.0, 30.0)):
    """|computed - exact| within the bound at x and around it; the largest ratio of the two.

    Exact is float64's evaluation at the other point, whose own error is bounded too.
    """
    error = forward_error(model, x)
    assert bool(torch.isfinite(error.at(0.0)).all())
    worst = 0.0
    with torch.no_grad():
        for radius in radii:
            r = torch.full((len(x),), radius, dtype=F64).clamp(max=1e300)
            r = torch.minimum(r, error.limit)
            y = perturbed(x, r)
            exact = forward_error(model, y)
            computed = model(y)
            off = norms(computed.double() - exact.logits)
            bound = error.at(r)
            assert bool((off <= bound + exact.center_error).all()), (off / bound, radius)
            # One sample alone: other kernels run.
            alone = norms(model(y[:1]).double() - exact.logits[:1])
            assert bool((alone <= bound[:1] + exact.center_error[:1]).all())
            worst = max(worst, float((off / bound).max()))
    return worst


# --------------------------------------------------------------------------- every layer, format
TABLE = [layer for layer in LAYERS if layer.cls is not lnn.HouseHolder]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [x for x in TABLE if x.name != "Sequential-nested"], ids=str)
def test_every_layer(layer, dtype):
    module = layer.trained().to(dtype).eval()
    for scale in (1.0, 100.0, 1e-4):
        assert_covered(module, (scale * layer.input()).to(dtype))


@pytest.mark.parametrize("layer", [x for x in TABLE if x.name != "Sequential-nested"], ids=str)
def test_every_export_and_autocast(layer):
    module = lipkernels.vanilla_export(layer.trained().eval())
    if "symmetric" in layer.name:
        pytest.skip("symmetric padding is certified in the layer, not in its export")
    assert_covered(module, layer.input())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_covered(module, layer.input())
        assert_covered(layer.trained().eval(), layer.input())


def torch_nets():
    image = (3, 2, 9, 8)
    yield nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), image
    yield nn.Conv2d(2, 4, 3, 2, 2, 2, groups=2, padding_mode="reflect"), image
    yield nn.Conv2d(2, 4, (2, 3), padding="same", padding_mode="circular"), image
    yield nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), image
    yield nn.ConvTranspose2d(2, 4, 3, 1, groups=2, dilation=2, bias=False), image
    yield nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 5, 3)
    yield nn.ConvTranspose1d(2, 3, 4, 2), (2, 2, 7)
    yield nn.AvgPool2d(3, 2, 1, True, False), image
    yield nn.AvgPool2d(2, divisor_override=1), image
    yield nn.Sequential(nn.BatchNorm2d(2), nn.LeakyReLU(3.0), nn.PReLU(2, -2.0)), image
    yield nn.Sequential(nn.Hardtanh(-0.1, 0.7), nn.ConstantPad2d(1, 0.3), nn.ReLU6()), image
    yield nn.Sequential(nn.Hardtanh(0.1, 0.7), nn.Softshrink(0.3), nn.Softsign()), image
    yield nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 7)), image
    yield nn.Sequential(nn.LeakyReLU(0.1, inplace=True), nn.ReLU(inplace=True)), image
    yield nn.Sequential(nn.Hardtanh(-1, 1, inplace=True), nn.Dropout(0.5, inplace=True)), image
    yield nn.Linear(8, 6), image  # the last dimension of four
    yield nn.Sequential(nn.PixelUnshuffle(1), nn.ChannelShuffle(2), nn.Identity()), image
    yield nn.Sequential(nn.Linear(144, 144, bias=False), nn.Linear(144, 3)), (2, 144)
    yield parametrizations.orthogonal(nn.Linear(6, 6)), (2, 6)
    shared = nn.Linear(5, 5)
    yield nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, nn.ReLU(), shared)), (4, 5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [F64, *DTYPES], ids=str)
def test_plain_torch_layers(dtype):
    for model, shape in torch_nets():
        if dtype in (torch.bfloat16, torch.float16) and "orthogonal" in str(model).lower():
            continue  # torch's parametrization does not compute in half precision
        model = model.eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(1e-3, 2)
                module.weight.data.normal_()
                module.bias.data.normal_()
        x = torch.randn(shape, dtype=F64)
        assert_covered(model.to(dtype), x.to(dtype))
        if dtype == torch.float32:
            channels_last = x.float().transpose(1, -1).contiguous().transpose(1, -1)
            assert_covered(model, channels_last)


# ------------------------------------------------------------------------ sums that round one way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 17, 300, 5000, 100_000])
def test_long_sums_of_equal_terms(dtype, n):
    """All roundings of such a sum have one sign: the worst that a kernel does to a bound."""
    for value in (0.1, 1 / 3, 1.7, 0.9999999):
        value = value * min(1.0, 1000 / n)  # within float16's range
        for signs in (
            torch.ones(n),
            1 - 2 * (torch.arange(n) % 2),
            torch.arange(n).sub(n / 2).sign(),
        ):
            layer = nn.Linear(n, 2).to(dtype)
            layer.weight.data.fill_(value)
            x = (0.7 * signs).to(dtype).repeat(2, 1)
            assert_covered(layer, x, (0.0,))


def sequential(terms):
    total = torch.zeros((), dtype=terms.dtype)
    for t in terms:
        total = total + t
    return total


def as_a_tree(terms, generator):
    """Summed in pairs that a generator picks: any binary tree."""
    rest = list(terms)
    while len(rest) > 1:
        i, j = torch.randperm(len(rest), generator=generator)[:2].tolist()
        pair = rest[i] + rest[j]
        rest = [t for k, t in enumerate(rest) if k not in (i, j)] + [pair]
    return rest[0]


@pytest.mark.parametrize("kind", ["gaussian", "positive", "equal", "cancelling", "graded"])
def test_every_order_of_summation(kind):
    """The bound holds for orders that no kernel has: sorted, alternating, random trees."""
    n, generator = 60, torch.Generator().manual_seed(0)
    make = {
        "gaussian": lambda: torch.randn(n),
        "positive": lambda: torch.rand(n),
        "equal": lambda: torch.full((n,), 0.1 + float(torch.rand(()))),
        "cancelling": lambda: torch.cat((torch.rand(n // 2) + 1, -torch.rand(n // 2) - 1)),
        "graded": lambda: torch.randn(n) * 10.0 ** torch.linspace(-9, 9, n),
    }[kind]
    worst = 0.0
    for _ in range(40):
        layer = nn.Linear(n, 1)
        layer.weight.data[0] = make()
        x = torch.rand(1, n) + 0.5
        error = forward_error(layer, x)
        terms = torch.cat((layer.weight.data[0] * x[0], layer.bias.data))
        orders = [
            terms.sort().values,
            terms.sort(descending=True).values,
            terms[terms.abs().argsort()],
            terms[terms.abs().argsort(descending=True)],
            terms[torch.randperm(n + 1)],
        ]
        results = [sequential(order) for order in orders] + [as_a_tree(terms, generator)]
        bound = Fraction(float(error.at(0.0)))
        w, z = layer.weight.data[0].tolist(), x[0].tolist()
        exact = Fraction(layer.bias.item()) + sum(
            Fraction(a) * Fraction(b) for a, b in zip(w, z, strict=True)
        )
        center = abs(exact - Fraction(error.logits.item()))
        assert center <= Fraction(float(error.center_error))
        for result in results:
            off = abs(Fraction(float(result)) - exact)
            assert off <= bound
            worst = max(worst, float(off / bound))
    # A bound that nothing comes near would hide a mistake in this test.
    assert worst > (0.005 if kind != "equal" else 0.05), worst


def test_float64_against_rational_arithmetic():
    """A float64 net: its computed logits and the point that the proofs start from, exactly."""
    for _ in range(10):
        net = nn.Sequential(nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3)).double()
        x = torch.randn(1, 40, dtype=F64)
        error = forward_error(net, x)
        z = [Fraction(v) for v in x[0].tolist()]
        for layer in (net[0], net[2]):
            rows, bias = layer.weight.tolist(), layer.bias.tolist()
            z = [
                sum(Fraction(a) * b for a, b in zip(row, z, strict=True)) + Fraction(c)
                for row, c in zip(rows, bias, strict=True)
            ]
            z = [max(v, Fraction(0)) for v in z] if layer is net[0] else z
        for computed in (net(x)[0].tolist(), error.logits[0].tolist()):
            square = sum((Fraction(a) - b) ** 2 for a, b in zip(computed, z, strict=True))
            assert 0 < square <= Fraction(float(error.at(0.0))) ** 2
            assert square <= Fraction(float(error.center_error)) ** 2


def test_random_deep_nets_and_how_loose_the_bound_is(capsys):
    """Orthogonal and Gaussian nets, random and aligned inputs; prints the looseness."""
    ratios = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = []
        for trial in range(6):
            layers = []
            widths = [256, 128, 128, 128, 10]
            for a, b in itertools.pairwise(widths):
                layers += [lnn.SpectralLinear(a, b) if trial % 2 else nn.Linear(a, b)]
                layers += [lnn.GroupSort2()]
            net = lipkernels.vanilla_export(nn.Sequential(*layers[:-1])).to(dtype).eval()
            x = torch.randn(8, 256)
            x[0], x[1], x[2] = 1.0, net[0].weight[0].float().sign(), 0.1
            x[3] = net[0].weight[1].float() * 50
            found.append(assert_covered(net, x.to(dtype)))
        ratios[dtype] = max(found)
        assert ratios[dtype] > 1e-4  # the check is not vacuous
    with capsys.disabled():
        shown = ", ".join(f"{str(k)[6:]} {1 / v:.0f}" for k, v in ratios.items())
        print(f"\n  bound / largest error, deep nets: {shown}")


# ------------------------------------------------------------------------------- extreme numbers
def test_subnormal_and_tiny_numbers():
    for flush in (False, True):
        if flush and not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormal numbers")
        try:
            for scale in (1e-44, 1e-38, 1e-30, 1e-20):
                for net in (nn.Linear(50, 20), nn.Sequential(nn.Linear(50, 6), lnn.GroupSort2())):
                    net = net.eval()
                    for p in net.parameters():
                        p.data.mul_(scale)
                    for x_scale in (1.0, 1e-20, 1e-44):
                        x = torch.randn(4, 50) * x_scale
                        error = forward_error(net, x)
                        off = norms(net(x).double().detach() - error.logits)
                        assert bool((off <= error.at(0.0) + error.center_error).all())
        finally:
            torch.set_flush_denormal(False)


def test_overflow_leaves_no_radius():
    for scale, dtype in ((1e37, torch.float32), (1e4, torch.float16), (3e37, torch.bfloat16)):
        net = nn.Linear(100, 2).to(dtype)
        net.weight.data.fill_(scale)
        net.weight.data[1] *= -1
        x = torch.ones(3, 100, dtype=dtype)
        assert not torch.isfinite(net(x)).all() or float(net(x).abs().max()) > scale
        error = forward_error(net, x)
        assert bool((error.at(0.0) == math.inf).all())
        assert certified_radius(net, x).tolist() == [0.0] * 3
    # An input that is small enough has a radius, up to where the sums could overflow.
    net = nn.Linear(100, 2, bias=False)
    net.weight.data.fill_(1e34)
    net.weight.data[1] *= -1
    radius = certified_radius(net, torch.ones(1, 100))
    assert 0 < radius.item() < torch.finfo(torch.float32).max / 1e34
    assert forward_error(net, torch.ones(1, 100)).at(1e10).item() == math.inf


def test_inputs_that_are_not_finite_spoil_their_own_sample_alone():
    net = lipkernels.vanilla_export(lnn.SpectralLinear(4, 3))
    x = torch.randn(5, 4) * 5
    expected = certified_radius(net, x)
    for bad in (math.nan, math.inf, -math.inf):
        y = x.clone()
        y[2, 1] = bad
        radius = certified_radius(net, y)
        assert radius[2] == 0
        assert forward_error(net, y).at(0.0)[2] == math.inf
        keep = [0, 1, 3, 4]
        torch.testing.assert_close(radius[keep], expected[keep], rtol=1e-12, atol=0)


def test_a_scale_up_and_down_in_a_file():
    """Factors that cancel: what one flushes to zero, the next one magnifies."""
    for factors in ((1e-30, 1e30), (1e30, 1e-30)):
        graph = fx.Graph()
        node = graph.placeholder("x")
        for factor in factors:
            node = graph.call_function(operator.mul, (node, factor))
        graph.output(node)
        net = fx.GraphModule(nn.Module(), graph)
        x = torch.tensor([[1e-12, 1.0, 1e-5], [1e9, 1e-20, 3.0]])
        error = forward_error(net, x)
        ours = norms(net(x).double() - error.logits)
        assert bool((ours <= error.at(0.0)).all())


# -------------------------------------------------------------------------------------- shapes
def test_empty_batches_ties_and_views():
    net = lipkernels.vanilla_export(
        lnn.Sequential(nn.Flatten(), lnn.SpectralLinear(12, 6), lnn.GroupSort2())
    )
    assert certified_radius(net, torch.zeros(0, 3, 4)).shape == (0,)
    assert forward_error(net, torch.zeros(0, 3, 4)).at(1.0).shape == (0,)
    zero = lipkernels.vanilla_export(lnn.SpectralLinear(3, 2, bias=False))
    assert certified_radius(zero, torch.zeros(2, 3)).tolist() == [0.0, 0.0]  # a tie
    assert certified_radius(zero, -torch.zeros(2, 3)).tolist() == [0.0, 0.0]
    x = torch.randn(5, 4, 3)
    view, copied = x.transpose(1, 2), x.transpose(1, 2).contiguous()
    torch.testing.assert_close(certified_radius(net, view), certified_radius(net, copied))
    torch.testing.assert_close(certified_radius(net, view[::2]), certified_radius(net, copied)[::2])


def test_one_column_classifies_by_its_sign():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data[:] = torch.tensor([[3.0, 4.0]])
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [4.0, -3.0]])
    radius = certified_radius(layer, x)
    assert radius[:2].tolist() == pytest.approx([1.4, 1.4], rel=1e-5)
    assert bool((radius[:2] < 1.4).all()) and radius[2] == 0


def test_the_radius_of_a_linear_classifier_is_the_distance_less_the_rounding():
    layer = nn.Linear(30, 4)
    nn.init.orthogonal_(layer.weight)
    x = torch.randn(50, 30)
    for dtype, loss in ((F64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        net, y = copy.deepcopy(layer).to(dtype), x.to(dtype)
        weight = net.weight.detach().double()
        logits = y.double() @ weight.T + net.bias.detach().double()
        top = logits.topk(2, dim=1)
        i, j = top.indices.T
        distance = (top.values[:, 0] - top.values[:, 1]) / (weight[i] - weight[j]).norm(dim=1)
        radius = certified_radius(net, y)
        assert bool((radius < distance).all())
        assert bool((radius >= distance * 0.98 - loss).all())


# ------------------------------------------------------------------------------------- refusals
def test_bad_parameters_are_refused_by_name():
    for bad in (math.nan, math.inf):
        for make in (
            lambda: nn.Linear(6, 6),
            lambda: lnn.SpectralLinear(6, 6),
            lambda: nn.BatchNorm1d(6).eval(),
            lambda: nn.PReLU(6),
            lambda: lnn.LPReLU(),
        ):
            layer = make()
            next(layer.parameters()).data.view(-1)[0] = bad
            net = nn.Sequential(nn.ReLU(), nn.Sequential(layer)).eval()
            assert lipschitz_bound(net).value == math.inf
            with pytest.raises(ValueError, match=r"layer '1\.0' .*expected finite parameters"):
                certified_radius(net, torch.ones(2, 6))
    normalized = nn.BatchNorm1d(3).eval()
    normalized.running_mean[0] = math.nan
    with pytest.raises(ValueError, match="BatchNorm1d: expected finite parameters"):
        certified_radius(normalized, torch.ones(2, 3))
    normalized.running_mean[0] = 0.0
    normalized.running_var[0] = -1.0
    with pytest.raises(ValueError, match="BatchNorm1d: expected a finite Lipschitz bound"):
        certified_radius(normalized, torch.ones(2, 3))
    normalized.running_var[0] = 1e-37
    normalized.eps = 0.0
    with pytest.raises(ValueError, match="expected a variance"):
        certified_radius(normalized, torch.ones(2, 3))


class Declared(nn.Module):
    def certified_lipschitz_constant(self):
        return 1.0

    def forward(self, x):
        return x


class Louder(lnn.GroupSort2):
    def forward(self, x):
        return super().forward(x) * (1 + 1e-5)


UNPROVED = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "logsigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink,
    "householder": lambda: lnn.HouseHolder(6),
    "declared": Declared,
    "subclass": Louder,
}


@pytest.mark.parametrize("name", UNPROVED)
def test_layers_without_a_proof_are_named(name):
    net = nn.Sequential(nn.Identity(), UNPROVED[name]())
    lipschitz_bound(net)
    with pytest.raises(ValueError, match=r"layer '1' .*whose rounding is known"):
        forward_error(net, torch.ones(1, 6))


def test_a_compiled_model_is_refused():
    for pick in (lambda net: net, lambda net: net[0]):
        net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        pick(net).compile()
        with pytest.raises(ValueError, match="runs in eager mode"):
            forward_error(net, torch.ones(2, 3))
    with pytest.raises(ValueError, match="MaxPool1d: expected a layer whose rounding is known"):
        forward_error(nn.MaxPool1d(2, return_indices=True), torch.ones(2, 3, 4))


def test_layers_without_entries():
    assert forward_error(nn.Linear(3, 0), torch.ones(2, 3)).at(1.0).tolist() == [0.0, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it initializes nothing
        nothing = nn.Linear(0, 2)
    assert_covered(nothing, torch.ones(2, 0))


def test_what_lipschitz_bound_refuses_is_refused():
    hooked = nn.Linear(6, 6)
    hooked.register_forward_hook(lambda m, x, y: 2 * y)
    for layer in (nn.GELU(), nn.LayerNorm(6), nn.BatchNorm1d(6), hooked):
        with pytest.raises(TypeError, match="'1'"):
            forward_error(nn.Sequential(nn.ReLU(), layer), torch.ones(2, 6))


def test_dropout_in_training_is_refused():
    with pytest.raises(ValueError, match=r"layer '0' \(Dropout\): expected dropout in evaluation"):
        forward_error(nn.Sequential(nn.Dropout(0.1)), torch.ones(2, 3))
    assert forward_error(nn.Dropout(0.0), torch.ones(2, 3)).at(0.0).max() < 1e-30


def test_layers_that_mix_samples_are_refused():
    for layer in (
        lnn.GroupSort(2, dim=0),
        lnn.FullSort(dim=0),
        lnn.MaxMin(dim=0),
        lipkernels.vanilla_export(lnn.FullSort(dim=0)),
        nn.Flatten(0),
        nn.Unflatten(0, (2, 2)),
    ):
        with pytest.raises(ValueError, match="acts on each sample by itself"):
            forward_error(nn.Sequential(layer), torch.randn(4, 6))
    with pytest.raises(ValueError, match="samples first"):
        forward_error(nn.Conv1d(4, 4, 1), torch.randn(4, 6))  # one sample without its batch
    with pytest.raises(ValueError, match="expected a batch"):
        forward_error(nn.Linear(3, 3), torch.ones(3))


def test_bad_inputs():
    layer = nn.Linear(3, 3)
    with pytest.raises(TypeError, match="expected a Tensor, got list"):
        forward_error(layer, [1.0])
    with pytest.raises(TypeError, match="expected a floating-point dtype"):
        forward_error(layer, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="on the CPU"):
        forward_error(layer, torch.ones(2, 3, device="meta"))
    with pytest.raises(ValueError, match="on the CPU"):
        forward_error(layer.to("meta"), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"shape \(N, C\)"):
        certified_radius(nn.ReLU(), torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="radius: expected numbers >= 0"):
        forward_error(nn.ReLU(), torch.ones(2, 3)).at(-1.0)


def test_reduced_precision_is_refused():
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(ValueError, match="Linear: expected float32 products in full"):
            forward_error(layer, x)
        forward_error(copy.deepcopy(layer).double(), x.double())
    finally:
        torch.set_float32_matmul_precision(before)
    forward_error(layer, x)


def test_onednn_settings_are_refused(monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(ValueError, match="ONEDNN_DEFAULT_FPMATH_MODE unset or STRICT"):
        forward_error(nn.Linear(3, 3), torch.ones(2, 3))
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT")
    forward_error(nn.Linear(3, 3), torch.ones(2, 3))


def test_convolutions_that_may_be_winograds_are_refused(monkeypatch):
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(20, 2, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the settings that it restores
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            with pytest.raises(ValueError, match=r"Conv2d: expected oneDNN on or NNPACK off"):
                forward_error(conv, x)
            forward_error(nn.Linear(8, 8), x)  # no convolution
            with torch.backends.nnpack.flags(enabled=False):
                assert_covered(conv, x)
            assert_covered(copy.deepcopy(conv).double(), x.double())
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(ValueError, match="expected a convolution on x86-64"):
        forward_error(conv, x)
    forward_error(copy.deepcopy(conv).double(), x.double())


def test_arithmetic_that_is_not_as_assumed_is_noticed(monkeypatch):
    """A kernel that rounds more than the proof allows: refused at its layer, by name."""
    plain = nn.functional.linear

    def coarse(x, weight, bias=None):
        y = plain(x, weight, bias)
        return y.bfloat16().float() if y.dtype == torch.float32 else y

    net = nn.Sequential(nn.ReLU(), nn.Linear(50, 20))
    forward_error(net, torch.rand(4, 50))
    monkeypatch.setattr(nn.functional, "linear", coarse)
    with pytest.raises(ValueError, match=r"layer '1' \(Linear\): expected rounding errors of"):
        forward_error(net, torch.rand(4, 50))


def test_nothing_is_changed():
    net = nn.Sequential(lnn.SpectralLinear(4, 4, eps_bjorck=None), nn.BatchNorm1d(4)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(3, 4)
    kept = x.clone()
    certified_radius(net, x)
    certified_radius(nn.Sequential(nn.ReLU(inplace=True), net), x)
    assert torch.equal(x, kept)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
