"""Random nets that a Retractor holds, random steps, and random writes by other hands."""

import contextlib
import copy

import torch
from fuzzing import (
    CALLS,
    FLOATS,
    agree,
    call,
    constrained,
    contiguous,
    finite,
    matrices,
    same,
    scales,
    tensors,
    weights,
    within,
)
from hypothesis import given
from hypothesis import strategies as st
from layer_table import CONSTRAINED
from torch import nn

import lipkernels.nn as lnn
from lipkernels import Retractor
from lipkernels import functional as F


# ------------------------------------------------------------------------------------ functions
@given(tensors() | st.sampled_from((3, None)), st.integers(0, 9999), st.integers(0, 7))
def test_fingerprint(x, place, bit):
    got = call("fingerprint", F.fingerprint, x)
    if got is None:
        assert not isinstance(x, torch.Tensor)
        return
    y = contiguous(x)
    assert got[0] == F.fingerprint(y), "the fingerprint depends on the layout"
    if y.numel():
        octets = y.view(-1).view(torch.uint8)
        i = place % octets.numel()
        octets[i] ^= 1 << bit
        assert F.fingerprint(y) != got[0]
        octets[i] ^= 1 << bit
        assert F.fingerprint(y) == got[0]


checks = st.fixed_dictionaries({"check": st.booleans()})


@given(weights, scales, checks)
def test_retract(weight, scale, options):
    got = agree("retract", F.retract, weight, scale, **options)
    if got is not None:
        constrained("retract", got, weight, scale)


def retracted_in_place(weight, *arguments, **keywords):
    """What a copy of ``weight`` in its own layout becomes; nothing, where it is refused."""
    copies = weight.clone() if isinstance(weight, torch.Tensor) else weight
    if isinstance(weight, list):
        copies = [w.clone() for w in weight]
    try:
        assert F.retract_(copies, *arguments, **keywords) is copies
    except (ValueError, TypeError):
        assert same(copies, weight), "a refused weight was written to"
        raise
    return copies


@given(weights, scales, checks)
def test_retract_in_place(weight, scale, options):
    got = call("retract_", retracted_in_place, weight, scale, **options)
    expected = call("retract", F.retract, weight, scale, **options)
    assert same(got, expected)


@given(matrices, tensors(), scales, st.booleans())
def test_project_tangent(weight, grad, scale, fits):
    """The orthogonal projection on the tangent space, where the weight is on the constraint."""
    if fits and weight.is_floating_point():
        seeded = torch.Generator().manual_seed(weight.numel())
        grad = torch.randn(weight.shape, generator=seeded, dtype=torch.float64).to(weight.dtype)
        if call("polar_factor", F.polar_factor, weight, scale) is not None:
            weight = F.polar_factor(weight, scale)
    got = agree("project_tangent", F.project_tangent, grad, weight, scale)
    if got is None:
        return
    assert got.shape == grad.shape and got.dtype == grad.dtype
    if not (fits and weight.dtype in (torch.float64, torch.float32) and finite(weight)):
        return
    # A subnormal weight, or none at all, is on no constraint.
    if not grad.numel() or float(weight.abs().max()) < 1e3 * torch.finfo(weight.dtype).tiny:
        return
    k = scale[0] if isinstance(scale, list) else scale
    g, x = grad.double(), weight.double() / k
    if weight.shape[-2] > weight.shape[-1]:
        g, x = g.mT, x.mT
    t = g @ x.mT
    expected = g - (t + t.mT) @ x / 2
    expected = expected.mT if weight.shape[-2] > weight.shape[-1] else expected
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ retractors
OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr, foreach=False),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr, foreach=True),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr),
    "LBFGS": lambda p, lr: torch.optim.LBFGS(p, lr, max_iter=2),
}
LR = st.sampled_from((0.0, 1e-3, 0.1, 3.0, 1e4, 1e30))


def _of_seed(weight, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)


def _flip_a_bit(weight, seed):
    octets = weight.data.view(-1).view(torch.uint8)
    octets[seed % octets.numel()] ^= 1 << seed % 8


def _through_another_view(weight, seed):
    torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(weight.data)).mul_(2)


def _in_place(weight, seed):
    with torch.no_grad():
        weight.add_(_of_seed(weight, seed))


def _in_inference_mode(weight, seed):
    with torch.inference_mode():
        weight.data.mul_(1.5)


def _of_huge_values(weight, seed):
    weight.data.copy_(_of_seed(weight, seed) * torch.finfo(weight.dtype).max / 100)


def _by_vector(weight, seed):
    vector = 3 * nn.utils.parameters_to_vector([weight]).detach()
    nn.utils.vector_to_parameters(vector, [weight])


# What others do to a raw weight.
WRITES = {
    "data": lambda weight, seed: weight.data.mul_(1 + seed),
    "one entry": lambda weight, seed: weight.data.view(-1)[:1].add_(1 + seed),
    "in place": _in_place,
    "new storage": lambda weight, seed: setattr(weight, "data", _of_seed(weight, seed)),
    "bit": _flip_a_bit,
    "view": _through_another_view,
    "inference": _in_inference_mode,
    "zero": lambda weight, seed: nn.init.zeros_(weight),
    "huge": _of_huge_values,
    "nan": lambda weight, seed: weight.data.view(-1)[:1].fill_(float("nan")),
    "vector": _by_vector,
    "optimizer": lambda weight, seed: _foreign_step(weight, seed),
}


def _foreign_step(weight, seed):
    weight.grad = _of_seed(weight, seed)
    torch.optim.SGD([weight], 0.3).step()
    weight.grad = None


def _loss(model, inputs):
    outputs = (layer(x).double() for layer, x in zip(model, inputs, strict=True))
    return sum(y.square().mean() + y.mean() for y in outputs)


def _train(optimizer, model, inputs):
    def closure():
        optimizer.zero_grad()
        loss = _loss(model, inputs)
        loss.backward()
        return loss

    closure()
    # LBFGS refuses gradients that are no numbers, deep inside torch.
    optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)


def _octets(model):
    return [contiguous(layer.raw_weight).view(-1).view(torch.uint8) for layer in model]


def _check(model):
    """Every weight within its promise; a held one is the raw one, and what its layer computes."""
    within(model)
    for layer in model:
        if layer.is_held():
            assert torch.equal(layer.weight.nan_to_num(7), layer.raw_weight.nan_to_num(7))


@st.composite
def nets(draw):
    layers = draw(st.lists(st.sampled_from(CONSTRAINED), min_size=1, max_size=3))
    dtype = draw(st.sampled_from((*FLOATS[:2], *FLOATS[:2], *FLOATS[2:])))
    k = draw(st.sampled_from((1.0, 0.3, 7, 1e-3)))
    model = nn.ModuleList(layer.make(k_coef_lip=k) for layer in layers).to(dtype)
    for layer in model:
        shape = st.just(tuple(layer.raw_weight.shape))
        values = st.sampled_from(("normal", "normal", "zero", "constant", "huge", "tiny", "spike"))
        layer.raw_weight.data.copy_(draw(tensors(shape, st.just(dtype), values)))
    return model, [layer.input(dtype) for layer in layers]


EVENTS = ("step", "step", "step", "write", "write", "constant", "parameter", "load", "retract")
EVENTS = (*EVENTS, "exactly", "condense", "remove", "attach", "copy", "autocast")


@given(st.data())
def test_retractor(data):
    model, inputs = data.draw(nets())
    retractor = Retractor(model)
    CALLS["Retractor"] += 1
    which = data.draw(st.sampled_from(list(OPTIMIZERS)))
    optimizer = OPTIMIZERS[which](list(model.parameters()), 0.1)
    saved = copy.deepcopy(model.state_dict())
    retractor.attach(optimizer)
    attached = True
    _check(model)
    assert all(layer.is_held() for layer in model)
    for event in data.draw(st.lists(st.sampled_from(EVENTS), max_size=6)):
        before = _octets(model)
        layer = model[data.draw(st.integers(0, len(model) - 1))]
        seed = data.draw(st.integers(0, 99))
        if event == "step":
            for group in optimizer.param_groups:
                lr = data.draw(LR)
                # torch refuses a learning rate that half precision does not have.
                group["lr"] = min(lr, 1e4) if layer.raw_weight.dtype == torch.float16 else lr
            _train(optimizer, model, inputs)
            params = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert all(m.is_held() == attached for m in model if id(m.raw_weight) in params)
        elif event == "write":
            WRITES[data.draw(st.sampled_from(list(WRITES)))](layer.raw_weight, seed)
        elif event == "constant":
            k = layer.k_coef_lip
            layer.k_coef_lip = data.draw(st.sampled_from((k, k / 2, 2 * k)))
            assert layer.k_coef_lip == k or not layer.is_held()
        elif event == "parameter":
            layer.weight = nn.Parameter(layer.raw_weight.detach().clone())
            assert not layer.is_held()
        elif event == "load":
            model.load_state_dict(saved)
        elif event in ("retract", "exactly"):
            retractor.retract(exactly=event == "exactly")
            assert all(m.is_held() for m in model)
        elif event == "condense":
            layer.condense(strict=finite(layer.raw_weight) and bool(seed % 2))
        elif event == "remove":
            retractor.remove()
            attached = False
            assert not any(m.is_held() for m in model)
        elif event == "attach":
            retractor.attach(optimizer)
            attached = True
        elif event == "copy":
            assert not any(m.is_held() for m in copy.deepcopy(model))
        elif event == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                within(model)
        if event not in ("step", "retract", "exactly", "attach"):
            for m, old, new in zip(model, before, _octets(model), strict=True):
                assert torch.equal(old, new) or not m.is_held(), f"{event} went unseen"
        _check(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(retractor)
    assert not any(layer.is_held() for layer in model)
    _check(model)


@given(st.sampled_from(CONSTRAINED), st.sampled_from(CONSTRAINED), st.sampled_from((1.0, 2.0)))
def test_retractor_of_shared_weights(first, second, k):
    a, b = first.make(), second.make(k_coef_lip=k)
    if a.raw_weight.shape == b.raw_weight.shape:
        b.weight = a.raw_weight
    model = nn.Sequential(a, b)
    got = call("Retractor", Retractor, model)
    shared = a.raw_weight is b.raw_weight
    alike = (a.constraint, a.matrix_scale()) == (b.constraint, b.matrix_scale())
    assert (got is None) == (shared and not alike)
    if got is not None:
        got[0].retract()
        _check(model)


@given(st.sampled_from((3, None, [], nn.Linear(2, 2), lnn.GroupSort2(), nn.ModuleList())))
def test_retractor_of_anything(model):
    got = call("Retractor", Retractor, model)
    assert (got is None) == (not isinstance(model, nn.Module))
    if got is not None:
        got[0].retract()
        assert call("Retractor", got[0].attach, model) is None
