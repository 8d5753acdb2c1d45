"""torch.compile(fullgraph=True): no graph break, the same values, the same gradients."""

import pytest
import torch
from functorch.compile import make_boxed_func
from layer_table import LAYERS
from torch import nn

import lipkernels.nn as lnn
from lipkernels import group_weights, grouped

FIRST_OF_EACH_CLASS = list({layer.cls: layer for layer in reversed(LAYERS)}.values())
OTHERS = ["SpectralLinear-normalized", "SpectralLinear-bjorck", "SpectralConv2d-symmetric"]
COMPILED = [*FIRST_OF_EACH_CLASS, *(c for c in LAYERS if c.name in OTHERS)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module):
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def run(function, module, x):
    """The output, the input's gradient and those of the parameters."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", COMPILED, ids=str)
def test_layer(layer):
    module, x = layer.trained(), layer.input()
    expected = run(module, module, x)
    assert_equal(run(compiled(module), module, x), expected)


def small_net():
    torch.manual_seed(0)
    return lnn.Sequential(
        lnn.SpectralConv2d(2, 6, 3, padding=1, padding_mode="circular"),
        lnn.GroupSort2(),
        lnn.InvertibleDownSampling(2),
        lnn.SpectralConv2d(24, 4, 3, groups=2, eps_bjorck=None),
        lnn.MaxMin(),
        lnn.ScaledL2NormPool2d(1),
        nn.Flatten(),
        lnn.SpectralLinear(8, 8, maxiter_bjorck=3),
        nn.ReLU(),
        lnn.SpectralLinear(8, 6),
        lnn.HouseHolder(6),
        lnn.FrobeniusLinear(6, 2, disjoint_neurons=False),
        k_coef_lip=2.0,
    )


@pytest.mark.parametrize("how", ["plain", "switch", "context"])
def test_net(how):
    net, x = small_net(), torch.randn(3, 2, 6, 6)
    expected = run(net, net, x)
    function = compiled(net)
    if how == "plain":
        assert_equal(run(function, net, x), expected)
    elif how == "switch":
        switch = group_weights(net)
        assert_equal(run(function, net, x), expected)
        switch.remove()
        assert_equal(run(function, net, x), expected)
    else:
        with grouped(net):
            assert_equal(run(function, net, x), expected)
    assert all(layer.prepared() is None for layer in net.modules() if hasattr(layer, "raw_weight"))


def test_training_steps_are_those_of_eager():
    nets = [small_net(), small_net()]
    functions = [nets[0], compiled(nets[1])]
    steps = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    for i in range(4):
        x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(i))
        for function, step in zip(functions, steps, strict=True):
            step.zero_grad()
            function(x).square().sum().backward()
            step.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    x = torch.randn(3, 2, 6, 6)
    torch.testing.assert_close(functions[1].eval()(x), nets[0].eval()(x), rtol=1e-4, atol=1e-5)


def test_a_new_constant_takes_effect():
    module = lnn.SpectralLinear(4, 3, bias=False)
    function, x = compiled(module), torch.randn(2, 4)
    y = function(x)
    for k in (2.0, 3.0, 0.5):
        module.set_klip_factor(k)
        torch.testing.assert_close(function(x), k * y, rtol=1e-5, atol=1e-6)


def test_batches_of_other_sizes():
    net = small_net()
    function = compiled(net)
    for n in (3, 5, 8, 1):
        x = torch.randn(n, 2, 6, 6)
        assert_equal(run(function, net, x), run(net, net, x))


def test_two_nodes_for_a_weight():
    # Forward and backward of a constraint are one opaque node each.
    graphs = []

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    module = lnn.SpectralLinear(4, 3, bias=False)
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(module, fullgraph=True, backend=backend)(torch.randn(2, 4)).sum().backward()
    forward, backward = graphs
    assert [n for n in forward if "lipkernels" in n] == ["lipkernels.polar_factor.default"]
    assert [n for n in backward if "lipkernels" in n] == [
        "lipkernels.polar_factor_backward.default"
    ]


def test_autocast():
    net, x = small_net(), torch.randn(3, 2, 6, 6)
    function = compiled(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = net(x), function(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=2e-2)


EXPORTED = ("SpectralLinear", "SpectralConv2d", "GroupSort", "HouseHolder", "Sequential")


@pytest.mark.parametrize("layer", [c for c in LAYERS if c.name in EXPORTED], ids=str)
def test_torch_export(layer):
    module, x = layer.trained().eval(), layer.input()
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-6)
