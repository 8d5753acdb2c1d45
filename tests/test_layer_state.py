"""What a layer carries: checkpoints of torch.nn, copies, files, other devices and dtypes."""

import copy
import io
import pickle

import pytest
import torch
from layer_table import CONSTRAINED, LAYERS, TWINS
from torch import nn
from torch.func import functional_call

import lipkernels.nn as lnn

WITH_PARAMETERS = [layer for layer in LAYERS if list(layer.make().parameters())]
WITH_TWIN = [layer for layer in LAYERS if layer.cls in TWINS]


def assert_same(module, other, x):
    assert torch.equal(other(x), module(x))
    assert other.k_coef_lip == module.k_coef_lip
    assert repr(other) == repr(module)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad == q.requires_grad
        assert p.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()


# ------------------------------------------------------------------------------- copies, files
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(layer, how):
    module, x = layer.trained(k_coef_lip=1.25).eval(), layer.input()
    expected = module(x)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_same(module, other, x)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.set_klip_factor(3.0)
    assert module.k_coef_lip == 1.25
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_copy_after_a_training_step(layer):
    module, x = layer.trained(), layer.input().requires_grad_()
    module(x).sum().backward()
    assert_same(module.eval(), copy.deepcopy(module), x)


# ---------------------------------------------------------------------------------- state_dict
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_state_dict_round_trip(layer):
    module, other, x = layer.trained(), layer.trained(seed=8), layer.input()
    module(x)  # moves the power iteration's vector
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    result = other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    torch.testing.assert_close(other.eval()(x), module.eval()(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_load_with_assign(layer):
    module, x = layer.trained().eval(), layer.input()
    other = layer.make().eval()
    other.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", WITH_TWIN, ids=str)
def test_plain_checkpoint_loads_as_the_raw_weight(layer):
    module = layer.make()
    bias = getattr(module, "bias", None) is not None
    if layer.constrained:
        keywords = {}
        if "Conv" in layer.name:
            keywords = {"kernel_size": module.kernel_size, "groups": module.groups}
        twin = TWINS[layer.cls](*layer.arguments[:2], bias=bias, **keywords)
    else:
        twin = TWINS[layer.cls](*layer.arguments)
    module.load_state_dict(twin.state_dict(), strict=True)
    twin.load_state_dict(module.state_dict(), strict=True)
    names = [name for name, _ in twin.named_parameters()]
    assert [name for name, _ in module.named_parameters()] == names
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    if layer.constrained:
        fresh = layer.make()
        fresh.raw_weight.data.copy_(twin.weight)
        torch.testing.assert_close(module.weight, fresh.weight, rtol=0, atol=1e-6)


def test_checkpoint_of_a_whole_plain_net():
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    net = lnn.Sequential(lnn.SpectralConv2d(1, 4, 3), nn.Flatten(), lnn.SpectralLinear(16, 2))
    net.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(net[2].raw_weight, plain[2].weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict(
            nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(16, 2)).state_dict()
        )


# ------------------------------------------------------------------------------ meta device, dtype
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_meta_device(layer):
    with torch.device("meta"):
        module = layer.make()
    assert all(t.is_meta for t in [*module.parameters(), *module.buffers()])
    x = layer.input()
    out = module(x.to("meta"))
    assert out.is_meta
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for t in [*module.parameters(), *module.buffers()]:
            t.fill_(float("nan"))  # what uninitialized memory may hold
    for m in module.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    assert all(t.isfinite().all() for t in [*module.parameters(), *module.buffers()])
    y = module(x)
    assert y.shape == out.shape and y.isfinite().all()
    state = layer.trained().state_dict()
    module.load_state_dict(state)
    torch.testing.assert_close(module.eval()(x), layer.trained().eval()(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_meta_device_then_a_checkpoint(layer):
    # How large models are loaded. Buffers that are not in the checkpoint stay on the meta device.
    trained, x = layer.trained().eval(), layer.input()
    with torch.device("meta"):
        module = layer.make()
    module.load_state_dict({k: v.clone() for k, v in trained.state_dict().items()}, assign=True)
    with torch.inference_mode():
        torch.testing.assert_close(module.eval()(x), trained(x), rtol=0, atol=1e-6)
    module.train()
    x = x.clone().requires_grad_()
    module(x).sum().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(module.eval()(x), trained(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_moving_to_another_dtype_and_back(layer):
    module, x = layer.trained(), layer.input()
    expected = module.eval()(x)
    module.double()
    assert all(t.dtype == torch.float64 for t in [*module.parameters(), *module.buffers()])
    assert module(x.double()).dtype == torch.float64
    torch.testing.assert_close(module.float()(x), expected, rtol=0, atol=1e-6)
    module.bfloat16()
    assert module(x.bfloat16()).isfinite().all()


# ------------------------------------------------------------------ functional_call, EMA, others
@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_functional_call_uses_the_weight_that_it_is_given(layer):
    module, x = layer.trained().eval(), layer.input()
    other = layer.trained(seed=6).eval()
    expected = module(x).detach()
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    y = functional_call(module, given, (x,))
    torch.testing.assert_close(y, other(x), rtol=0, atol=1e-6)
    y.sum().backward()
    assert given["weight"].grad.any()
    assert module.raw_weight.grad is None
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("layer", WITH_PARAMETERS, ids=str)
def test_averaged_model_evaluates_its_own_weights(layer):
    module, x = layer.trained().eval(), layer.input()
    averaged = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    averaged.update_parameters(module)
    first = averaged.eval()(x)
    torch.testing.assert_close(first, module(x), rtol=0, atol=1e-6)
    other = layer.trained(seed=6)
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(averaged(x), first, rtol=0, atol=0)
    averaged.update_parameters(module)
    mean = layer.trained()
    for p, q in zip(mean.parameters(), other.parameters(), strict=True):
        p.data.lerp_(q.data, 0.5)
    torch.testing.assert_close(averaged(x), mean.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_weight_can_be_replaced_by_a_new_parameter(layer):
    module, other, x = layer.trained().eval(), layer.trained(seed=6).eval(), layer.input()
    fresh = nn.Parameter(other.raw_weight.detach().clone())
    module.weight = fresh
    assert module.raw_weight is fresh
    assert dict(module.named_parameters())["weight"] is fresh
    if module.bias is not None:
        module.bias = nn.Parameter(other.bias.detach().clone())
    torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="cannot assign"):
        module.weight = torch.zeros_like(fresh)


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_frozen_layer(layer):
    module, x = layer.trained(), layer.input().requires_grad_()
    module.requires_grad_(False)
    y = module(x)
    assert not module.weight.requires_grad
    y.sum().backward()
    assert x.grad.any() and module.raw_weight.grad is None


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_inference_mode_and_no_grad(layer):
    module, x = layer.trained(), layer.input()
    expected = module.eval()(x)
    with torch.no_grad():
        y = module(x)
        assert not y.requires_grad
    assert torch.equal(y, expected)
    with torch.inference_mode():
        assert torch.equal(module(x), expected)
    module.train()
    with torch.inference_mode():
        module(x)
    module(x).sum()  # the power iteration's vector is still an ordinary tensor
    y = module(x.requires_grad_())
    y.sum().backward()


def test_tied_layers_share_one_raw_weight():
    a, b = lnn.SpectralLinear(4, 4), lnn.SpectralLinear(4, 4)
    b.weight = a.raw_weight
    assert b.raw_weight is a.raw_weight
    (a.weight.sum() + b.weight.sum()).backward()
    single = copy.deepcopy(a)
    single.zero_grad()
    (2 * single.weight.sum()).backward()
    torch.testing.assert_close(a.raw_weight.grad, single.raw_weight.grad)
