"""What a layer computes: torch.nn's function of the constrained weight, for every kind of input."""

import copy
from collections import OrderedDict

import pytest
import tolerances
import torch
from cases import by_dtype
from layer_table import CONSTRAINED, LAYERS, TWINS
from torch import nn

import lipkernels.nn as lnn
from lipkernels import functional as F

LINEARS = [layer for layer in CONSTRAINED if "Linear" in layer.name]
IMAGES = [layer for layer in LAYERS if "Conv" in layer.name or "Pool" in layer.name]


def without_bias(module):
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    return module


def dense_twin(layer, module):
    """A plain torch layer with the constrained weight."""
    keywords = {}
    if "Conv" in layer.name:
        keywords = {
            name: getattr(module, name)
            for name in ("stride", "padding", "dilation", "groups", "padding_mode")
        }
        keywords["kernel_size"] = module.kernel_size
        if hasattr(module, "output_padding") and "Transpose" in layer.name:
            keywords["output_padding"] = module.output_padding
    twin = TWINS[layer.cls](*layer.arguments[:2], bias=module.bias is not None, **keywords)
    twin.load_state_dict(
        {"weight": module.weight, **({"bias": module.bias} if module.bias is not None else {})}
    )
    return twin


# ------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("layer", [c for c in CONSTRAINED if "symmetric" not in c.name], ids=str)
def test_forward_is_torch_with_the_constrained_weight(layer):
    module = layer.trained()
    x = layer.input()
    assert torch.equal(module(x), dense_twin(layer, module)(x))
    assert not torch.equal(module.weight, module.raw_weight)


def test_symmetric_padding_is_numpy_padding():
    np = pytest.importorskip("numpy")
    layer = next(c for c in LAYERS if c.name == "SpectralConv2d-symmetric")
    module, x = layer.trained(), layer.input()
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (2, 2)), mode="symmetric")
    expected = nn.functional.conv2d(torch.from_numpy(padded), module.weight, module.bias)
    assert torch.equal(module(x), expected)


def test_pools_are_scaled_sums_and_norms_of_their_windows():
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    blocks = x.reshape(2, 3, 3, 2, 2, 4)  # windows of 2 x 4
    total, norm = blocks.sum((3, 5)), blocks.square().sum((3, 5)).sqrt()
    pool = lnn.ScaledAvgPool2d((2, 4), k_coef_lip=3.0)
    torch.testing.assert_close(pool(x), 3 * total / 8**0.5)
    torch.testing.assert_close(lnn.ScaledL2NormPool2d((2, 4), k_coef_lip=3.0)(x), 3 * norm)
    # A 2 x 2 window at every pixel reads an inner pixel four times.
    windows = x.unfold(2, 2, 1).unfold(3, 2, 1)
    torch.testing.assert_close(lnn.ScaledAvgPool2d(2, 1)(x), windows.sum((-2, -1)) / 4)
    expected = windows.square().sum((-2, -1)).sqrt() / 2
    torch.testing.assert_close(lnn.ScaledL2NormPool2d(2, 1)(x), expected)
    total, norm = x.sum((2, 3), keepdim=True), x.square().sum((2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(lnn.ScaledAdaptiveAvgPool2d(1)(x), total / 48**0.5)
    torch.testing.assert_close(lnn.ScaledAdaptiveL2NormPool2d(1)(x), norm)


def test_samplings_and_activations_are_their_functions():
    x = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    down = lnn.InvertibleDownSampling((2, 3), mode="DCR", k_coef_lip=0.5)
    assert torch.equal(down(x), F.space_to_depth(x, (2, 3), mode="DCR") * 0.5)
    up = lnn.InvertibleUpSampling(2, data_format="channels_last", k_coef_lip=2.0)
    last = x.movedim(1, -1)
    expected = F.depth_to_space(last.repeat(1, 1, 1, 2), 2, data_format="channels_last") * 2
    assert torch.equal(up(last.repeat(1, 1, 1, 2)), expected)
    assert torch.equal(down(x).mul(2), lnn.InvertibleDownSampling((2, 3), mode="DCR")(x))
    assert torch.equal(lnn.GroupSort(3, dim=-1)(x), F.group_sort(x, 3, -1))
    assert torch.equal(lnn.GroupSort2()(x), F.group_sort(x, 2))
    assert torch.equal(lnn.FullSort(dim=2)(x), x.sort(2)[0])
    assert torch.equal(lnn.MaxMin(-1, k_coef_lip=3.0)(x), F.max_min(x, -1) * 3)
    assert torch.equal(lnn.Abs(k_coef_lip=0.5)(x), x.abs() / 2)
    householder, slope = lnn.HouseHolder(4), lnn.LPReLU(4, 0.5)
    assert torch.equal(householder(x), F.householder(x, householder.theta))
    assert torch.equal(slope(x), torch.where(x > 0, x, 0.5 * x))


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_weight_and_raw_weight(layer):
    module = layer.trained()
    raw = dict(module.named_parameters())["weight"]
    assert module.raw_weight is raw and isinstance(raw, nn.Parameter)
    assert module.weight.shape == raw.shape
    assert module.weight.requires_grad and not module.weight.is_leaf
    module.weight.sum().backward()
    assert raw.grad is not None
    names = [name for name, _ in module.named_parameters()]
    assert names == (["weight"] if module.bias is None else ["weight", "bias"])
    assert list(module.state_dict()) == names


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_nothing_is_stale(layer):
    module, x = layer.trained().eval(), layer.input()
    first = module(x)
    with torch.no_grad():
        module.raw_weight.data.copy_(layer.trained(seed=5).raw_weight)
    fresh = layer.trained(seed=5).eval()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), fresh(x), rtol=0, atol=1e-6)
    assert not torch.allclose(module(x), first)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_eval_computes_what_training_computes(layer):
    module, x = layer.trained(), layer.input()
    trained = module.train()(x)
    torch.testing.assert_close(module.eval()(x), trained, rtol=0, atol=1e-6)
    state = copy.deepcopy(dict(module.named_buffers()))
    module(x)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, state[name])  # eval writes nothing


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_constant_times_the_output(layer):
    module = without_bias(layer.trained(k_coef_lip=1.0))
    x = layer.input()
    y = module(x)
    for k in (3.0, 0.25):
        module.set_klip_factor(k)  # takes effect at once
        assert module.k_coef_lip == k
        torch.testing.assert_close(module(x), k * y, rtol=1e-5, atol=1e-6)
    module.k_coef_lip = 2
    torch.testing.assert_close(module(x), 2 * y, rtol=1e-5, atol=1e-6)
    assert isinstance(module.k_coef_lip, float)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_constant_of_the_constructor(layer):
    module = without_bias(layer.trained(k_coef_lip=1.0))
    other = without_bias(layer.trained(k_coef_lip=0.5))
    x = layer.input()
    torch.testing.assert_close(other(x), 0.5 * module(x), rtol=1e-5, atol=1e-6)


def test_lipschitz_constant_of_disjoint_neurons():
    assert lnn.FrobeniusLinear(3, 16, k_coef_lip=0.5).lipschitz_constant == 2.0
    assert lnn.FrobeniusLinear(3, 16, disjoint_neurons=False).lipschitz_constant == 1.0
    assert lnn.SpectralLinear(3, 16, k_coef_lip=0.5).lipschitz_constant == 0.5


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_a_new_layer_is_orthogonal(layer):
    torch.manual_seed(0)
    module = layer.make(dtype=torch.float64)
    matrix = module.matrix(module.raw_weight.detach())
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-10)
    if module.bias is not None:
        bound = matrix.shape[-1] ** -0.5
        assert module.bias.abs().max() <= bound and module.bias.abs().max() > 0


@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
def test_reset_parameters_follows_the_seed(layer):
    module = layer.trained()
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    other = layer.make()
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------- inputs
@pytest.mark.parametrize("layer", LINEARS, ids=str)
def test_linear_takes_any_leading_dimensions(layer):
    module = layer.trained()
    x = torch.randn(2, 3, 4, 5)
    y = module(x)
    assert y.shape == (2, 3, 4, module.out_features)
    torch.testing.assert_close(module(x[1, 2, 3]), y[1, 2, 3])
    torch.testing.assert_close(module(x[1]), y[1])


@pytest.mark.parametrize("layer", IMAGES, ids=str)
def test_image_without_a_batch(layer):
    module, x = layer.trained(), layer.input()
    torch.testing.assert_close(module(x[0]), module(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_empty_batch(layer):
    module, x = layer.trained(), layer.input()
    empty = x[:0].requires_grad_()
    y = module(empty)
    assert y.shape == (0, *module(x).shape[1:])
    y.sum().backward()
    assert empty.grad.shape == empty.shape
    for p in module.parameters():
        assert p.grad is None or not p.grad.any()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layout_of_the_input_does_not_matter(layer):
    module, x = layer.trained(), layer.input()
    expected = module(x)
    torch.testing.assert_close(module(x.mT.contiguous().mT), expected)
    if x.dim() == 4:
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(module(last), expected)
    larger = x.repeat_interleave(2, 0)
    torch.testing.assert_close(module(larger[::2]), expected)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_input_is_not_changed(layer):
    module, x = layer.trained(), layer.input()
    before = x.clone()
    x.requires_grad_()
    y = module(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.detach(), before)
    assert x.grad.isfinite().all()
    y.detach().fill_(0.0)
    assert torch.equal(x.detach(), before)  # the output is not the input's memory


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@by_dtype()
def test_every_dtype(layer, dtype):
    exact = layer.trained().double()
    module = layer.trained().to(dtype)
    x = layer.input().to(dtype)
    for p, q in zip(exact.parameters(), module.parameters(), strict=True):
        p.data.copy_(q.data)
    y = module(x)
    assert y.dtype == dtype
    expected = exact(x.double())
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerances.LAYER_BY_DTYPE[dtype]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(layer, dtype):
    module, x = layer.trained(), layer.input()
    expected = module(x)
    with torch.autocast("cpu", dtype=dtype):
        y = module(x)
        if layer.constrained:
            assert module.weight.dtype == dtype
            assert module(x.to(dtype)).dtype == dtype
            y.float().sum().backward()
    if layer.constrained:
        assert y.dtype == dtype
        assert module.raw_weight.grad.dtype == torch.float32
        assert module.raw_weight.grad.isfinite().all()
    error = (y.double() - expected.double()).abs().max() / expected.abs().max()
    assert error <= tolerances.LAYER_BY_DTYPE[dtype]


def test_autocast_leaves_float64_alone():
    module = lnn.SpectralLinear(5, 3, dtype=torch.float64)
    x = torch.randn(2, 5, dtype=torch.float64)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), expected)


def test_layers_without_features():
    for cls in (lnn.SpectralLinear, lnn.FrobeniusLinear):
        assert cls(0, 3)(torch.zeros(2, 0)).shape == (2, 3)
        assert cls(3, 0)(torch.zeros(2, 3)).shape == (2, 0)
    module = lnn.SpectralLinear(0, 3)
    module(torch.zeros(2, 0)).sum().backward()
    assert module.bias.grad.tolist() == [2.0, 2.0, 2.0]


def test_a_single_row_and_a_single_column():
    row, column = lnn.SpectralLinear(6, 1), lnn.SpectralLinear(1, 6)
    torch.testing.assert_close(row.weight.norm(), torch.tensor(1.0))
    torch.testing.assert_close(column.weight.norm(), torch.tensor(1.0))


# ----------------------------------------------------------------------------------- training
@pytest.mark.parametrize("layer", CONSTRAINED, ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_optimizer_steps_lower_the_loss(layer, optimizer):
    torch.manual_seed(0)
    module, x = layer.make(), layer.input()
    target = torch.randn_like(module(x)) * 0.1
    steps = optimizer(module.parameters(), lr=0.02)
    raw = module.raw_weight.detach().clone()
    losses = []
    for _ in range(8):
        steps.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(module.raw_weight, raw)


def test_default_layers_stay_orthogonal_through_training():
    torch.manual_seed(0)
    net = lnn.Sequential(
        lnn.SpectralConv2d(1, 4, 2, stride=2),
        lnn.GroupSort2(),
        nn.Flatten(),
        lnn.SpectralLinear(16, 8),
        lnn.SpectralLinear(8, 8),
    )
    steps = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(20):
        steps.zero_grad()
        net(torch.randn(8, 1, 4, 4)).square().sum().sub(1.0).square().backward()
        steps.step()
    for layer in net:
        if hasattr(layer, "raw_weight"):
            matrix = layer.matrix(layer.weight.detach().double())
            values = torch.linalg.svdvals(matrix)
            limit = tolerances.ORTHOGONALITY[torch.float32]
            assert (values - layer.matrix_scale()).abs().max() <= limit


def test_power_iteration_vector_is_kept_in_training_alone():
    module = lnn.SpectralLinear(6, 4, eps_bjorck=None)
    with torch.no_grad():
        nn.init.normal_(module.raw_weight)
    start = module.u.clone()
    module.eval()(torch.randn(1, 6))
    assert torch.equal(module.u, start)
    module.train()(torch.randn(1, 6))
    left = torch.linalg.svd(module.raw_weight.detach())[0][:, 0]
    torch.testing.assert_close(module.u.abs(), left.abs(), rtol=0, atol=1e-5)
    assert "u" not in module.state_dict()


# ----------------------------------------------------------------------------------- containers
def test_sequential_shares_its_constant():
    net = lnn.Sequential(
        lnn.SpectralLinear(4, 4, k_coef_lip=5.0),
        nn.ReLU(),
        lnn.SpectralLinear(4, 2),
        k_coef_lip=0.5,
    )
    assert net[0].k_coef_lip * net[2].k_coef_lip == pytest.approx(0.5, rel=1e-12)
    assert net[0].k_coef_lip / net[2].k_coef_lip == pytest.approx(5.0, rel=1e-12)
    net.set_klip_factor(8.0)
    assert net[0].k_coef_lip * net[2].k_coef_lip == pytest.approx(8.0, rel=1e-12)
    assert net.lipschitz_constant == pytest.approx(8.0, rel=1e-12)


def test_sequential_refuses_a_product_above_its_constant():
    net = lnn.Sequential(lnn.SpectralLinear(2, 2), lnn.SpectralLinear(2, 2))
    net[0].set_klip_factor(3.0)
    with pytest.raises(ValueError, match=r"at most k_coef_lip = 1, got 3"):
        net(torch.zeros(1, 2))
    net.set_klip_factor(1.0)
    net(torch.zeros(1, 2))


def test_sequential_is_a_torch_sequential():
    layers = [lnn.SpectralLinear(3, 3), lnn.GroupSort(3), lnn.SpectralLinear(3, 2)]
    net = lnn.Sequential(*layers)
    assert isinstance(net, nn.Sequential)
    assert [*net] == layers and len(net) == 3 and net[1] is layers[1]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    named = lnn.Sequential(OrderedDict(first=layers[0], last=layers[2]))
    assert named.first is layers[0] and list(named.state_dict())[2] == "last.weight"
    assert isinstance(net[:2], lnn.Sequential) and net[:2][0] is layers[0]
    x = torch.randn(2, 3)
    expected = x
    for layer in layers:
        expected = layer(expected)
    assert torch.equal(net(x), expected)
