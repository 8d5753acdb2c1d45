"""Constructor arguments: torch.nn's own, then the Lipschitz keywords, with their ranges."""

import inspect
import math

import pytest
import torch
from layer_table import CONSTRAINED, LAYERS, TWINS
from torch import nn

import lipkernels
import lipkernels.nn as lnn
from lipkernels import constraints

SPECTRAL = [cls for cls in TWINS if cls.__name__.startswith("Spectral")]
CONSTRAINED_CLASSES = [c for c in TWINS if c.__name__.startswith(("Spectral", "Frobenius"))]
REQUIRED = inspect.Parameter.empty


def parameters(cls):
    return inspect.signature(cls).parameters


# --------------------------------------------------------------------------------- signatures
@pytest.mark.parametrize("cls", TWINS)
def test_torch_arguments_come_first_with_torch_defaults(cls):
    theirs = [p for p in parameters(TWINS[cls]).values() if p.name not in ("device", "dtype")]
    ours = list(parameters(cls).values())
    for mine, plain in zip(ours, theirs, strict=False):
        assert mine.name == plain.name
        assert mine.kind == plain.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        if cls is not lnn.ScaledAdaptiveAvgPool2d:  # its output_size can only be one
            assert mine.default == plain.default
    others = ours[len(theirs) :]
    assert {p.kind for p in others} == {inspect.Parameter.KEYWORD_ONLY}
    assert "k_coef_lip" in [p.name for p in others]


@pytest.mark.parametrize("cls", CONSTRAINED_CLASSES)
def test_device_and_dtype_come_last(cls):
    assert list(parameters(cls))[-2:] == ["device", "dtype"]
    assert parameters(cls)["device"].default is None
    assert parameters(cls)["dtype"].default is None
    assert parameters(cls)["check"].default is False


@pytest.mark.parametrize("cls", SPECTRAL)
def test_spectral_keywords_and_their_defaults(cls):
    defaults = {
        "k_coef_lip": 1.0,
        "eps_spectral": 1e-3,
        "eps_bjorck": 1e-3,
        "beta_bjorck": None,
        "maxiter_spectral": 10,
        "maxiter_bjorck": None,
    }
    for name, value in defaults.items():
        assert parameters(cls)[name].default == value


def test_other_keywords_and_their_defaults():
    for layer in LAYERS:
        if inspect.isclass(layer.cls):
            assert parameters(layer.cls)["k_coef_lip"].default == 1.0
            assert parameters(layer.cls)["k_coef_lip"].kind == inspect.Parameter.KEYWORD_ONLY
    assert parameters(lnn.FrobeniusLinear)["disjoint_neurons"].default is True
    assert parameters(lnn.ScaledL2NormPool2d)["eps_grad_sqrt"].default == 1e-6
    assert parameters(lnn.ScaledAdaptiveL2NormPool2d)["eps_grad_sqrt"].default == 1e-6
    for cls in (lnn.ScaledAdaptiveAvgPool2d, lnn.ScaledAdaptiveL2NormPool2d):
        assert parameters(cls)["output_size"].default == (1, 1)
    for cls in (lnn.InvertibleDownSampling, lnn.InvertibleUpSampling):
        assert parameters(cls)["data_format"].default == "channels_first"
        assert parameters(cls)["mode"].default == "CRD"
        assert parameters(cls)["kernel_size"].default is REQUIRED
    for cls in (lnn.GroupSort, lnn.GroupSort2, lnn.FullSort, lnn.MaxMin, lnn.HouseHolder):
        assert parameters(cls)["dim"].default == 1
    assert parameters(lnn.GroupSort)["group_size"].default is None


def test_the_constraint_that_the_keywords_name():
    def of(**keywords):
        return lnn.SpectralLinear(3, 2, **keywords).constraint

    assert of() == constraints.PolarFactor()
    assert of(eps_bjorck=1e-5, eps_spectral=1e-2) == constraints.PolarFactor()
    assert of(eps_bjorck=None) == constraints.SpectralNormalization(10, 1e-3)
    assert of(eps_bjorck=None, maxiter_spectral=3, eps_spectral=0.1) == (
        constraints.SpectralNormalization(3, 0.1)
    )
    assert of(beta_bjorck=0.5) == constraints.Bjorck(0.5, 15, 1e-3, 10, 1e-3)
    assert of(maxiter_bjorck=4) == constraints.Bjorck(0.5, 4, 1e-3, 10, 1e-3)
    assert of(beta_bjorck=0.1, maxiter_bjorck=7, eps_bjorck=0.2) == (
        constraints.Bjorck(0.1, 7, 0.2, 10, 1e-3)
    )
    assert lnn.FrobeniusLinear(3, 2).constraint == constraints.FrobeniusNormalization(True)
    assert lnn.FrobeniusConv2d(3, 2, 1).constraint == constraints.FrobeniusNormalization(False)


def test_positional_arguments_are_those_of_torch():
    layer = lnn.SpectralConv2d(4, 6, 3, 2, 1, 2, 2, False, "reflect")
    twin = nn.Conv2d(4, 6, 3, 2, 1, 2, 2, False, "reflect")
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode"):
        assert getattr(layer, name) == getattr(twin, name)
    layer = lnn.SpectralConvTranspose2d(4, 6, 3, 2, 1, 1, 2, False, 3)
    twin = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, False, 3)
    for name in ("kernel_size", "stride", "padding", "output_padding", "groups", "dilation"):
        assert getattr(layer, name) == getattr(twin, name)
    with pytest.raises(TypeError):
        lnn.SpectralLinear(3, 2, True, 1.0)


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_a_constrained_layer_is_its_torch_twin(layer):
    assert isinstance(layer.make(), TWINS[layer.cls])
    assert isinstance(layer.make(), lnn.LipschitzModule)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.takes_dtype], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_and_device_arguments(layer, dtype):
    made = layer.make(dtype=dtype, device="cpu")
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert made(layer.input(dtype)).dtype == dtype
    assert (
        layer.make(device=torch.device("meta"))
        .state_dict()["weight" if layer.cls is not lnn.HouseHolder else "theta"]
        .is_meta
    )
    torch.set_default_dtype(torch.float64)
    try:
        assert {p.dtype for p in layer.make().parameters()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------- ranges
def linear(**keywords):
    return lnn.SpectralLinear(4, 3, **keywords)


def conv(*arguments, **keywords):
    return lnn.SpectralConv2d(2, 3, *(arguments or (3,)), **keywords)


OUT_OF_RANGE = {
    "eps_spectral zero": (linear, {"eps_spectral": 0.0}, "eps_spectral"),
    "eps_spectral negative": (linear, {"eps_spectral": -1e-3}, "eps_spectral"),
    "eps_spectral nan": (linear, {"eps_spectral": math.nan}, "eps_spectral"),
    "eps_spectral string": (linear, {"eps_spectral": "1e-3"}, "eps_spectral"),
    "eps_spectral bool": (linear, {"eps_spectral": True}, "eps_spectral"),
    "eps_spectral none": (linear, {"eps_spectral": None}, "eps_spectral"),
    "eps_bjorck zero": (linear, {"eps_bjorck": 0}, "eps_bjorck"),
    "eps_bjorck nan": (linear, {"eps_bjorck": math.nan}, "eps_bjorck"),
    "eps_bjorck string": (linear, {"eps_bjorck": "no"}, "eps_bjorck"),
    "beta_bjorck zero": (linear, {"beta_bjorck": 0.0}, "beta_bjorck"),
    "beta_bjorck negative": (linear, {"beta_bjorck": -0.1}, "beta_bjorck"),
    "beta_bjorck large": (linear, {"beta_bjorck": 0.51}, "beta_bjorck"),
    "beta_bjorck nan": (linear, {"beta_bjorck": math.nan}, "beta_bjorck"),
    "beta_bjorck string": (linear, {"beta_bjorck": "half"}, "beta_bjorck"),
    "maxiter_spectral zero": (linear, {"maxiter_spectral": 0}, "maxiter_spectral"),
    "maxiter_spectral float": (linear, {"maxiter_spectral": 3.0}, "maxiter_spectral"),
    "maxiter_spectral bool": (linear, {"maxiter_spectral": True}, "maxiter_spectral"),
    "maxiter_bjorck zero": (linear, {"maxiter_bjorck": 0}, "maxiter_bjorck"),
    "maxiter_bjorck negative": (linear, {"maxiter_bjorck": -2}, "maxiter_bjorck"),
    "maxiter_bjorck string": (linear, {"maxiter_bjorck": "3"}, "maxiter_bjorck"),
    "beta without bjorck": (linear, {"eps_bjorck": None, "beta_bjorck": 0.5}, "eps_bjorck"),
    "steps without bjorck": (linear, {"eps_bjorck": None, "maxiter_bjorck": 3}, "eps_bjorck"),
    "input_size rank": (conv, {"input_size": (6, 6, 6)}, "input_size"),
    "input_size zero": (conv, {"input_size": (6, 0)}, "input_size"),
    "input_size float": (conv, {"input_size": (6.0, 6)}, "input_size"),
    "input_size too small": (conv, {"input_size": (2, 2)}, "size"),
    "pool kernel zero": (lnn.ScaledAvgPool2d, {"kernel_size": 0}, "kernel_size"),
    "pool kernel rank": (lnn.ScaledAvgPool2d, {"kernel_size": (2, 2, 2)}, "kernel_size"),
    "pool kernel float": (lnn.ScaledL2NormPool2d, {"kernel_size": 2.0}, "kernel_size"),
    "pool stride": (lnn.ScaledAvgPool2d, {"kernel_size": 2, "stride": 0}, "stride"),
    "pool padding": (lnn.ScaledAvgPool2d, {"kernel_size": 2, "padding": -1}, "padding"),
    "pool padding wide": (lnn.ScaledL2NormPool2d, {"kernel_size": 3, "padding": 2}, "padding"),
    "divisor_override": (
        lnn.ScaledAvgPool2d,
        {"kernel_size": 2, "divisor_override": 1},
        "divisor_override",
    ),
    "count_include_pad": (
        lnn.ScaledAvgPool2d,
        {"kernel_size": 2, "padding": 1, "count_include_pad": False},
        "count_include_pad",
    ),
    "eps_grad_sqrt zero": (
        lnn.ScaledL2NormPool2d,
        {"kernel_size": 2, "eps_grad_sqrt": 0.0},
        "eps_grad_sqrt",
    ),
    "eps_grad_sqrt nan": (
        lnn.ScaledAdaptiveL2NormPool2d,
        {"eps_grad_sqrt": math.nan},
        "eps_grad_sqrt",
    ),
    "output_size": (lnn.ScaledAdaptiveAvgPool2d, {"output_size": 2}, "output_size"),
    "output_size pair": (lnn.ScaledAdaptiveL2NormPool2d, {"output_size": (1, 2)}, "output_size"),
    "output_size none": (lnn.ScaledAdaptiveAvgPool2d, {"output_size": None}, "output_size"),
    "block zero": (lnn.InvertibleDownSampling, {"kernel_size": 0}, "kernel_size"),
    "block float": (lnn.InvertibleUpSampling, {"kernel_size": 1.5}, "kernel_size"),
    "block rank": (lnn.InvertibleDownSampling, {"kernel_size": (2, 2, 2)}, "kernel_size"),
    "data_format": (
        lnn.InvertibleDownSampling,
        {"kernel_size": 2, "data_format": "NCHW"},
        "data_format",
    ),
    "mode": (lnn.InvertibleUpSampling, {"kernel_size": 2, "mode": "crd"}, "mode"),
    "group_size zero": (lnn.GroupSort, {"group_size": 0}, "group_size"),
    "group_size negative": (lnn.GroupSort, {"group_size": -2}, "group_size"),
    "group_size float": (lnn.GroupSort, {"group_size": 2.0}, "group_size"),
    "channels odd": (lnn.HouseHolder, {"channels": 3}, "channels"),
    "channels zero": (lnn.HouseHolder, {"channels": 0}, "channels"),
    "channels float": (lnn.HouseHolder, {"channels": 4.0}, "channels"),
    "num_parameters": (lnn.LPReLU, {"num_parameters": 0}, "num_parameters"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_out_of_range(name):
    make, keywords, named = OUT_OF_RANGE[name]
    with pytest.raises(ValueError, match=rf"{named}: expected .*got "):
        make(**keywords)


@pytest.mark.parametrize("cls", [c for c in SPECTRAL if "Conv" in c.__name__])
def test_ranges_hold_for_every_spectral_layer(cls):
    for keywords in (
        {"eps_spectral": 0.0},
        {"maxiter_bjorck": 0},
        {"beta_bjorck": 1.0},
        {"maxiter_spectral": -1},
        {"eps_bjorck": None, "beta_bjorck": 0.5},
    ):
        with pytest.raises(ValueError, match=r"expected .*got "):
            cls(2, 3, 3, **keywords)


K_REJECTED = [
    (0, ValueError),
    (0.0, ValueError),
    (-1.0, ValueError),
    (math.nan, ValueError),
    (math.inf, ValueError),
    (-math.inf, ValueError),
    (True, TypeError),
    ("1", TypeError),
    (None, TypeError),
    ([1.0], TypeError),
    (1j, TypeError),
]


@pytest.mark.parametrize(
    ("k", "error"), K_REJECTED, ids=lambda v: repr(v) if not inspect.isclass(v) else ""
)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_k_coef_lip_out_of_range(layer, k, error):
    with pytest.raises(error, match=r"k_coef_lip: expected .*got "):
        layer.make(k_coef_lip=k)


def test_sequential_refuses_a_layer_of_unknown_constant():
    with pytest.raises(
        ValueError, match=r"expected layers with a known Lipschitz constant.*'1'.*Linear"
    ):
        lnn.Sequential(lnn.SpectralLinear(2, 2), nn.Linear(2, 2))


def test_symmetric_padding_is_for_convolutions_alone():
    with pytest.raises(ValueError, match="padding mode"):  # torch's own message
        lnn.SpectralConvTranspose2d(2, 2, 3, padding_mode="symmetric")
    with pytest.raises(ValueError, match="padding_mode"):
        lnn.SpectralConv2d(2, 2, 3, padding_mode="mirror")


# -------------------------------------------------------------------------------------- names
def test_every_layer_is_in_the_table():
    skipped = {"LipschitzModule", "ScaledAdaptativeL2NormPool2d"}
    names = {n for n in lnn.__all__ if not n.endswith("Loss")} - skipped
    assert names == {layer.name.partition("-")[0] for layer in LAYERS}


def test_star_import():
    scope = {}
    exec("from lipkernels.nn import *", scope)
    assert set(lnn.__all__) <= scope.keys()
    assert scope["SpectralLinear"] is lnn.SpectralLinear
    for name in lnn.__all__:
        assert getattr(lnn, name).__module__.startswith("lipkernels.nn")
    scope = {}
    exec("from lipkernels import *", scope)
    assert set(lipkernels.__all__) <= scope.keys()


def test_names_of_deel_torchlip():
    assert lnn.ScaledAdaptativeL2NormPool2d is lnn.ScaledAdaptiveL2NormPool2d
    names = [
        "SpectralLinear",
        "SpectralConv1d",
        "SpectralConv2d",
        "SpectralConvTranspose2d",
        "FrobeniusLinear",
        "FrobeniusConv2d",
        "ScaledAvgPool2d",
        "ScaledAdaptiveAvgPool2d",
        "ScaledL2NormPool2d",
        "ScaledAdaptativeL2NormPool2d",
        "InvertibleDownSampling",
        "InvertibleUpSampling",
        "GroupSort",
        "GroupSort2",
        "FullSort",
        "MaxMin",
        "HouseHolder",
        "LPReLU",
        "LipschitzModule",
        "Sequential",
    ]
    assert set(names) <= set(lnn.__all__)


def test_repr_shows_the_constant():
    for layer in LAYERS:
        assert "k_coef_lip=0.25" in repr(layer.make(k_coef_lip=0.25)), layer
