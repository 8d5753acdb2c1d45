"""No linear layer exceeds its k: every constraint and format, on weights gone bad, never stale."""

import copy
import math

import pytest
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from constrained_layers import CONSTRAINTS, FORMATS, SPECTRAL, Format, linear, set_raw, weight_in
from operator_norm import assert_within, excess, operator_norm, singular_values
from tolerances import ATTAINED, LAYER_OUTPUT
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lipkernels.nn as lnn
from lipkernels import group_weights, grouped
from lipkernels.certify import lipschitz_bound

SHAPES = ((5, 5), (3, 8), (9, 4), (1, 7), (6, 1), (1, 1))
KS = (1.0, 0.37, 3.0, 1.0, 2.5e-3, 11.0)
F32 = Format(torch.float32)

each_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS)
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def excesses(constraint, weight, k):
    """By how much ``weight`` exceeds what the constraint promises (0 if it does not)."""
    if constraint != "frobenius_rows":
        return excess(weight, k)
    whole = excess(weight, k * math.sqrt(weight.shape[0]))
    return max(whole, *(excess(row[None], k) for row in weight))


# ------------------------------------------------------------------------------ weights gone bad
@each_format
@each_constraint
def test_bad_weights(constraint, fmt):
    failures = []
    case = 0
    for rows, cols in SHAPES:
        for name in BAD_WEIGHTS:
            k = KS[case % len(KS)]
            case += 1
            layer = linear(constraint, rows, cols, k_coef_lip=k, dtype=fmt.weight)
            set_raw(layer, bad_weight(name, (rows, cols), fmt.weight))
            for training in (True, False):
                weight = weight_in(layer.train(training), fmt)
                over = excesses(constraint, weight, k)
                if over:
                    failures.append((name, (rows, cols), k, training, over))
    assert not failures


@each_format
@each_constraint
def test_silly_learning_rate(constraint, fmt):
    """Real optimizer steps that are far too long; the bound after each of them."""
    k = 1.7
    layer = linear(constraint, 4, 6, bias=True, k_coef_lip=k, dtype=fmt.weight)
    rate = 20.0 if fmt.weight == torch.float16 else 1e4
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
    start = layer.raw_weight.detach().clone()
    for step in range(4):
        x = torch.randn(8, 6, dtype=fmt.weight)
        with fmt.context():
            y = layer.train()(x)
            loss = (y * torch.randn_like(y)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for training in (False, True):
            weight = weight_in(layer.train(training), fmt)
            assert excesses(constraint, weight, k) == 0.0, (step, training)
    assert (layer.raw_weight - start).abs().max() > 10


@each_format
@each_constraint
def test_forward_uses_the_weight_that_was_checked(constraint, fmt):
    """One-hot inputs read the stored weight back, bit by bit, in the format that forward has."""
    layer = linear(constraint, 5, 7, k_coef_lip=1.3, dtype=fmt.weight).eval()
    set_raw(layer, bad_weight("gaussian", (5, 7), fmt.weight))
    with fmt.context(), torch.no_grad():
        y = layer(torch.eye(7, dtype=fmt.weight))
    assert y.dtype == fmt.stored
    assert torch.equal(y.T, weight_in(layer, fmt))


# Vectors with many equal entries: their float32 sums of squares round the same way every time.
@pytest.mark.parametrize("constraint", ["polar", "spectral", "bjorck", "frobenius"])
@pytest.mark.parametrize("shape", [(1, 784), (1, 3000), (10, 1000), (2, 10_000), (20_000, 1)])
def test_long_rows(constraint, shape):
    failures = []
    for fill in (0.1, 0.25, 0.33, 0.7, 0.93):
        for weight in (torch.full(shape, fill), torch.rand(shape) + fill):
            layer = linear(constraint, *shape, k_coef_lip=2.0)
            set_raw(layer, weight)
            over = excesses(constraint, weight_in(layer, F32), 2.0)
            if over:
                failures.append((fill, over))
    assert not failures


def test_long_disjoint_rows():
    layer = linear("frobenius_rows", 3, 30_000)
    set_raw(layer, torch.tensor([0.1, 0.33, 0.7])[:, None].expand(3, 30_000))
    assert excesses("frobenius_rows", weight_in(layer, F32), 1.0) == 0.0


@pytest.mark.parametrize("constraint", ["spectral", "polar"])
def test_rounding_that_adds_up(constraint):
    """A regular Hadamard matrix with two neighbouring entries that round away from each other.

    All singular values but one are equal, so that the roundings of n^2 entries add up to sqrt(n) of
    them. Some of the scales put the two entries on either side of a rounding boundary.
    """
    h = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    signs = torch.kron(torch.kron(h, h), torch.kron(h, h))  # 256 x 256; every row sums to 16
    high = torch.tensor(1.99)
    low = torch.nextafter(high, torch.tensor(0.0))
    layer = linear(constraint, 256, 256).eval()
    set_raw(layer, torch.where(signs > 0, high, -low))
    ones = torch.ones(256, dtype=torch.float64)
    for step in range(24):
        k = 1.01 * (1 + step * 2.0**-24)
        layer.set_klip_factor(k)
        # The gain of the vector of ones, a lower bound of the norm.
        gain = (weight_in(layer, F32).double() @ ones).norm().item() / 16
        assert k * (1 - ATTAINED[torch.float32]) <= gain <= k


@pytest.mark.parametrize("constraint", ["polar", "spectral"])
def test_float32_products_in_low_precision(constraint):
    """torch's global switch to TF32 or bfloat16 products does not loosen the bound."""
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for shape in ((64, 64), (16, 300), (80, 48)):
            layer = linear(constraint, *shape)
            set_raw(layer, bad_weight("gaussian", shape, torch.float32))
            assert_within(weight_in(layer, F32), 1.0, shape)
    finally:
        torch.set_float32_matmul_precision(previous)


# ---------------------------------------------------------------------- the bound is attained, too
@each_format
@pytest.mark.parametrize("constraint", ["polar", "spectral", "bjorck", "frobenius"])
def test_bound_is_attained(constraint, fmt):
    """Zero would be sound as well: what should be on the bound is on it."""
    k = 0.8
    for shape in ((6, 6), (4, 9), (9, 4), (1, 5)):
        layer = linear(constraint, *shape, k_coef_lip=k, dtype=fmt.weight)  # orthogonal at first
        if constraint == "spectral":
            set_raw(layer, bad_weight("gaussian", shape, fmt.weight))
        weight = weight_in(layer, fmt).double()
        tolerance = ATTAINED[fmt.stored]
        if constraint == "frobenius":
            assert weight.norm() >= k * (1 - tolerance)
        elif constraint == "spectral":
            assert singular_values(weight)[0] >= k * (1 - tolerance)
        else:
            assert singular_values(weight).min() >= k * (1 - tolerance)


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_polar_factor_of_a_gaussian_is_orthogonal(fmt):
    layer = linear("polar", 24, 24, dtype=fmt.weight)
    set_raw(layer, bad_weight("gaussian", (24, 24), fmt.weight))
    assert singular_values(weight_in(layer, fmt)).min() >= 1 - ATTAINED[fmt.weight]


def test_zero_stays_zero():
    for constraint in CONSTRAINTS:
        layer = linear(constraint, 3, 4)
        set_raw(layer, torch.zeros(3, 4))
        assert torch.equal(layer.weight, torch.zeros(3, 4))


# -------------------------------------------------------------------------------------- extreme k
@each_format
@each_constraint
def test_tiny_k(constraint, fmt):
    """Down to the subnormal numbers of the format, where rounding is absolute."""
    info = torch.finfo(fmt.stored)
    ks = [1e-4, 1e-6, info.smallest_normal, info.smallest_normal * info.eps * 7.3]
    ks += [info.smallest_normal * 3.3, info.smallest_normal * info.eps]
    failures = []
    for k in ks:
        for name in ("gaussian", "constant", "rank deficient", "duplicate rows"):
            layer = linear(constraint, 6, 5, k_coef_lip=k, dtype=fmt.weight)
            set_raw(layer, bad_weight(name, (6, 5), fmt.weight))
            over = excesses(constraint, weight_in(layer, fmt), k)
            if over:
                failures.append((k, name, over))
    assert not failures


@each_format
@each_constraint
def test_large_k(constraint, fmt):
    limit = torch.finfo(fmt.stored).max
    if constraint == "frobenius_rows":
        limit /= 2  # its promise for the whole layer is twice k
    for k in (1e3, 3e4, limit):
        layer = linear(constraint, 4, 5, k_coef_lip=k, dtype=fmt.weight)
        for name in ("gaussian", "constant"):
            set_raw(layer, bad_weight(name, (4, 5), fmt.weight))
            assert excesses(constraint, weight_in(layer, fmt), k) == 0.0, (k, name)


@each_constraint
@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.stored == torch.float16], ids=str)
def test_k_beyond_float16_is_refused(constraint, fmt):
    layer = linear(constraint, 4, 5, k_coef_lip=1e5, dtype=fmt.weight)
    with pytest.raises(ValueError, match=r"expected at most 65504.*got 100000"):
        weight_in(layer, fmt)


# ------------------------------------------------------------------------------ dtype conversions
CONVERSIONS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "float": (lambda m: m.float(), torch.float32),
    "to_float16": (lambda m: m.to(torch.float16), torch.float16),
    "to_cpu_bfloat16": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "there_and_back": (lambda m: m.half().float(), torch.float32),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@each_constraint
def test_converted_modules(constraint, conversion):
    convert, dtype = CONVERSIONS[conversion]
    for name in ("gaussian", "rank one plus noise", "spike", "zero"):
        layer = linear(constraint, 7, 5, k_coef_lip=0.9)
        set_raw(layer, bad_weight(name, (7, 5), torch.float32))
        layer(torch.zeros(1, 5))  # a power-iteration vector from before the conversion
        layer = convert(layer)
        for training in (True, False, True):
            weight = weight_in(layer.train(training), Format(dtype))
            assert excesses(constraint, weight, 0.9) == 0.0, name
        assert layer(torch.zeros(2, 5, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("constraint", ["spectral", "bjorck"])
def test_power_iteration_vector_gone_bad(constraint):
    """The warm start is never trusted: not a stale one, not zero, not NaN."""
    for name in ("gaussian", "near ties", "rank one plus noise", "spike on noise"):
        weight = bad_weight(name, (6, 8), torch.float32)
        left, _, _ = torch.linalg.svd(weight)
        starts = (left[:, -1], torch.zeros(6), torch.full((6,), math.nan), left[:, 1])
        for start in starts:
            layer = linear(constraint, 6, 8)
            set_raw(layer, weight)
            layer.u.copy_(start)
            assert_within(weight_in(layer.eval(), F32), 1.0, (name, start))


# ---------------------------------------------------------------------------------- never stale
STALE_LAYERS = {
    **{name: lambda name=name, **kw: linear(name, 5, 6, bias=True, **kw) for name in CONSTRAINTS},
    "conv": lambda **kw: lnn.SpectralConv1d(6, 5, 3, padding=1, **kw),
    "frobenius_conv": lambda **kw: lnn.FrobeniusConv1d(6, 5, 3, padding=1, **kw),
    "conv_transpose": lambda **kw: lnn.SpectralConvTranspose1d(6, 5, 3, padding=1, **kw),
}


def stale_input(layer):
    return torch.randn(3, 6) if isinstance(layer, nn.Linear) else torch.randn(3, 6, 4)


def step(layer, x):
    optimizer = torch.optim.SGD(layer.parameters(), lr=30.0)
    layer.train()(x).square().sum().backward()
    optimizer.step()
    return layer.eval()


def write_data(layer, x):
    layer.raw_weight.data = torch.randn_like(layer.raw_weight)
    layer.raw_weight.data.mul_(5).add_(0.1)
    return layer


def load(layer, x):
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    return layer


def load_assign(layer, x):
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    return layer


def new_parameter(layer, x):
    layer.weight = nn.Parameter(torch.randn_like(layer.raw_weight))
    return layer


def constant_set(layer, x):
    layer.set_klip_factor(0.25)
    return layer


def condensed_then_written(layer, x):
    layer.condense()
    return write_data(layer, x)


CHANGES = (
    step,
    write_data,
    load,
    load_assign,
    new_parameter,
    constant_set,
    condensed_then_written,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", STALE_LAYERS)
def test_nothing_is_stale(kind, change):
    """After a change, eval gives what a new layer with the same raw weight gives."""
    layer = STALE_LAYERS[kind](k_coef_lip=1.5).eval()
    x = stale_input(layer)
    before = layer(x).detach()
    layer = change(layer, x)
    after = layer(x).detach()
    fresh = STALE_LAYERS[kind](k_coef_lip=layer.k_coef_lip).eval()
    fresh.load_state_dict(layer.state_dict())
    tolerance = LAYER_OUTPUT[torch.float32]
    torch.testing.assert_close(after, fresh(x).detach(), rtol=tolerance, atol=tolerance)
    assert (after - before).abs().max() > 1e-3
    bound = 1 if kind != "frobenius_rows" else math.sqrt(5)
    assert lipschitz_bound(layer).value <= layer.k_coef_lip * bound * (1 + 1e-6)


@pytest.mark.parametrize("kind", STALE_LAYERS)
def test_functional_call_uses_the_weight_passed(kind):
    layer = STALE_LAYERS[kind](k_coef_lip=1.5).eval()
    other = STALE_LAYERS[kind](k_coef_lip=1.5).eval()
    set_raw(other, torch.randn_like(other.raw_weight) * 100)
    x = stale_input(layer)
    own = layer(x)
    tolerance = LAYER_OUTPUT[torch.float32]
    swapped = functional_call(layer, dict(other.state_dict()), (x,))
    torch.testing.assert_close(swapped, other(x), rtol=tolerance, atol=tolerance)
    assert (swapped - own).abs().max() > 1e-3
    torch.testing.assert_close(layer(x), own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("switch", [False, True])
def test_functional_call_of_a_grouped_model(switch):
    model = nn.Sequential(lnn.SpectralLinear(4, 4), lnn.SpectralLinear(4, 3, eps_bjorck=None))
    other = copy.deepcopy(model)
    for layer in other:
        set_raw(layer, torch.randn_like(layer.raw_weight) * 100)
    x = torch.randn(5, 4)
    expected = other(x)
    handle = group_weights(model) if switch else None
    got = functional_call(model, dict(other.state_dict()), (x,))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if handle is not None:
        handle.remove()


@pytest.mark.parametrize("kind", STALE_LAYERS)
@pytest.mark.parametrize("average", ["mean", "ema"])
def test_averaged_copies(kind, average):
    """An AveragedModel constrains the average of the raw weights, not the live model's weight."""
    layer = STALE_LAYERS[kind](k_coef_lip=1.5)
    rule = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if average == "ema" else {}
    averaged = AveragedModel(layer, **rule)
    x = stale_input(layer)
    raw = []
    for _ in range(3):
        step(layer, x)
        averaged.update_parameters(layer)
        raw.append(layer.raw_weight.detach().clone())
    if average == "ema":
        expected = 0.25 * raw[0] + 0.25 * raw[1] + 0.5 * raw[2]
    else:
        expected = (raw[0] + raw[1] + raw[2]) / 3
    torch.testing.assert_close(averaged.module.raw_weight.detach(), expected)
    averaged.eval()
    fresh = STALE_LAYERS[kind](k_coef_lip=1.5).eval()
    fresh.load_state_dict(averaged.module.state_dict())
    torch.testing.assert_close(averaged(x), fresh(x), rtol=1e-5, atol=1e-5)
    assert (averaged(x) - layer.eval()(x)).abs().max() > 1e-3
    if kind in CONSTRAINTS:
        weight = averaged.module.weight.detach()
        assert excesses(kind, weight, 1.5) == 0.0


@each_constraint
def test_grouped_forward_is_as_sound(constraint):
    """The weights that one call computes for a whole model, seen from inside its forward."""
    names = ("gaussian", "rank deficient", "spike on noise", "constant")
    layers = [linear(constraint, 5, 5, k_coef_lip=0.5 + i) for i in range(len(names))]
    for layer, name in zip(layers, names, strict=True):
        set_raw(layer, bad_weight(name, (5, 5), torch.float32))
    model = nn.Sequential(*layers)
    seen = []
    for layer in layers:
        layer.register_forward_hook(
            lambda layer, args, y: seen.append((layer.weight.detach(), layer.k_coef_lip))
        )
    x = torch.randn(2, 5)
    alone = model(x)
    seen.clear()
    with grouped(model):
        for _ in range(2):
            torch.testing.assert_close(model(x), alone, rtol=1e-5, atol=1e-6)
            for layer in layers:  # between two forwards, inside the context
                layer.raw_weight.data.mul_(2.0)  # exact: the same weight
    assert len(seen) == 2 * len(layers)
    assert all(excesses(constraint, weight, k) == 0.0 for weight, k in seen)


@each_constraint
def test_grouped_weights_end_with_the_forward(constraint):
    """A layer called by itself, after the model's forward and after the switch, is not stale."""
    model = nn.Sequential(linear(constraint, 4, 4), linear(constraint, 4, 4)).eval()
    layer, fresh = model[0], linear(constraint, 4, 4).eval()
    x = torch.randn(3, 4)
    switch = group_weights(model)
    for on in (True, False):
        model(x)
        if not on:
            switch.remove()
        set_raw(layer, torch.randn(4, 4))
        fresh.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), fresh(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.autocast is not None], ids=str)
def test_grouped_forward_under_autocast(fmt):
    """Prepared in one format, asked for in another: the layer makes its own weight."""
    layers = [lnn.SpectralLinear(6, 6, dtype=fmt.weight) for _ in range(2)]
    model = nn.Sequential(*layers)
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, y: seen.append((layer.weight, y.dtype)))
    x = torch.randn(2, 6, dtype=fmt.weight)
    with grouped(model):
        with fmt.context():
            model(x)
        model(x)
    formats = [weight.dtype for weight, _ in seen]
    assert formats == [fmt.stored] * 2 + [fmt.weight] * 2
    for weight, _ in seen:
        assert_within(weight.detach(), 1.0)


def test_autocast_within_a_grouped_forward():
    """A model that switches autocast on inside its own forward."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = lnn.SpectralLinear(16, 16, bias=False)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layer(x)

    model = Mixed().eval()
    with grouped(model):
        assert_within(model(torch.eye(16)), 1.0)


# ------------------------------------------------------------------------------------- condensing
@each_format
@each_constraint
def test_condensed_and_exported_weights(constraint, fmt):
    """What condense() and vanilla_export() store keeps the bound as stored."""
    layer = linear(constraint, 6, 9, k_coef_lip=1.2, dtype=fmt.weight)
    set_raw(layer, bad_weight("gaussian", (6, 9), fmt.weight))
    with fmt.context():
        exported = layer.vanilla_export()
        layer.condense()
    assert type(exported) is nn.Linear
    assert exported.weight.dtype == layer.raw_weight.dtype == fmt.weight
    assert excesses(constraint, exported.weight.detach(), 1.2) == 0.0
    assert excesses(constraint, layer.raw_weight.detach(), 1.2) == 0.0
    for _ in range(3):
        layer.condense()
    assert excesses(constraint, weight_in(layer, fmt), 1.2) == 0.0


def test_fine_tuning_an_export_leaves_the_original_alone():
    layer = lnn.SpectralLinear(5, 5)
    exported = layer.vanilla_export()
    exported.weight.data.mul_(4)
    exported.bias.data.add_(1)
    assert operator_norm(exported.weight) > 3
    assert_within(layer.weight, 1.0)
    assert_within(layer.raw_weight, 1.0 + 1e-6)


@pytest.mark.parametrize("constraint", SPECTRAL)
def test_not_finite_weights(constraint):
    """NaN and infinity are not hidden: NaN comes out, or an error with check=True."""
    for bad in (math.nan, math.inf, -math.inf):
        layer = linear(constraint, 4, 3)
        layer.raw_weight.data[1, 2] = bad
        assert bool(torch.isnan(layer.weight).all())
        layer.check = True
        with pytest.raises(ValueError, match="expected finite entries, got 1"):
            _ = layer.weight
        layer.check = False
        set_raw(layer, torch.randn(4, 3))  # and it recovers, in training too
        assert excesses(constraint, layer.weight, 1.0) == 0.0
