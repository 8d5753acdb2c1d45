"""condense and vanilla_export: the same function, in plain torch, independent of the original."""

import copy
import io

import pytest
import subprocesses
import tolerances
import torch
from layer_table import CONSTRAINED, LAYERS
from torch import nn

import lipkernels
import lipkernels.nn as lnn
from lipkernels import group_weights


def snapshot(module):
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return repr(module), module.training, {name: t.detach().clone() for name, t in tensors}


def assert_unchanged(module, before):
    after = snapshot(module)
    assert after[:2] == before[:2]
    assert after[2].keys() == before[2].keys()
    for name, t in after[2].items():
        assert torch.equal(t, before[2][name]), name


def storages(module):
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def is_plain(module):
    return not any(type(m).__module__.startswith("lipkernels") for m in module.modules())


# ------------------------------------------------------------------------------------ condense
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_condense_changes_no_output(layer):
    module, x = layer.trained(k_coef_lip=1.5), layer.input()
    expected = module(x)
    module.condense()
    if layer.is_projection:
        limit = tolerances.CONDENSE * expected.abs().max()
        torch.testing.assert_close(module(x), expected, rtol=0, atol=limit.item())
        once = copy.deepcopy(module.state_dict())
        module.condense()
        for name, t in module.state_dict().items():
            torch.testing.assert_close(t, once[name], rtol=0, atol=tolerances.CONDENSE)


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_condense_writes_the_constrained_weight_in_place(layer):
    module = layer.trained()
    raw, constrained = module.raw_weight, module.weight.detach().clone()
    bias = None if module.bias is None else module.bias.detach().clone()
    module.condense()
    assert module.raw_weight is raw and raw.requires_grad and raw.grad_fn is None
    assert torch.equal(raw, constrained)
    assert bias is None or torch.equal(module.bias, bias)


def test_condense_of_named_bjorck_approaches_the_polar_factor():
    module = lnn.SpectralLinear(6, 4, maxiter_bjorck=1, eps_bjorck=1e-12, dtype=torch.float64)
    with torch.no_grad():
        nn.init.normal_(module.raw_weight)
    defects = []
    for _ in range(30):
        module.condense()
        values = torch.linalg.svdvals(module.raw_weight.detach())
        defects.append((values - 1).abs().max().item())
    assert defects[-1] < 1e-9 < defects[0]


def test_condense_of_a_whole_model():
    net = nn.ModuleDict(
        {
            "stem": nn.Sequential(lnn.SpectralConv2d(2, 4, 3), nn.Conv2d(4, 4, 1)),
            "head": lnn.Sequential(lnn.SpectralLinear(5, 5), lnn.SpectralLinear(5, 2)),
        }
    )
    for p in net.parameters():
        nn.init.normal_(p)
    plain = net["stem"][1].weight.clone()
    layers = [net["stem"][0], *net["head"]]
    constrained = [layer.weight.detach().clone() for layer in layers]
    lipkernels.condense(net)
    for layer, weight in zip(layers, constrained, strict=True):
        assert torch.equal(layer.raw_weight, weight)
    assert torch.equal(net["stem"][1].weight, plain)


# -------------------------------------------------------------------------------------- export
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_export_computes_the_same(layer):
    module, x = layer.trained(k_coef_lip=0.7), layer.input()
    expected = module(x)
    plain = lipkernels.vanilla_export(module)
    assert is_plain(plain)
    limit = tolerances.EXPORT * expected.abs().max().item()
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=limit)
    torch.testing.assert_close(plain.double()(x.double()).float(), expected, rtol=0, atol=1e-5)
    if "Conv" in layer.name or "Pool" in layer.name:
        torch.testing.assert_close(module.vanilla_export()(x[0]), module(x[0]), rtol=0, atol=limit)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_export_works_on_other_sizes(layer):
    module, x = layer.trained(), layer.input()
    if x.dim() < 4 or "sized" in layer.name or "Sequential" in layer.name:
        return
    larger = torch.cat((x, x), -2) if "channels_last" not in layer.name else torch.cat((x, x), 1)
    plain = module.vanilla_export()
    limit = tolerances.EXPORT * module(larger).abs().max().item()
    torch.testing.assert_close(plain(larger), module(larger), rtol=0, atol=limit)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_export_is_independent(layer):
    module, x = layer.trained(), layer.input()
    before, expected = snapshot(module), module.eval()(x).detach().clone()
    module.train()
    plain = module.vanilla_export()
    assert_unchanged(module, before)
    assert not storages(plain) & storages(module)
    with torch.no_grad():
        for t in [*plain.parameters(), *plain.buffers()]:
            t.fill_(7.0)
    assert_unchanged(module, before)
    assert torch.equal(module.eval()(x), expected)
    module.condense()
    for t in plain.parameters():
        assert (t == 7.0).all()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_export_keeps_mode_dtype_and_requires_grad(layer):
    for dtype in (torch.float64, torch.bfloat16):
        module = layer.trained().to(dtype).eval()
        for p in module.parameters():
            p.requires_grad_(dtype == torch.float64)
        plain = module.vanilla_export()
        assert not any(m.training for m in plain.modules())
        assert all(p.dtype == dtype for p in plain.parameters())
        assert all(p.requires_grad == (dtype == torch.float64) for p in plain.parameters())
        x = layer.input(dtype)
        assert plain(x).dtype == module(x).dtype
        assert all(m.training for m in module.train().vanilla_export().modules())


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_export_under_autocast_and_no_grad_is_in_full_precision(layer):
    module = layer.trained()
    expected = module.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        plain = module.vanilla_export()
        plain = plain[-1] if isinstance(plain, nn.Sequential) else plain
        module.condense()
    assert plain.weight.requires_grad
    torch.testing.assert_close(plain.weight.detach(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(module.raw_weight.detach(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_export_has_the_same_gradients(layer):
    module, x = layer.trained(), layer.input(torch.float64)
    module = module.double()
    plain = module.vanilla_export()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    module(a).pow(2).sum().backward()
    plain(b).pow(2).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)  # eps_grad_sqrt is 1e-6


def test_export_of_a_model_with_shared_layers():
    shared = lnn.SpectralLinear(4, 4)
    net = lnn.Sequential(shared, lnn.GroupSort2(), shared)
    plain = lipkernels.vanilla_export(net)
    assert plain[0] is plain[2]
    x = torch.randn(3, 4)
    torch.testing.assert_close(plain(x), net(x))
    outer = nn.Sequential(net, nn.Sequential(shared))
    plain = lipkernels.vanilla_export(outer)
    assert is_plain(plain)
    torch.testing.assert_close(plain(x), outer(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = lnn.Sequential(lnn.SpectralLinear(4, 4), lnn.LPReLU())
        self.plain = nn.Linear(4, 4)
        self.register_buffer("share", torch.tensor(0.5))

    def forward(self, x):
        return self.share * self.plain(x) + (1 - self.share) * self.branch(x)


def test_export_of_modules_of_the_users_own():
    net = Residual()
    before, x = snapshot(net), torch.randn(3, 4)
    plain = lipkernels.vanilla_export(net)
    assert type(plain) is Residual and is_plain(plain)
    assert not storages(plain) & storages(net)
    torch.testing.assert_close(plain(x), net(x))
    assert_unchanged(net, before)
    assert isinstance(net.branch[0], lnn.SpectralLinear)


def test_export_of_a_grouped_model_leaves_the_switch_behind():
    net = nn.Sequential(lnn.SpectralLinear(4, 4), lnn.SpectralLinear(4, 2))
    called = []
    net.register_forward_hook(lambda *_: called.append(1))
    switch = group_weights(net)
    plain = lipkernels.vanilla_export(net)
    x = torch.randn(3, 4)
    torch.testing.assert_close(plain(x), net(x))
    assert len(called) == 2  # a hook of the user's is copied
    assert not plain._forward_pre_hooks and len(plain._forward_hooks) == 1
    switch.remove()


def test_export_of_an_unknown_lipschitz_module_raises():
    class Own(lnn.LipschitzModule):
        pass

    with pytest.raises(TypeError, match="Own does not define vanilla_export"):
        lipkernels.vanilla_export(Own())


def test_exports_load_where_only_torch_is_installed(tmp_path):
    examples = {}
    for layer in LAYERS:
        module, x = layer.trained().eval(), layer.input()
        plain = lipkernels.vanilla_export(module)
        examples[layer.name] = (plain, x, module(x).detach())
        examples[layer.name + "-copied"] = (copy.deepcopy(plain), x, module(x).detach())
    path = tmp_path / "exports.pt"
    torch.save(examples, path)
    code = """
block("lipkernels")
import torch
torch.set_num_threads(1)
try:
    import lipkernels
    raise SystemExit("lipkernels is here")
except ModuleNotFoundError:
    pass
examples = torch.load(sys.argv[1], weights_only=False)
for name, (plain, x, y) in examples.items():
    error = (plain(x) - y).abs().max()
    assert error <= 1e-5 * y.abs().max(), (name, error)
assert not any(m.startswith("lipkernels") for m in sys.modules)
print(len(examples))
"""
    done = subprocesses.run(code, str(path))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * len(LAYERS)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_state_dict_of_an_export_loads_into_another(layer):
    plain = layer.trained().vanilla_export()
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    other = layer.trained(seed=9).vanilla_export()
    other.load_state_dict(torch.load(file, weights_only=True))
    x = layer.input()
    assert torch.equal(other(x), plain(x))


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular", "symmetric", "zeros"])
def test_export_pads_as_forward_does_after_a_reassignment(mode):
    layer = lnn.SpectralConv1d(2, 2, 3, padding=1, padding_mode=mode)
    layer.padding = (2,)
    x = torch.randn(3, 2, 9)
    assert torch.equal(lipkernels.vanilla_export(layer)(x), layer(x))
