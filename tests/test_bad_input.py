"""Bad input: a ValueError or TypeError says what was expected and what came; nothing changes."""

import math

import pytest
import subprocesses
import torch
from layer_table import CONSTRAINED, LAYERS
from torch import nn

import lipkernels
import lipkernels.nn as lnn
from lipkernels import BackendUnavailableError, backends
from lipkernels import functional as F
from lipkernels.kernels.implemented import IMPLEMENTED

EXPECTED_AND_GOT = r"(?s)expected.*got"


def state(module):
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    constants = [m.k_coef_lip for m in module.modules() if isinstance(m, lnn.LipschitzModule)]
    copies = {name: t.detach().clone() for name, t in tensors.items()}
    return repr(module), module.training, constants, copies


def assert_refused(module, call, *, error=(ValueError, TypeError), match=EXPECTED_AND_GOT):
    before = state(module)
    with pytest.raises(error, match=match) as caught:
        call()
    after = state(module)
    assert after[:3] == before[:3]
    for name, t in after[3].items():
        assert torch.equal(t.nan_to_num(7.0), before[3][name].nan_to_num(7.0)), name
    return str(caught.value)


# -------------------------------------------------------------------------------- layers' inputs
@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_wrong_number_of_channels(layer):
    module, x = layer.trained(), layer.input()
    channels = 1 if x.dim() > 2 else -1
    for n in (0, 1, x.shape[channels] + 1):
        shape = list(x.shape)
        shape[channels] = n
        message = assert_refused(module, lambda s=shape: module(torch.zeros(s)), error=ValueError)
        assert f"expected {x.shape[channels]} " in message and f"got {n}" in message


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_wrong_rank(layer):
    module, x = layer.trained(), layer.input()
    ranks = [0] if x.dim() == 2 else [0, 1, x.dim() - 2, x.dim() + 1]
    for rank in ranks:
        y = torch.zeros((4,) * rank)
        message = assert_refused(module, lambda y=y: module(y), error=ValueError)
        assert "dimensions" in message and str(tuple(y.shape)) in message


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64],
)
def test_wrong_dtype(layer, dtype):
    module, x = layer.trained(), layer.input()
    message = assert_refused(module, lambda: module(x.to(dtype)), error=TypeError)
    assert "torch.float32" in message and str(dtype) in message


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_wrong_dtype_that_autocast_does_not_cast(layer):
    module, x = layer.trained(), layer.input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float64, torch.complex64, torch.int32):
            assert_refused(module, lambda d=dtype: module(x.to(d)), error=TypeError)
    module = layer.trained().double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_refused(module, lambda: module(x), error=TypeError)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("wrong", [None, 3, "image", [[1.0, 2.0]]], ids=repr)
def test_not_a_tensor(layer, wrong):
    module = layer.trained()
    assert_refused(module, lambda: module(wrong), error=TypeError)


INPUTS = {
    "odd width of GroupSort2": (lnn.GroupSort2(), (2, 5)),
    "width of GroupSort": (lnn.GroupSort(3), (2, 4, 2, 2)),
    "dim of GroupSort": (lnn.GroupSort(2, dim=4), (2, 4, 2, 2)),
    "dim of FullSort": (lnn.FullSort(dim=-3), (2, 4)),
    "rank of GroupSort2": (lnn.GroupSort2(), (4,)),
    "dim of MaxMin": (lnn.MaxMin(2), (2, 4)),
    "channels of HouseHolder": (lnn.HouseHolder(4), (2, 6, 3)),
    "dim of HouseHolder": (lnn.HouseHolder(4, dim=3), (2, 4, 4)),
    "channels of LPReLU": (lnn.LPReLU(4), (2, 3)),
    "rows under a pool": (lnn.ScaledAvgPool2d(2), (1, 1, 3, 4)),
    "columns under a pool": (lnn.ScaledL2NormPool2d((2, 3)), (1, 1, 4, 4)),
    "no rows under a pool": (lnn.ScaledL2NormPool2d(2), (1, 1, 0, 4)),
    "small image under a pool": (lnn.ScaledL2NormPool2d(3, 1), (1, 1, 2, 2)),
    "rank under a pool": (lnn.ScaledAvgPool2d(2), (4, 4)),
    "rank under an L2 pool": (lnn.ScaledL2NormPool2d(2), (1, 1, 1, 4, 4)),
    "rank under a global pool": (lnn.ScaledAdaptiveAvgPool2d(), (4, 4)),
    "rank under a global L2 pool": (lnn.ScaledAdaptiveL2NormPool2d(), (4,)),
    "rows of down-sampling": (lnn.InvertibleDownSampling(2), (1, 1, 3, 4)),
    "columns of down-sampling": (lnn.InvertibleDownSampling((2, 3)), (1, 1, 4, 4)),
    "last of down-sampling": (
        lnn.InvertibleDownSampling(2, data_format="channels_last"),
        (1, 4, 3, 4),
    ),
    "channels of up-sampling": (lnn.InvertibleUpSampling(2), (1, 6, 4, 4)),
    "last of up-sampling": (lnn.InvertibleUpSampling(2, data_format="channels_last"), (1, 4, 4, 6)),
    "rank of down-sampling": (lnn.InvertibleDownSampling(2), (4, 4, 4)),
    "rank of up-sampling": (lnn.InvertibleUpSampling(2), (4, 4)),
    "size of a sized convolution": (lnn.SpectralConv2d(2, 2, 3, input_size=6), (1, 2, 6, 7)),
    "narrow for symmetric padding": (
        lnn.SpectralConv2d(1, 1, 3, padding=2, padding_mode="symmetric"),
        (1, 1, 1, 5),
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_input_that_a_layer_cannot_take(name):
    module, shape = INPUTS[name]
    assert_refused(module, lambda: module(torch.zeros(shape)), error=ValueError)
    assert_refused(module.eval(), lambda: module(torch.zeros(shape)), error=ValueError)


# ------------------------------------------------------------------------------------- constants
REJECTED = [0, -1.0, math.nan, math.inf, True, "2", None]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_constants_that_are_none(layer):
    module = layer.trained(k_coef_lip=0.5)
    for k in REJECTED:
        assert_refused(module, lambda k=k: module.set_klip_factor(k))
        assert_refused(module, lambda k=k: setattr(module, "k_coef_lip", k))


def test_constant_of_a_sequential_with_an_unknown_layer():
    net = lnn.Sequential(lnn.SpectralLinear(2, 2), lnn.SpectralLinear(2, 2), k_coef_lip=0.5)
    net.append(nn.Linear(2, 2))
    assert_refused(net, lambda: net.set_klip_factor(3.0), error=ValueError, match="'2' is a Linear")


@pytest.mark.parametrize(
    "op", ["polar_factor", "bjorck", "spectral_normalize", "frobenius_normalize"]
)
@pytest.mark.parametrize(
    "scale", [*REJECTED, [1.0], [1.0, 2.0, 3.0], [1.0, -1.0], ["1", "2"]], ids=repr
)
def test_scales_that_are_none(op, scale):
    weights = [torch.randn(2, 3), torch.randn(3, 2)]
    with pytest.raises((ValueError, TypeError), match=rf"scale: {EXPECTED_AND_GOT[4:]}"):
        getattr(F, op)(weights, scale)


@pytest.mark.parametrize("op", ["space_to_depth", "depth_to_space"])
def test_factors_that_are_none(op):
    for scale in REJECTED:
        with pytest.raises((ValueError, TypeError), match=r"scale: expected.*got"):
            getattr(F, op)(torch.zeros(1, 4, 2, 2), 2, scale=scale)


def test_scale_beyond_the_dtype():
    with pytest.raises(ValueError, match=r"scale: expected at most 65504.*float16.*got 100000"):
        F.polar_factor(torch.randn(2, 2, dtype=torch.float16), 1e5)
    module = lnn.SpectralLinear(2, 2, dtype=torch.float16, k_coef_lip=1e5)
    assert_refused(module, lambda: module(torch.zeros(1, 2, dtype=torch.float16)))


# --------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_bad_raw_weight(layer, bad):
    module, x = layer.trained(check=True), layer.input()
    module(x)
    with torch.no_grad():
        module.raw_weight.view(-1)[0] = bad
    assert_refused(
        module, lambda: module(x), error=ValueError, match="expected finite entries, got 1"
    )
    assert_refused(module, module.condense, error=ValueError, match="expected finite entries")
    assert_refused(module, module.vanilla_export, error=ValueError, match="expected finite entries")
    unchecked = layer.trained()
    with torch.no_grad():
        unchecked.raw_weight.view(-1)[0] = bad
    assert unchecked(x).isnan().any()


WEIGHTS = {
    "vector": (torch.zeros(3), ValueError, r"\(3,\)"),
    "scalar": (torch.zeros(()), ValueError, r"\(\)"),
    "integers": (torch.zeros(2, 2, dtype=torch.int64), TypeError, "int64"),
    "complex": (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "complex64"),
    "boolean": (torch.zeros(2, 2, dtype=torch.bool), TypeError, "bool"),
    "list of numbers": ([1.0, 2.0], TypeError, "float"),
    "vector in a list": ([torch.zeros(2, 2), torch.zeros(2)], ValueError, "weight 1"),
    "string": ("weight", TypeError, "str"),
    "devices": ([torch.zeros(2, 2), torch.zeros(2, 2, device="meta")], ValueError, "cpu.*meta"),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "op", ["polar_factor", "bjorck", "spectral_normalize", "power_iteration", "frobenius_normalize"]
)
def test_weights_that_are_none(op, name):
    weight, error, named = WEIGHTS[name]
    with pytest.raises(error, match=EXPECTED_AND_GOT) as caught:
        getattr(F, op)(weight)
    assert caught.match(named)


def test_power_iteration_of_nothing():
    with pytest.raises(ValueError, match=r"weight 1: expected at least one entry, got \(0, 2\)"):
        F.power_iteration([torch.ones(2, 2), torch.zeros(0, 2)])


ARGUMENTS = {
    "n_iter negative": (F.spectral_normalize, {"n_iter": -1}, ValueError),
    "n_iter float": (F.bjorck, {"n_iter": 2.0}, ValueError),
    "tol negative": (F.spectral_normalize, {"tol": -1e-3}, ValueError),
    "tol nan": (F.bjorck, {"tol": math.nan}, ValueError),
    "n_iter_spectral": (F.bjorck, {"n_iter_spectral": -1}, ValueError),
    "beta zero": (F.bjorck, {"beta": 0.0}, ValueError),
    "beta large": (F.bjorck, {"beta": 0.6}, ValueError),
    "beta nan": (F.bjorck, {"beta": math.nan}, ValueError),
    "dtype integer": (F.polar_factor, {"dtype": torch.int32}, TypeError),
    "u of another shape": (F.spectral_normalize, {"u": torch.ones(3)}, ValueError),
    "too many u": (F.bjorck, {"u": [torch.ones(2), torch.ones(2)]}, ValueError),
    "u of power iteration": (F.power_iteration, {"u": torch.ones(2, 1)}, ValueError),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_weight_functions(name):
    function, arguments, error = ARGUMENTS[name]
    with pytest.raises(error, match=EXPECTED_AND_GOT):
        function(torch.ones(2, 3), **arguments)


IMAGE = torch.zeros(1, 4, 4, 4)
DATA_ARGUMENTS = {
    "block zero": lambda: F.space_to_depth(IMAGE, 0),
    "block negative": lambda: F.depth_to_space(IMAGE, (2, -1)),
    "block of three": lambda: F.space_to_depth(IMAGE, (1, 2, 2)),
    "block float": lambda: F.space_to_depth(IMAGE, 2.0),
    "block none": lambda: F.depth_to_space(IMAGE, None),
    "block string": lambda: F.space_to_depth(IMAGE, "22"),
    "mode": lambda: F.space_to_depth(IMAGE, 2, mode="RCD"),
    "data_format": lambda: F.depth_to_space(IMAGE, 2, data_format="NHWC"),
    "list": lambda: F.space_to_depth([[1.0]], 1),
    "group_size": lambda: F.group_sort(IMAGE, 0),
    "group_size float": lambda: F.group_sort(IMAGE, 2.0),
    "group_size divides": lambda: F.group_sort(IMAGE, 3),
    "dim": lambda: F.group_sort(IMAGE, 2, 4),
    "dim of scalar": lambda: F.group_sort(torch.zeros(()), 1, 0),
    "sort of a list": lambda: F.group_sort([2.0, 1.0], 2, 0),
    "max_min dim": lambda: F.max_min(IMAGE, -5),
    "householder width": lambda: F.householder(IMAGE, torch.zeros(3)),
    "householder angles": lambda: F.householder(IMAGE, torch.zeros(2, 1)),
    "lprelu slopes": lambda: F.lprelu(IMAGE, torch.zeros(3)),
    "lprelu scalar": lambda: F.lprelu(IMAGE, torch.zeros(())),
    "pool rank": lambda: F.l2_norm_pool2d(IMAGE[0, 0], 2),
    "pool kernel": lambda: F.l2_norm_pool2d(IMAGE, 0),
    "pool stride": lambda: F.l2_norm_pool2d(IMAGE, 2, -1),
    "pool padding": lambda: F.l2_norm_pool2d(IMAGE, 2, padding=2),
    "pool padding negative": lambda: F.l2_norm_pool2d(IMAGE, 2, padding=-1),
    "pool padding of three": lambda: F.l2_norm_pool2d(IMAGE, 2, padding=(1, 1, 1)),
    "pool window": lambda: F.l2_norm_pool2d(IMAGE, 5),
    "pool eps": lambda: F.l2_norm_pool2d(IMAGE, 2, eps=-1.0),
    "pool eps string": lambda: F.l2_norm_pool2d(IMAGE, 2, eps="small"),
    "pool integers": lambda: F.l2_norm_pool2d(IMAGE.int(), 2),
    "pool list": lambda: F.l2_norm_pool2d([[[1.0]]], 1),
    "average kernel": lambda: F.scaled_avg_pool2d(IMAGE, 0),
    "average padding": lambda: F.scaled_avg_pool2d(IMAGE, 2, padding=2),
    "average window": lambda: F.scaled_avg_pool2d(IMAGE, 5),
    "average scale": lambda: F.scaled_avg_pool2d(IMAGE, 2, scale=-1.0),
    "average scale string": lambda: F.scaled_avg_pool2d(IMAGE, 2, scale="large"),
    "average integers": lambda: F.scaled_avg_pool2d(IMAGE.int(), 2),
    "average of all with a stride": lambda: F.scaled_avg_pool2d(IMAGE, None, 2),
    "average of all with padding": lambda: F.scaled_avg_pool2d(IMAGE, None, padding=1),
    "average of a list": lambda: F.scaled_avg_pool2d([[[1.0]]], None),
    "pad width": lambda: F.symmetric_pad(IMAGE, (5, 0)),
    "pad negative": lambda: F.symmetric_pad(IMAGE, (-1, 0)),
    "pad odd": lambda: F.symmetric_pad(IMAGE, (1, 1, 1)),
    "pad rank": lambda: F.symmetric_pad(IMAGE[0, 0, 0], (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", DATA_ARGUMENTS)
def test_arguments_of_data_functions(name):
    with pytest.raises((ValueError, TypeError), match=EXPECTED_AND_GOT):
        DATA_ARGUMENTS[name]()


# -------------------------------------------------------------------------------------- backends
CALLS = {
    "polar_factor": lambda b: F.polar_factor(torch.ones(2, 3), backend=b),
    "bjorck": lambda b: F.bjorck(torch.ones(2, 3), backend=b),
    "spectral_normalize": lambda b: F.spectral_normalize(torch.ones(2, 3), backend=b),
    "power_iteration": lambda b: F.power_iteration(torch.ones(2, 3), backend=b),
    "frobenius_normalize": lambda b: F.frobenius_normalize(torch.ones(2, 3), backend=b),
    "retract": lambda b: F.retract(torch.eye(2), backend=b),
    "project_tangent": lambda b: F.project_tangent(torch.ones(2, 2), torch.eye(2), backend=b),
    "space_to_depth": lambda b: F.space_to_depth(IMAGE, 2, backend=b),
    "depth_to_space": lambda b: F.depth_to_space(IMAGE, 2, backend=b),
    "group_sort": lambda b: F.group_sort(IMAGE, 2, backend=b),
    "l2_norm_pool2d": lambda b: F.l2_norm_pool2d(IMAGE, 2, backend=b),
    "scaled_avg_pool2d": lambda b: F.scaled_avg_pool2d(IMAGE, 2, backend=b),
}
assert set(CALLS) == set(IMPLEMENTED)


@pytest.mark.parametrize("op", CALLS)
def test_backend_of_an_op(op):
    CALLS[op](None)
    CALLS[op]("auto")
    CALLS[op]("reference")
    for name in ("triton", "cuda"):
        if backends.is_emulated(name) and name in IMPLEMENTED[op]:
            CALLS[op](name)
            continue
        with pytest.raises(BackendUnavailableError, match=rf"'{name}' cannot run: .*{name}"):
            CALLS[op](name)  # on tensors of the CPU
    for name in ("Triton", "", "gpu", 3):
        with pytest.raises(ValueError, match=r"backend: expected one of .*reference.*got"):
            CALLS[op](name)


def test_reason_why_a_backend_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "_interpreted", False)
    monkeypatch.setattr(backends, "_emulated", set())
    monkeypatch.setattr(backends, "_missing", {})
    monkeypatch.setattr(backends, "_device_checks", {})
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    both = {"reference": None, "triton": None}
    with pytest.raises(BackendUnavailableError, match="needs tensors on a CUDA device, got cpu"):
        backends.resolve("op", both, cpu, "triton")
    with pytest.raises(BackendUnavailableError, match="cpu needs tensors on the CPU, got cuda:0"):
        backends.resolve("op", {**both, "cpu": None}, cuda, "cpu")
    with pytest.raises(BackendUnavailableError, match="op has no cuda implementation"):
        backends.resolve("op", both, cuda, "cuda")
    assert backends.resolve("op", both, cpu) == "reference"
    assert backends.resolve("op", both, cuda) == "triton"
    assert backends.resolve("op", {**both, "cuda": None}, cuda, "auto") == "cuda"
    assert backends.resolve("op", {**both, "cuda": None}, cuda, "triton") == "triton"
    assert issubclass(BackendUnavailableError, RuntimeError)
    backends.mark_missing("triton", "why")
    with pytest.raises(BackendUnavailableError, match="'triton' cannot run: why"):
        backends.resolve("op", both, cuda, "triton")
    assert backends.resolve("op", both, cuda) == "reference"


def test_interpreter_takes_tensors_of_the_cpu_where_it_is_named(monkeypatch):
    monkeypatch.setattr(backends, "_interpreted", True)
    monkeypatch.setattr(backends, "_missing", {})
    cpu, both = torch.device("cpu"), {"reference": None, "triton": None}
    assert backends.resolve("op", both, cpu, "triton") == "triton"
    with lipkernels.use_backend("triton"):
        assert backends.resolve("op", both, cpu) == "triton"
    assert backends.resolve("op", both, cpu) == "reference"
    with pytest.raises(BackendUnavailableError, match="needs tensors on a CUDA device, got meta"):
        backends.resolve("op", both, torch.device("meta"), "triton")


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("On", True), ("0", False), ("", False)]
)
def test_interpreter_variable(value, expected):
    done = subprocesses.run(
        "from lipkernels import backends; print(backends.is_interpreted())", TRITON_INTERPRET=value
    )
    assert done.stdout == f"{expected}\n", done.stderr


def test_without_triton():
    code = """
sys.modules["triton"] = None  # as where it is not installed
import torch, lipkernels
from lipkernels import backends
y = lipkernels.nn.SpectralLinear(2, 2)(torch.zeros(1, 2))
try:
    backends.resolve("op", {"triton": None}, torch.device("cuda"), "triton")
except lipkernels.BackendUnavailableError as error:
    print(error)
"""
    done = subprocesses.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "backend 'triton' cannot run: Triton is not installed (pip install lipkernels[triton])\n"
    )


def test_use_backend(monkeypatch):
    monkeypatch.setattr(backends, "_interpreted", False)
    layer = lnn.SpectralLinear(2, 2)
    x = torch.zeros(1, 2)
    with lipkernels.use_backend("triton"):
        assert_refused(layer, lambda: layer(x), error=BackendUnavailableError, match="triton")
        with lipkernels.use_backend("reference"):
            layer(x)
        with pytest.raises(BackendUnavailableError):
            layer(x)
        F.polar_factor(torch.ones(2, 2), backend="reference")
    layer(x)
    with pytest.raises(KeyError), lipkernels.use_backend("cuda"):
        raise KeyError
    layer(x)
    with pytest.raises(ValueError, match="expected one of"), lipkernels.use_backend("gpu"):
        raise AssertionError("not reached")
    layer(x)


def test_backward_runs_on_the_backend_of_its_forward():
    layer = lnn.SpectralLinear(2, 2)
    y = layer(torch.ones(1, 2))
    with lipkernels.use_backend("triton"):
        y.sum().backward()
    assert layer.raw_weight.grad.isfinite().all()


def test_environment_variable():
    code = """
import torch, lipkernels
try:
    lipkernels.nn.SpectralLinear(2, 2)(torch.zeros(1, 2))
    print("ran")
except lipkernels.BackendUnavailableError as error:
    print(error)
"""
    unknown = subprocesses.run(code, LIPKERNELS_BACKEND="gpu")
    assert unknown.returncode != 0 and unknown.stdout == ""
    assert "ValueError: backend: expected one of ('auto', 'reference'" in unknown.stderr
    assert "got 'gpu'" in unknown.stderr
    named = subprocesses.run(code, LIPKERNELS_BACKEND="cuda")
    assert named.returncode == 0, named.stderr
    assert named.stdout.startswith("backend 'cuda' cannot run: ")
    reference = subprocesses.run(code, LIPKERNELS_BACKEND="reference")
    assert reference.stdout == "ran\n", reference.stderr
