"""checkpoint.save and load: the same values, all or nothing, no code, no belief in a bound."""

import collections
import math
import os
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layer_table import LAYERS
from torch import nn

import lipkernels.nn as lnn
from lipkernels import checkpoint
from lipkernels.certify import lipschitz_bound


def net(seed=0):
    torch.manual_seed(seed)
    return lnn.Sequential(
        lnn.SpectralConv2d(1, 4, 3),
        lnn.GroupSort2(),
        nn.Flatten(),
        lnn.SpectralLinear(16, 6, eps_bjorck=None),
        lnn.HouseHolder(6),
        lnn.SpectralLinear(6, 2),
    )


X = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(3))


def copied(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def unchanged(module, before):
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.pt"


# ------------------------------------------------------------------------------------- contents
TENSORS = {
    "float64": torch.randn(3, 2, dtype=torch.float64),
    "bfloat16": torch.randn(7).bfloat16(),
    "float16": torch.randn(2, 2, 2).half(),
    "float8": torch.tensor([1.0, -2.0, 448.0]).to(torch.float8_e4m3fn),
    "int64": torch.tensor([2**62, -1]),
    "uint8": torch.arange(255, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "complex": torch.complex(torch.ones(2), torch.zeros(2)),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "bad": torch.tensor([math.nan, math.inf, -0.0, 1e-45]),
    "transposed": torch.randn(3, 5).T,
    "strided": torch.randn(6, 6)[::2, 1::3],
    "offset": torch.randn(10)[3:7],
    "expanded": torch.randn(3, 1).expand(3, 4),
    "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "conjugate": torch.complex(torch.ones(2), torch.ones(2)).conj(),
    "requires grad": torch.randn(2, requires_grad=True),
    "parameter": nn.Parameter(torch.randn(2, 2)),
}


def same_bytes(a, b):
    a, b = (t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back(name, path):
    tensor = TENSORS[name]
    checkpoint.save({"x": tensor}, path)
    for found in (checkpoint.load(path)["x"], torch.load(path, weights_only=True)["x"]):
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert same_bytes(found, tensor)
        assert not found.requires_grad and type(found) is torch.Tensor


def test_a_view_is_saved_without_its_storage(path):
    checkpoint.save(torch.zeros(1_000_000)[:10], path)
    assert os.path.getsize(path) < 10_000
    assert torch.equal(checkpoint.load(path), torch.zeros(10))


def test_tied_tensors_stay_tied(path):
    a = torch.randn(300, 300)
    checkpoint.save([a, {"again": a}], path)
    assert os.path.getsize(path) < 1.1 * a.nbytes
    one, other = checkpoint.load(path)
    assert one.data_ptr() == other["again"].data_ptr()


def plain_values():
    leaves = (
        st.none()
        | st.booleans()
        | st.integers(-(2**1999), 2**1999)
        | st.floats(allow_nan=False)
        | st.text()
    )
    keys = st.text() | st.integers() | st.booleans() | st.none()
    return st.recursive(
        leaves,
        lambda v: st.lists(v) | st.dictionaries(keys, v) | st.lists(v).map(tuple) | st.tuples(v, v),
        max_leaves=20,
    )


def assert_same_values(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        assert [type(k) for k in a] == [type(k) for k in b]
    if isinstance(a, (list, tuple, dict)):
        assert len(a) == len(b)
        for x, y in zip(
            a.values() if isinstance(a, dict) else a,
            b.values() if isinstance(b, dict) else b,
            strict=True,
        ):
            assert_same_values(x, y)
    else:
        assert a == b and repr(a) == repr(b)


@settings(deadline=None, max_examples=60)
@given(plain_values())
@example({"lr": 1e-3, "betas": (0.9, 0.999), "note": "été \ud800", 3: [True, None]})
@example(-(2**1999))
def test_plain_values_come_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "values.pt"
    checkpoint.save(value, path)
    assert_same_values(checkpoint.load(path), value)


def test_state_dict_keeps_the_versions_of_its_modules(path):
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    checkpoint.save(module, path)
    found = checkpoint.load(path)
    assert type(found) is collections.OrderedDict
    assert found._metadata == module.state_dict()._metadata


class OwnTensor(torch.Tensor):
    pass


def _contains_itself():
    value = [1]
    value.append({"again": value})
    return value


REFUSED = {
    "function": ({"a": [1, print]}, TypeError, r"content\['a'\]\[1\]: expected .* got builtin"),
    "object": (object(), TypeError, r"content: expected .* got object"),
    "bytes": ([b""], TypeError, r"content\[0\].* got bytes"),
    "set": ({"s": {1}}, TypeError, r"content\['s'\].* got set"),
    "class": ([int], TypeError, r"content\[0\].* got type"),
    "tuple key": ({(1, 2): 3}, TypeError, r"content: expected keys .* got tuple \(1, 2\)"),
    "default dict": (collections.defaultdict(int), TypeError, "got defaultdict"),
    "dtype": (torch.float32, TypeError, "got dtype"),
    "tensor subclass": (torch.ones(2).as_subclass(OwnTensor), TypeError, "got OwnTensor"),
    "sparse": ({"w": torch.eye(2).to_sparse()}, TypeError, r"content\['w'\]: .* layout"),
    "meta": (torch.ones(2, device="meta"), TypeError, "device meta"),
    "long integer": ({"n": 2**3000}, ValueError, r"content\['n'\].* 2000 bits, got 3001"),
    "cycle": (_contains_itself(), ValueError, r"content\[1\]\['again'\].* contains itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_loaded_is_not_saved(name, path):
    value, error, match = REFUSED[name]
    checkpoint.save("old", path)
    with pytest.raises(error, match=match):
        checkpoint.save(value, path)
    assert checkpoint.load(path) == "old"
    assert os.listdir(path.parent) == ["net.pt"]


# ---------------------------------------------------------------------- modules and optimizers
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_layer_is_restored(layer, path):
    module, other, x = layer.trained(), layer.trained(seed=8), layer.input()
    checkpoint.save(module, path)
    checkpoint.load(path, into=other)
    assert unchanged(other, copied(module))
    assert torch.equal(other.eval()(x), module.eval()(x))


def trained(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 1, 4, 4, generator=generator)).square().sum().backward()
        optimizer.step()


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_it_had_not_stopped(name, path):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    trained(model, optimizer, 3)
    schedule.step()
    saved = {"nets": {"model": model}, "optimizer": optimizer, "schedule": schedule.state_dict()}
    checkpoint.save(saved | {"rng": torch.get_rng_state(), "step": 3}, path)
    trained(model, optimizer, 3, seed=1)

    other = net(seed=5)
    resumed = OPTIMIZERS[name](other.parameters())
    into = {"nets": {"model": other}, "optimizer": resumed}
    rest = checkpoint.load(path, into=into)
    assert rest["step"] == 3 and rest["schedule"]["last_epoch"] == 1
    # The power iteration's start is no part of a checkpoint: not bitwise, but as close as it gets.
    trained(other, resumed, 3, seed=1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def _without(state, name):
    return {n: t for n, t in state.items() if n != name}


STATE = copied(net())
FIRST = "0.weight"
MISFITS = {
    "missing": (_without(STATE, FIRST), "missing '0.weight'"),
    "unexpected": ({**STATE, "7.weight": torch.ones(1)}, "unexpected '7.weight'"),
    "shape": ({**STATE, FIRST: torch.ones(4, 1, 3, 2)}, r"'0.weight' has shape \(4, 1, 3, 2\)"),
    "transposed": (
        {**STATE, "5.weight": STATE["5.weight"].T},
        r"shape \(6, 2\), expected \(2, 6\)",
    ),
    "dtype": (
        {**STATE, FIRST: STATE[FIRST].double()},
        "dtype torch.float64, expected torch.float32",
    ),
    "no tensor": ({**STATE, FIRST: [1.0]}, "'0.weight' is a list, expected a tensor"),
    "no state": (torch.ones(3), "expected the state of a Sequential as content, got Tensor"),
    "empty": ({}, "missing '0.weight'; missing '0.bias'; missing '3.weight'"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_changes_nothing(name, path):
    state, match = MISFITS[name]
    checkpoint.save(state, path)
    model = net(seed=1)
    before = copied(model)
    with pytest.raises(checkpoint.CheckpointError, match=match) as caught:
        checkpoint.load(path, into=model)
    assert str(path) in str(caught.value)
    assert unchanged(model, before)


def test_everything_or_nothing(path):
    # The first model fits, the second one and the optimizer do not.
    model = net(seed=1)
    before = copied(model)
    checkpoint.save({"a": net(), "b": net(), "c": torch.optim.Adam(net().parameters())}, path)
    for misfit in (
        {"b": nn.Linear(2, 2)},
        {"z": net()},
        {"c": torch.optim.Adam(nn.Linear(2, 2).parameters())},
        {"c": net()},
        {"b": torch.optim.SGD(net().parameters())},
    ):
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(path, into={"a": model, **misfit})
        assert unchanged(model, before)
    with pytest.raises(TypeError, match=r"into: expected a module.*got int"):
        checkpoint.load(path, into={"a": model, "b": 3})
    assert unchanged(model, before)


# ---------------------------------------------------------------------------------- the bound
def test_a_stored_bound_is_recomputed(path):
    model, other = net(), net(seed=1)
    honest = lipschitz_bound(model)
    checkpoint.save({"model": model, "lipschitz_bound": honest}, path)
    assert torch.load(path, weights_only=True)["lipschitz_bound"] == honest.value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoint.load(path, into={"model": other})["lipschitz_bound"]
    assert found == lipschitz_bound(other) and set(found.layers) == set(honest.layers)
    assert found.value == pytest.approx(honest.value, rel=1e-9)
    assert "lipschitz_bound" not in checkpoint.load(path)  # nothing to recompute it from


@pytest.mark.parametrize("lie", [0.5, 0.0, -1.0, math.nan, "one", None, 1 - 1e-5])
def test_a_lying_bound_is_reported(lie, path):
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with torch.no_grad():
        plain[0].weight.copy_(3 * torch.eye(3))
    claimed = 3 * lie if isinstance(lie, float) else lie
    checkpoint.save({"model": plain, "lipschitz_bound": claimed}, path)
    other = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="stored bound .* is not one: the weights have 3.0"):
        found = checkpoint.load(path, into={"model": other})["lipschitz_bound"]
    assert 3.0 <= found.value <= 3.0 + 1e-9


def test_a_bound_of_weights_that_are_no_numbers_is_infinite(path):
    model = net()
    with torch.no_grad():
        model[3].raw_weight[0, 0] = math.nan
    checkpoint.save({"model": model, "lipschitz_bound": 1.0}, path)
    other = net(seed=1)
    with pytest.warns(UserWarning, match="is not one: the weights have inf"):
        found = checkpoint.load(path, into={"model": other})["lipschitz_bound"]
    assert found.value == math.inf
    assert same_bytes(other[3].raw_weight, model[3].raw_weight)


def test_a_bound_of_a_model_without_a_rule_is_left_out(path):
    model = nn.Sequential(nn.LayerNorm(3))
    checkpoint.save({"model": model, "lipschitz_bound": 1.0}, path)
    with pytest.warns(UserWarning, match="no bound to recompute: .*LayerNorm"):
        assert "lipschitz_bound" not in checkpoint.load(path, into={"model": model})


# --------------------------------------------------------------------------------------- no code
class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_no_code_is_run(path, monkeypatch):
    from lipkernels.checkpoint.sealed import write_sealed

    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with open(path, "wb") as file:
        write_sealed({"model": Evil()}, file)  # what `save` refuses, and sealed all the same
    with pytest.raises(checkpoint.CheckpointError, match=r"weights_only=True.*Unpickling"):
        checkpoint.load(path)
    assert not os.path.exists("executed")


def test_files_that_are_none_of_ours(path):
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(checkpoint.CheckpointError, match=r"without one: cut short.*not written by"):
        checkpoint.load(path)
    for junk in (b"", b"PK", b"x" * 100, bytes(100_000)):
        path.write_bytes(junk)
        with pytest.raises(checkpoint.CheckpointError, match=f"got {len(junk)} bytes without one"):
            checkpoint.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(path.parent / "none")
    with pytest.raises(IsADirectoryError):
        checkpoint.load(path.parent)
