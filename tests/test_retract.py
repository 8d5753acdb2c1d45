"""Held weights: the bound after every step of every optimizer, and whatever other hands do."""

import copy
import io
import pickle

import pytest
import tolerances
import torch
from constrained_layers import FORMATS
from layer_table import CONSTRAINED
from operator_norm import assert_within, singular_values
from torch import nn
from torch.func import functional_call

import lipkernels.nn as lnn
from lipkernels import condense, grouped, vanilla_export
from lipkernels import functional as F
from lipkernels.constraints import FrobeniusNormalization, PolarFactor
from lipkernels.retract import Retractor

K = 1.5


def assert_on_constraint(layer):
    """The norm of the raw weight as it is stored: of each row where the promise is for rows."""
    matrix, scale = layer.matrix(layer.raw_weight), layer.matrix_scale()
    if layer.constraint == FrobeniusNormalization(per_row=True):
        for row in matrix.reshape(-1, 1, matrix.shape[-1]):
            assert_within(row, scale, layer)
    else:
        assert_within(matrix, scale, layer)


def constrained(model):
    return [m for m in model.modules() if isinstance(m, lnn.constrained.ConstrainedWeight)]


class Zoo(nn.Module):
    """Every constrained layer of the table, side by side; a loss with bounded derivatives."""

    def __init__(self, dtype=torch.float32, only=lambda layer: True, **keywords):
        super().__init__()
        self.entries = [layer for layer in CONSTRAINED if only(layer)]
        made = [e.trained(seed=i, dtype=dtype) for i, e in enumerate(self.entries)]
        self.layers = nn.ModuleList(made)
        self.inputs = [entry.input(dtype) for entry in self.entries]

    def forward(self):
        outputs = [layer(x) for layer, x in zip(self.layers, self.inputs, strict=True)]
        return sum(torch.cos(y).float().sum() for y in outputs)


def small_net():
    torch.manual_seed(0)
    return lnn.Sequential(
        lnn.SpectralConv2d(2, 4, 3, padding=1),
        lnn.GroupSort2(),
        nn.Flatten(),
        lnn.SpectralLinear(64, 10),
        lnn.GroupSort2(),
        lnn.SpectralLinear(10, 6, eps_bjorck=None),
        lnn.FrobeniusLinear(6, 1),
        k_coef_lip=K,
    )


def batch(n=8):
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(3))


def held_net(dtype=torch.float32):
    net = small_net().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    retractor = Retractor(net).attach(optimizer)
    return net, optimizer, retractor


def step(net, optimizer, x=None):
    optimizer.zero_grad()
    x = batch() if x is None else x
    torch.cos(net(x)).sum().backward()
    optimizer.step()


# ---------------------------------------------------------------------------------- optimizers
OPTIMIZERS = {
    "SGD": {},
    "SGD-momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "SGD-foreach": {"foreach": True},
    "SGD-fused": {"fused": True},
    "Adam": {},
    "Adam-foreach": {"foreach": True},
    "Adam-fused": {"fused": True},
    "AdamW": {},
    "AdamW-fused": {"fused": True},
    "RMSprop": {},
    "RMSprop-foreach": {"foreach": True},
    "Adagrad": {},
    "Adagrad-fused": {"fused": True},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Rprop": {},
    "ASGD": {},
    "Adafactor": {},
    "LBFGS": {"max_iter": 3},
    "Muon": {},
}


def optimizer_of(name, parameters, lr):
    return getattr(torch.optim, name.partition("-")[0])(parameters, lr=lr, **OPTIMIZERS[name])


def test_the_table_has_every_optimizer():
    kinds = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    covered = {name.partition("-")[0] for name in OPTIMIZERS}
    assert kinds - {"Optimizer", "SparseAdam"} <= covered  # SparseAdam takes no dense gradients


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bound_holds_after_every_step(name):
    if not hasattr(torch.optim, name.partition("-")[0]):
        pytest.skip(f"this torch has no {name}")
    if name == "Muon":  # for matrices alone
        zoo = Zoo(only=lambda layer: "Linear" in layer.name)
        parameters = [layer.raw_weight for layer in zoo.layers]
    else:
        zoo = Zoo()
        parameters = zoo.parameters()
    optimizer = optimizer_of(name, parameters, 0.05)
    with Retractor(zoo).attach(optimizer):
        for lr in (0.05, 0.05, 1e3, 1e10, 0.05):
            for group in optimizer.param_groups:
                group["lr"] = lr

            def closure():
                optimizer.zero_grad()
                loss = zoo()
                loss.backward()
                return loss

            optimizer.step(closure)
            for layer in zoo.layers:
                assert bool(torch.isfinite(layer.raw_weight).all())
                assert layer.is_held()
                assert_on_constraint(layer)
    assert not any(layer.is_held() for layer in zoo.layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_bound_holds_in_other_formats(dtype):
    zoo = Zoo(dtype)
    optimizer = torch.optim.SGD(zoo.parameters(), lr=0.05)
    Retractor(zoo).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        zoo().backward()
        optimizer.step()
        for layer in zoo.layers:
            assert layer.is_held() and layer.weight.dtype == dtype
            assert_on_constraint(layer)


def test_ten_thousand_steps():
    torch.manual_seed(0)
    net = lnn.Sequential(lnn.SpectralLinear(4, 6), lnn.GroupSort2(), lnn.SpectralLinear(6, 3))
    layers = [net[0], net[2]]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    Retractor(net).attach(optimizer)
    n = 10_000
    seen = [torch.empty(n, *layer.raw_weight.shape) for layer in layers]
    x, target = torch.randn(16, 4), torch.randn(16, 3)
    silly = {0: 1e3, 1: 1e10, 2: 1e-12, 3: 5.0}
    for i in range(n):
        phase = i // 100 % 10
        lr = silly.get(phase, 0.03 / (1 + phase)) if i < n - 10 else 0.0
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad(set_to_none=i % 2 == 0)
        torch.cos(net(x) - target).sum().backward()
        optimizer.step()
        for layer, record in zip(layers, seen, strict=True):
            record[i] = layer.raw_weight.detach()
    for layer, record in zip(layers, seen, strict=True):
        values = singular_values(record)
        assert values[:, 0].max() <= layer.matrix_scale() * (1 + tolerances.SVD)
        # Not by shrinking: after a few quiet steps all singular values are at the scale.
        limit = tolerances.ATTAINED[torch.float32]
        assert values[-1, -1] >= layer.matrix_scale() * (1 - limit)


# ----------------------------------------------------------------------------------- gradients
def test_gradients_are_those_of_constraining_in_forward():
    zoo = Zoo(only=lambda layer: layer.is_projection)
    Retractor(zoo).attach(torch.optim.SGD(zoo.parameters(), lr=0.1))
    free = copy.deepcopy(zoo)
    assert not any(layer.is_held() for layer in free.layers)
    zoo().backward()
    free().backward()
    for entry, layer, other in zip(zoo.entries, zoo.layers, free.layers, strict=True):
        assert layer.is_held()
        difference = torch.dist(layer.raw_weight.grad, other.raw_weight.grad)
        limit = tolerances.POLAR_GRADIENT[torch.float32]
        assert difference <= limit * other.raw_weight.grad.norm(), entry


def test_gradients_accumulate():
    net, _, _ = held_net()
    x = batch()
    torch.cos(net(x)).sum().backward()
    once = [p.grad.clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = None
    for part in x.split(2):
        torch.cos(net(part)).sum().backward()
    for p, whole in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, whole, rtol=1e-4, atol=1e-5)


def test_gradient_lies_along_the_constraint():
    net, _, _ = held_net()
    torch.cos(net(batch())).sum().backward()
    layer = net[3]
    symmetric = layer.raw_weight.grad @ layer.raw_weight.detach().mT
    symmetric = symmetric + symmetric.mT
    assert symmetric.norm() <= tolerances.RADIAL_GRADIENT[torch.float32] * 10 * (
        layer.raw_weight.grad.norm()
    )


def test_a_gradient_penalty_passes_through_held_weights():
    net, _, _ = held_net()
    free = copy.deepcopy(net)
    for model in (net, free):
        x = batch().requires_grad_()
        (grad,) = torch.autograd.grad(torch.cos(model(x)).sum(), x, create_graph=True)
        grad.square().sum().backward()
    for p, q in zip(net.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def test_frozen_weights_stay_as_they_are():
    net = small_net()
    net[3].raw_weight.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.1)
    Retractor(net).attach(optimizer)
    before = net[3].raw_weight.clone()
    for _ in range(3):
        step(net, optimizer)
    assert torch.equal(net[3].raw_weight, before) and net[3].is_held()
    assert not net[3].weight.requires_grad and net[3].raw_weight.grad is None
    assert_on_constraint(net[3])


def test_shared_weights():
    a, b = lnn.SpectralLinear(4, 4), lnn.SpectralLinear(4, 4)
    b.weight = a.raw_weight
    net = nn.Sequential(a, lnn.GroupSort2(), b)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    Retractor(net).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        torch.cos(net(torch.randn(5, 4))).sum().backward()
        optimizer.step()
        assert_within(a.raw_weight, 1.0)
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=tolerances.CONDENSE)
    b.set_klip_factor(0.5)
    assert_within(b.weight, 0.5)
    with pytest.raises(ValueError, match="share a raw weight to share its constraint"):
        Retractor(net)
    c = lnn.SpectralLinear(4, 4, eps_bjorck=None)
    c.weight = a.raw_weight
    with pytest.raises(ValueError, match="share a raw weight"):
        Retractor(nn.Sequential(a, c))


def test_attach_refuses_what_is_no_optimizer():
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got int"):
        Retractor(small_net()).attach(3)


# ------------------------------------------------------------------------------- bad gradients
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_gives_nan_and_check_raises(bad):
    for check in (False, True):
        layer = lnn.SpectralLinear(3, 4, check=check)
        other = lnn.SpectralLinear(3, 2)
        net = nn.ModuleList((layer, other))
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        Retractor(net).attach(optimizer)
        layer.raw_weight.grad = torch.full_like(layer.raw_weight, bad)
        if check:
            with pytest.raises(ValueError, match="expected finite entries"):
                optimizer.step()
            assert not layer.is_held()
        else:
            optimizer.step()
            assert bool(layer.weight.isnan().all())
        assert_within(other.weight, 1.0)


# --------------------------------------------------------------------------------- other hands
def one_ulp(net, layer):
    value = layer.raw_weight.data[0, 0]
    layer.raw_weight.data[0, 0] = torch.nextafter(value, value * 2)


def copied(net, layer):
    with torch.no_grad():
        layer.raw_weight.copy_(3 * torch.randn(layer.raw_weight.shape))


def loaded(net, layer):
    net.load_state_dict({k: 2 * v for k, v in net.state_dict().items()})


def second_optimizer(net, layer):
    other = torch.optim.SGD([layer.raw_weight], lr=10.0)
    layer.raw_weight.grad = torch.randn(layer.raw_weight.shape)
    other.step()


def averaged_by_torch(net, layer):
    average = torch.optim.swa_utils.AveragedModel(net)
    copied(net, layer)
    average.update_parameters(net)
    for p, q in zip(net.parameters(), average.module.parameters(), strict=True):
        p.data.copy_(q.data)


def swapped_storage(net, layer):
    layer.raw_weight.data = torch.randn(layer.raw_weight.shape)


def scaled_through_a_view(net, layer):
    layer.raw_weight.detach().numpy()[...] *= 4


def replaced(net, layer):
    layer.weight = nn.Parameter(2 * torch.randn(layer.raw_weight.shape))


def smaller_constant(net, layer):
    layer.set_klip_factor(0.25)


def written_into_weight(net, layer):
    with torch.no_grad():
        layer.weight.mul_(7.0)


def all_zero(net, layer):
    layer.raw_weight.data.zero_()


HANDS = [
    one_ulp,
    copied,
    loaded,
    second_optimizer,
    averaged_by_torch,
    swapped_storage,
    scaled_through_a_view,
    replaced,
    smaller_constant,
    written_into_weight,
    all_zero,
]


def assert_as_if_nobody_held(layer):
    free = copy.deepcopy(layer)
    assert not free.is_held()
    assert_within(layer.weight, layer.matrix_scale())
    torch.testing.assert_close(layer.weight, free.weight, rtol=0, atol=tolerances.CONDENSE)


@pytest.mark.parametrize("group", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize("hand", HANDS, ids=lambda f: f.__name__)
def test_a_weight_that_others_changed_is_not_trusted(hand, group):
    net, optimizer, _ = held_net()
    layer = net[3]
    assert layer.is_held()
    torch.manual_seed(1)
    hand(net, layer)
    assert not layer.is_held()
    assert_as_if_nobody_held(layer)
    x = batch()
    expected = copy.deepcopy(net)(x)
    if group:
        with grouped(net):
            torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    step(net, optimizer)
    if hand is not replaced:  # which the optimizer does not know
        assert layer.is_held()
        assert_on_constraint(layer)
    assert_as_if_nobody_held(layer)


def test_a_reloaded_state_is_trusted_only_byte_by_byte():
    net, _, _ = held_net()
    state = copy.deepcopy(net.state_dict())
    net.load_state_dict(state)  # writes the same bytes, but nobody vouches for them
    assert not any(layer.is_held() for layer in constrained(net))
    for layer in constrained(net):
        assert_as_if_nobody_held(layer) if not isinstance(layer, lnn.SpectralConv2d) else None
    fresh = small_net()
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(batch()), net(batch()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_are_not_held(way):
    net, _, _ = held_net()
    x = batch()
    if way == "deepcopy":
        other = copy.deepcopy(net)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert all(layer.is_held() for layer in constrained(net))
    assert not any(layer.is_held() for layer in constrained(other))
    torch.testing.assert_close(other(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_another_format_is_not_trusted(dtype):
    net, _, _ = held_net()
    net.to(dtype)
    for layer in constrained(net):
        assert not layer.is_held()
    assert_within(net[3].weight, net[3].matrix_scale())
    assert net(batch().to(dtype)).dtype == dtype


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.autocast], ids=str)
def test_autocast_rounds_within_the_bound(fmt):
    net, _, _ = held_net(fmt.weight)
    with fmt.context():
        for layer in constrained(net):
            assert layer.is_held() == (fmt.stored == fmt.weight)
        assert_within(net[3].weight, net[3].matrix_scale())
    assert all(layer.is_held() for layer in constrained(net))


def test_compiled_graphs_constrain():
    net, optimizer, _ = held_net()
    layer = net[3]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 64)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    layer.raw_weight.data.mul_(3)
    torch.testing.assert_close(compiled(x), copy.deepcopy(layer)(x), rtol=1e-4, atol=1e-5)
    step(net, optimizer)
    assert layer.is_held()
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_functorch_and_traces_constrain():
    net, _, _ = held_net()
    layer, x = net[3], torch.randn(5, 64)
    _, along = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(along, layer(x) - layer.bias, rtol=1e-4, atol=1e-5)
    jacobian = torch.func.jacrev(layer)(x[0])
    torch.testing.assert_close(jacobian, layer.weight, rtol=1e-4, atol=1e-5)
    traced = torch.jit.trace(layer, x)
    layer.raw_weight.data.mul_(3)  # the trace shares it, and was not made of a held weight
    torch.testing.assert_close(traced(x), copy.deepcopy(layer)(x), rtol=1e-4, atol=1e-5)
    exported = torch.export.export(held_net()[0][3], (x,))
    ops = {str(node.target) for node in exported.graph.nodes}
    assert "lipkernels.polar_factor.default" in ops


def test_functional_call_constrains_what_it_is_given():
    net, _, _ = held_net()
    layer, x = net[3], torch.randn(5, 64)
    other = {"weight": 5 * torch.randn(10, 64), "bias": torch.zeros(10)}
    free = copy.deepcopy(layer)
    free.load_state_dict(other)
    torch.testing.assert_close(functional_call(layer, other, (x,)), free(x), rtol=1e-4, atol=1e-5)
    assert layer.is_held()


def test_export_and_condense_while_held():
    net, _, _ = held_net()
    x = batch()
    y = net(x)
    plain = vanilla_export(net)
    torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-6)
    assert all(layer.is_held() for layer in constrained(net))
    with torch.no_grad():
        plain[3].weight.mul_(2)  # shares nothing
    assert torch.equal(net(x), y)
    for strict in (False, True):
        condense(net, strict)
        assert not any(layer.is_held() for layer in constrained(net))
        for layer in constrained(net):
            assert_on_constraint(layer)
        torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)


def test_remove_and_the_context_manager():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with Retractor(net).attach(optimizer) as retractor:
        assert all(layer.is_held() for layer in constrained(net))
        net.eval()
        assert all(layer.is_held() for layer in constrained(net))
        net.train()
    assert not any(layer.is_held() for layer in constrained(net))
    step(net, optimizer)
    assert not any(layer.is_held() for layer in constrained(net))
    retractor.remove()  # twice does no harm
    retractor.attach(optimizer)
    step(net, optimizer)
    assert all(layer.is_held() for layer in constrained(net))


def test_grouped_gives_the_same():
    net, _, _ = held_net()
    x = batch()
    y = net(x)
    with grouped(net):
        assert torch.equal(net(x), y)


def test_attach_computes_the_same_function():
    zoo = Zoo()
    before = [layer.weight.detach().clone() for layer in zoo.layers]
    Retractor(zoo).attach(torch.optim.SGD(zoo.parameters(), lr=0.1))
    for entry, layer, weight in zip(zoo.entries, zoo.layers, before, strict=True):
        difference = (layer.weight - weight).abs().max()
        assert difference <= tolerances.CONDENSE * max(1.0, float(weight.abs().max())), entry


def test_channels_last_weights():
    layer = lnn.SpectralConv2d(4, 6, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    Retractor(layer).attach(optimizer)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    for _ in range(3):
        optimizer.zero_grad()
        torch.cos(layer(x)).sum().backward()
        optimizer.step()
        assert layer.is_held()
        assert_on_constraint(layer)
    layer.raw_weight.data[0, 0, 0, 0] += 1e-6
    assert not layer.is_held()


def test_weights_without_elements():
    layer = lnn.SpectralLinear(0, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    Retractor(layer).attach(optimizer)
    layer(torch.zeros(2, 0)).sum().backward()
    optimizer.step()
    assert layer.is_held()


# --------------------------------------------------------------------------------- the function
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (6, 6), (5, 40), (40, 5), (3, 4, 7)])
def test_retraction_is_sound_and_converges(shape, backend):
    generator = torch.Generator().manual_seed(0)
    w = F.polar_factor(torch.randn(shape, generator=generator), K)
    for size in (0.0, 1e-6, 1e-3, 0.05, 0.3, 3.0, 1e4):
        moved = w + size * torch.randn(shape, generator=generator)
        result = F.retract(moved, K, backend=backend)
        assert_within(result, K, size)
        for _ in range(4):
            result = F.retract(result, K, backend=backend)
            assert_within(result, K, size)
        if size <= 0.05:
            torch.testing.assert_close(
                result, F.polar_factor(moved, K), rtol=0, atol=0.5 * size**2 + 4e-6
            )


@pytest.mark.parametrize("shape", [(256, 784), (784, 256), (300, 301), (161, 162)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-3, 3000.0])
def test_retraction_of_large_matrices(shape, scale):
    """Large enough for the C++ library to leave a large step's last digits to the next call."""
    generator = torch.Generator().manual_seed(0)
    w = F.polar_factor(torch.randn(shape, generator=generator), scale)
    for size in (1e-6, 1e-5, 3e-5, 1e-4, 1e-3, 1e-2):
        moved = w + scale * size * torch.randn(shape, generator=generator)
        result = F.retract(moved, scale, backend="cpu")
        # sigma_max(N) is about m^(1/2) + n^(1/2), so E is 2 sigma size: what is left of it, squared
        # at least, and the roundings that are paid for.
        defect = 2 * size * sum(n**0.5 for n in shape)
        left = min(1.0, 1e-3 + 0.75 * defect**2)
        values = singular_values(result) / scale
        assert values[0] <= 1.0
        assert values[-1] >= 1.0 - left
        for _ in range(3):
            result = F.retract(result, scale, backend="cpu")
        values = singular_values(result) / scale
        assert values[0] <= 1.0
        assert values[-1] >= 1.0 - 4e-6


def test_retraction_of_large_matrices_with_equal_roundings():
    """Entries of one size: sums in float32 are all off in the same direction."""
    h = torch.ones(1, 1)
    while len(h) < 1024:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    for rows in (200, 256):
        for size in (1.0, 1.0 + 3e-4, 1.0 + 1e-3, 1.0 - 3e-4, 1.003):
            result = F.retract(h[:rows] * (size / 32), backend="cpu")
            assert_within(result, 1.0, (rows, size))


def test_bad_entries_of_a_large_matrix():
    w = F.polar_factor(torch.randn(256, 300)).index_fill_(0, torch.tensor([7]), float("nan"))
    assert F.retract(w, backend="cpu").isnan().any()


def test_retraction_in_place_counts_as_a_write():
    w = F.polar_factor(torch.randn(4, 6)) * 1.01
    version, y = w._version, (w * torch.ones((), requires_grad=True)).sum()
    F.retract_(w)
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        inferred = F.polar_factor(torch.randn(4, 6)) * 1.01
        assert_within(F.retract_(inferred), 1.0)


def test_project_at_every_scale():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-20, 1e-10, 1.0, 1e10, 1e20):
        w = F.polar_factor(torch.randn(4, 9, generator=generator), scale)
        g = torch.randn(4, 9, generator=generator)
        expected = F.project_tangent(g.double(), w.double(), scale, backend="reference")
        torch.testing.assert_close(
            F.project_tangent(g, w, scale, backend="cpu").double(), expected, rtol=1e-4, atol=1e-5
        )


def test_polar_tangent_is_the_gradient_of_the_op():
    generator = torch.Generator().manual_seed(0)
    w = F.polar_factor(torch.randn(4, 9, generator=generator, dtype=torch.float64), K)
    g = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    leaf = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.polar_factor(leaf, K), leaf, g)
    along = PolarFactor().tangent(g, w, K, [])
    torch.testing.assert_close(along, expected, rtol=0, atol=1e-10)
