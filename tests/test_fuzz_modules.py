"""Random calls of layers, losses, parametrizations, and of what works on whole models."""

import contextlib
import copy
import os
import warnings

import pytest
import torch
from fuzzing import CALLS, FLOATS, call, contiguous, dtypes, finite, same, shapes, tensors, within
from hypothesis import given
from hypothesis import strategies as st
from layer_table import LAYERS
from operator_norm import assert_within
from torch import nn
from torch.nn.utils import parametrize

import lipkernels as lk
import lipkernels.nn as lnn
from lipkernels import certify, checkpoint, parametrizations

MODERATE = st.sampled_from(("normal", "zero", "constant", "ties"))


# --------------------------------------------------------------------------------------- layers
@st.composite
def layers_and_inputs(draw):
    """A layer with random raw weights, and an input that fits in most cases."""
    layer = draw(st.sampled_from(LAYERS))
    module = layer.make()
    for p in module.parameters():
        p.data.copy_(draw(tensors(shape=st.just(tuple(p.shape)), dtype=st.just(p.dtype))))
    module.train(draw(st.booleans()))
    fits = draw(st.integers(0, 4))
    shape = st.just(layer.shape)
    if fits == 0:
        shape = shapes()
    elif fits == 1:  # another batch size, none included
        shape = st.integers(0, 3).map(lambda n: (n, *layer.shape[1:]))
    return layer, module, draw(tensors(shape=shape, dtype=dtypes(6)))


@given(layers_and_inputs())
def test_layers(drawn):
    _, module, x = drawn
    name = type(module).__name__
    twin = copy.deepcopy(module)
    y = call(name, module, x)
    again = call(name, twin, contiguous(x))
    assert (y is None) == (again is None), name
    within(module)
    if y is None:
        return
    y = y[0]
    assert y.dtype == again[0].dtype and y.shape == again[0].shape
    if x.dtype not in FLOATS:
        assert same(y, again[0]), name
    numbers = [x, *module.parameters()]
    # Elsewhere a sum may overflow in one order and not in another.
    if all(t.dtype in FLOATS and finite(t) and bool((t.abs() < 100).all()) for t in numbers):
        # A convolution of another memory layout may sum in another order.
        torch.testing.assert_close(y, again[0], rtol=2e-2, atol=2e-2)
        assert finite(y), name
        z = contiguous(x).requires_grad_()
        module(z).sum().backward()
        assert finite(z.grad), name


@given(st.data())
def test_models(data):
    """Condense, export, group, certify and save: the same function each time, or a refusal."""
    layer, module, x = data.draw(layers_and_inputs())
    model = nn.Sequential(module).eval()
    reference = call("forward", model, x)
    if reference is None or not all(map(finite, (x, *model.parameters()))):
        x = layer.input()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for p in model.parameters():
                p.data.normal_()
        reference = call("forward", model, x)
    expected = reference[0]
    # torch's own PixelUnshuffle, which an export may be, leaves an empty batch in its shape.
    small_enough = expected.dtype == torch.float32 and finite(expected) and x.numel() > 0
    small_enough = small_enough and bool((expected.abs() < 1e6).all())

    with lk.grouped(model):
        assert same(call("grouped", model, x)[0], expected)
    switch = lk.group_weights(model)
    assert same(call("group_weights", model, x)[0], expected)
    switch.remove()

    plain = call("vanilla_export", lk.vanilla_export, model)[0]
    bound = certify.lipschitz_bound(model)
    CALLS["lipschitz_bound"] += 1
    promised = module.lipschitz_constant
    within(module)
    # Where a layer's singular values lie within 1e-5, its bound is a few 1e-6 loose, not 1e-9.
    assert float(bound) <= promised * (1 + 1e-5)
    if small_enough:
        close = {
            "rtol": 1e-3,
            "atol": 1e-3 * float(1 + expected.detach().abs().max() if expected.numel() else 1),
        }
        if x.dtype == torch.float32:
            torch.testing.assert_close(plain(x), expected, **close)

    path = data.draw(st.just(PATH))
    checkpoint.save(model, path)
    other = nn.Sequential(layer.make()).eval()
    call("load", checkpoint.load, path, into=other)
    assert all(same(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))

    call("condense", lk.condense, model)
    within(module)
    assert float(certify.lipschitz_bound(model)) <= promised * (1 + 1e-5)


PATH = ""


@pytest.fixture(autouse=True, scope="module")
def _path(tmp_path_factory):
    global PATH
    PATH = os.path.join(tmp_path_factory.mktemp("fuzz"), "model.pt")


# ------------------------------------------------------------------------------ constructors
INTEGERS = st.integers(-1, 5) | st.sampled_from((2.0, None, "2", True, (2, 1), (1, 2, 3)))
CONSTANTS = st.sampled_from((1.0, 2, 0.5, 0, -1.0, float("nan"), float("inf"), "1", None, True))
KEYWORDS = {
    "k_coef_lip": CONSTANTS,
    "eps_spectral": CONSTANTS,
    "eps_bjorck": CONSTANTS,
    "beta_bjorck": CONSTANTS,
    "maxiter_spectral": INTEGERS,
    "maxiter_bjorck": INTEGERS,
    "disjoint_neurons": st.booleans(),
    "dim": st.integers(-3, 3),
    "group_size": INTEGERS,
    "channels": INTEGERS,
    "num_parameters": INTEGERS,
    "kernel_size": INTEGERS,
    "stride": INTEGERS,
    "padding": INTEGERS,
    "ceil_mode": st.booleans(),
    "divisor_override": st.none() | st.just(2),
    "count_include_pad": st.booleans(),
    "output_size": INTEGERS,
    "eps_grad_sqrt": CONSTANTS,
    "data_format": st.sampled_from(("channels_first", "channels_last", "NCHW")),
    "mode": st.sampled_from(("CRD", "DCR", "crd")),
}
OWN_ARGUMENTS = {
    lnn.SpectralLinear: (
        "k_coef_lip",
        "eps_spectral",
        "eps_bjorck",
        "beta_bjorck",
        "maxiter_spectral",
        "maxiter_bjorck",
    ),
    lnn.FrobeniusLinear: ("k_coef_lip", "disjoint_neurons"),
    lnn.GroupSort: ("group_size", "dim", "k_coef_lip"),
    lnn.GroupSort2: ("dim", "k_coef_lip"),
    lnn.FullSort: ("dim", "k_coef_lip"),
    lnn.MaxMin: ("dim", "k_coef_lip"),
    lnn.Abs: ("k_coef_lip",),
    lnn.HouseHolder: ("channels", "dim", "k_coef_lip"),
    lnn.LPReLU: ("num_parameters", "k_coef_lip"),
    lnn.ScaledAvgPool2d: (
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
        "k_coef_lip",
    ),
    lnn.ScaledL2NormPool2d: (
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "k_coef_lip",
        "eps_grad_sqrt",
    ),
    lnn.ScaledAdaptiveAvgPool2d: ("output_size", "k_coef_lip"),
    lnn.ScaledAdaptiveL2NormPool2d: ("output_size", "k_coef_lip", "eps_grad_sqrt"),
    lnn.InvertibleDownSampling: ("kernel_size", "data_format", "mode", "k_coef_lip"),
    lnn.InvertibleUpSampling: ("kernel_size", "data_format", "mode", "k_coef_lip"),
    parametrizations.PolarFactor: ("k_coef_lip",),
    parametrizations.SpectralNormalization: ("k_coef_lip", "eps_spectral", "maxiter_spectral"),
    parametrizations.Bjorck: (
        "k_coef_lip",
        "eps_spectral",
        "eps_bjorck",
        "beta_bjorck",
        "maxiter_spectral",
        "maxiter_bjorck",
    ),
    parametrizations.FrobeniusNormalization: ("k_coef_lip", "disjoint_neurons"),
}
REQUIRED = {"kernel_size", "channels"}


@given(st.data())
def test_constructors(data):
    cls = data.draw(st.sampled_from(list(OWN_ARGUMENTS)))
    names = OWN_ARGUMENTS[cls]
    keywords = {
        name: data.draw(KEYWORDS[name], name)
        for name in names
        if name in REQUIRED or data.draw(st.booleans())
    }
    positional = (3, 2) if cls in (lnn.SpectralLinear, lnn.FrobeniusLinear) else ()
    got = call(cls.__name__, cls, *positional, **keywords)
    if got is None:
        return
    x = {"Linear": torch.randn(2, 3)}.get(cls.__name__[-6:])
    x = data.draw(tensors(shape=shapes(2, 4), dtype=st.just(torch.float64))) if x is None else x
    call(cls.__name__, got[0], x)


CONVOLUTIONS = {
    lnn.SpectralConv1d: 1,
    lnn.SpectralConv2d: 2,
    lnn.SpectralConv3d: 3,
    lnn.FrobeniusConv1d: 1,
    lnn.FrobeniusConv2d: 2,
    lnn.FrobeniusConv3d: 3,
    lnn.SpectralConvTranspose1d: 1,
    lnn.SpectralConvTranspose2d: 2,
    lnn.SpectralConvTranspose3d: 3,
}


@given(st.data())
def test_convolutions(data):
    """Any geometry that a torch convolution takes; what it refuses is refused here."""
    cls = data.draw(st.sampled_from(list(CONVOLUTIONS)))
    n, transposed = CONVOLUTIONS[cls], "Transpose" in cls.__name__
    groups = data.draw(st.integers(1, 2))
    sizes = [data.draw(st.integers(1, 3)) for _ in range(3)]
    arguments = {
        "in_channels": groups * data.draw(st.integers(1, 2)),
        "out_channels": groups * data.draw(st.integers(1, 2)),
        "kernel_size": sizes[0],
        "stride": sizes[1],
        "padding": data.draw(st.integers(0, 2)),
        "dilation": sizes[2],
        "groups": groups,
        "bias": data.draw(st.booleans()),
    }
    if not transposed:
        modes = ("zeros", "reflect", "replicate", "circular", "symmetric")
        arguments["padding_mode"] = data.draw(st.sampled_from(modes))
    module = cls(**arguments).double().eval()
    CALLS[cls.__name__] += 1
    raw = tensors(shape=st.just(tuple(module.raw_weight.shape)), dtype=st.just(torch.float64))
    module.raw_weight.data.copy_(data.draw(raw))
    spatial = [data.draw(st.integers(0, 5)) for _ in range(n)]
    shape = (data.draw(st.integers(0, 2)), arguments["in_channels"], *spatial)
    x = data.draw(tensors(shape=st.just(shape), dtype=st.just(torch.float64), values=MODERATE))
    y = call(cls.__name__, module, x)
    within(module)
    if y is None or not finite(module.raw_weight) or not x.numel():
        return
    z = x + torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    gap = torch.linalg.vector_norm(y[0] - module(z)).detach()
    assert float(gap) <= module.k_coef_lip * float(torch.linalg.vector_norm(x - z)) * (1 + 1e-12)


# ------------------------------------------------------------------------------ parametrizations
@given(st.data())
def test_parametrizations(data):
    kinds = (
        parametrizations.PolarFactor,
        parametrizations.SpectralNormalization,
        parametrizations.Bjorck,
        parametrizations.FrobeniusNormalization,
    )
    kind = data.draw(st.sampled_from(kinds))
    k = data.draw(st.sampled_from((1.0, 0.3, 5)))
    weight = data.draw(tensors(shape=shapes(0, 4, 5), dtype=dtypes(6)))
    got = call(kind.__name__, kind(k), weight)
    if got is None:
        return
    result = got[0]
    assert result.shape == weight.shape and result.dtype == weight.dtype
    if finite(weight) and weight.numel():
        assert_within(result.reshape(weight.shape[0], -1), k, kind.__name__)
    module = nn.Module()
    if weight.is_floating_point():
        module.weight = nn.Parameter(contiguous(weight))
        parametrize.register_parametrization(module, "weight", kind(k))
        assert module.weight.shape == weight.shape


# ---------------------------------------------------------------------------------------- losses
LOSSES = {
    "KRLoss": lambda r: lnn.KRLoss(reduction=r),
    "NegKRLoss": lambda r: lnn.NegKRLoss(reduction=r),
    "HingeMarginLoss": lambda r: lnn.HingeMarginLoss(0.7, reduction=r),
    "HKRLoss": lambda r: lnn.HKRLoss(0.5, reduction=r),
    "KRMulticlassLoss": lambda r: lnn.KRMulticlassLoss(reduction=r),
    "HingeMulticlassLoss": lambda r: lnn.HingeMulticlassLoss(reduction=r),
    "HKRMulticlassLoss": lambda r: lnn.HKRMulticlassLoss(0.5, reduction=r),
    "SoftHKRMulticlassLoss": lambda r: lnn.SoftHKRMulticlassLoss(0.5, reduction=r),
    "LseHKRMulticlassLoss": lambda r: lnn.LseHKRMulticlassLoss(0.5, reduction=r),
    "CategoricalHingeLoss": lambda r: lnn.CategoricalHingeLoss(1.0, reduction=r),
    "TauCrossEntropyLoss": lambda r: lnn.TauCrossEntropyLoss(3.0, reduction=r),
    "TauBCEWithLogitsLoss": lambda r: lnn.TauBCEWithLogitsLoss(3.0, reduction=r),
    "MarginCrossEntropyLoss": lambda r: lnn.MarginCrossEntropyLoss(reduction=r),
}


@given(
    st.sampled_from(list(LOSSES)),
    st.sampled_from(("mean", "sum", "none")),
    tensors(shape=shapes(2, 2, 5) | shapes(0, 3, 4), dtype=dtypes(8)),
    tensors(shape=shapes(0, 2, 5), dtype=dtypes(2)),
    st.sampled_from(("as drawn", "indices", "one-hot", "signs")),
)
def test_losses(name, reduction, f, target, labels):
    if labels != "as drawn" and f.dim() == 2 and f.shape[1]:
        index = torch.arange(f.shape[0]) % f.shape[1]
        one_hot = nn.functional.one_hot(index, f.shape[1])
        target = {"indices": index, "one-hot": one_hot, "signs": 2 * one_hot - 1}[labels]
    loss = LOSSES[name](reduction)
    got = call(name, loss, f, target)
    # A new one: the temperature of a soft loss follows the logits that it has seen.
    again = call(name, LOSSES[name](reduction), contiguous(f), contiguous(target))
    assert (got is None) == (again is None)
    if got is None:
        return
    torch.testing.assert_close(got[0], again[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    if finite(f) and (not f.numel() or f.double().abs().max() < 1e3):
        assert finite(got[0]), name
        z = contiguous(f).requires_grad_()
        loss(z, target).sum().backward()
        assert finite(z.grad), name


ONE_ARGUMENT = (
    "HingeMarginLoss",
    "HingeMulticlassLoss",
    "CategoricalHingeLoss",
    "TauCrossEntropyLoss",
    "TauBCEWithLogitsLoss",
)


@given(st.sampled_from(list(LOSSES)), CONSTANTS, CONSTANTS, st.sampled_from(("mean", "max", None)))
def test_loss_arguments(name, first, second, reduction):
    cls = getattr(lnn, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an alpha above 1 is mapped, with a warning
        if name in ("KRLoss", "NegKRLoss", "KRMulticlassLoss"):
            call(name, cls, reduction=reduction)
        elif name in ONE_ARGUMENT:
            call(name, cls, first, reduction=reduction)
        else:
            call(name, cls, first, second, reduction=reduction)


# ------------------------------------------------------------------------- containers and checks
PLAIN = (
    lambda: nn.Linear(4, 4),
    lambda: nn.ReLU(),
    lambda: nn.LayerNorm(4),
    lambda: nn.Dropout(0.3),
    lambda: nn.BatchNorm1d(4),
    lambda: nn.Softplus(),
    lambda: nn.LeakyReLU(-3.0),
    lambda: nn.Identity(),
    lambda: lnn.SpectralLinear(4, 4, k_coef_lip=3.0),
    lambda: lnn.FrobeniusLinear(4, 4),
    lambda: lnn.GroupSort2(),
    lambda: lnn.Abs(k_coef_lip=0.2),
    lambda: nn.Sequential(lnn.SpectralLinear(4, 4), nn.Tanh()),
    lambda: lnn.Sequential(lnn.SpectralLinear(4, 4), nn.Tanh(), k_coef_lip=7.0),
)


@given(
    st.lists(st.sampled_from(PLAIN), max_size=4),
    CONSTANTS,
    tensors(shape=st.just((3, 4)), dtype=st.just(torch.float32)),
)
def test_sequential(makers, k, x):
    got = call("Sequential", lambda: lnn.Sequential(*(make() for make in makers), k_coef_lip=k))
    plain = nn.Sequential(*(make() for make in makers)).eval()
    for module in plain:
        constant = certify.constant_without_weights(module)
        CALLS["constant_without_weights"] += 1
        assert constant is None or constant >= 0
    with contextlib.suppress(TypeError):  # a layer without a rule
        CALLS["lipschitz_bound"] += 1
        assert float(certify.lipschitz_bound(plain)) >= 0
    if got is None:
        return
    model = got[0].eval()
    assert model.layers_constant() <= k * (1 + 1e-9)
    y = call("Sequential", model, x)
    assert float(certify.lipschitz_bound(model)) <= k * (1 + 1e-6)
    if y is not None and finite(x) and x.abs().max() < 1e3:
        assert finite(y[0])


@given(st.data())
def test_conv_padding(data):
    mode = data.draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")))
    padding = data.draw(st.integers(0, 2) | st.sampled_from(("same", "valid")))
    kernel, dilation = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    conv = nn.Conv1d(1, 1, kernel, padding=padding, padding_mode=mode, dilation=dilation)
    ((left, right),) = call("conv_padding", certify.conv_padding, conv)[0]
    size = 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about even kernels
        outputs = conv(torch.zeros(1, 1, size)).shape[-1]
    assert outputs == size + left + right - dilation * (kernel - 1)


# ------------------------------------------------------------------------------------ checkpoint
plain_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
contents = st.recursive(
    plain_values | tensors() | st.sampled_from((b"x", {1}, torch.float32, print)),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=6,
)


@given(contents)
def test_checkpoints(content):
    if call("save", checkpoint.save, content, PATH) is None:
        return
    loaded = call("load", checkpoint.load, PATH)[0]
    assert_same_content(loaded, content)
    with open(PATH, "rb") as file:
        data = file.read()
    CALLS["replaced_atomically"] += 1
    with checkpoint.replaced_atomically(PATH) as file:
        file.write(data[: len(data) // 2])
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(PATH)


def assert_same_content(a, b):
    if isinstance(b, dict):
        b = {key: value for key, value in b.items() if key != "lipschitz_bound"}
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(b, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_content(x, y)
    else:
        assert same(a, b)
