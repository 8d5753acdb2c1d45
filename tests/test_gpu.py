"""Weights at real sizes on a CUDA device: values, gradients, bounds, graphs, streams, no waiting.

`make gpu` runs these tests and all others that are marked ``gpu``. Every op runs on each backend of
kernels that has it; the truth is computed in float64 on the device.
"""

from __future__ import annotations

import math

import cases
import pytest
import tolerances
import torch
from bad_weights import BAD_WEIGHTS, bad_weight

import lipkernels
import lipkernels.nn as lnn
from bench import accuracy
from bench.cases import SHAPES
from bench.gpu import implementations
from bench.gpu.accuracy import relative_error
from bench.gpu.contenders import WEIGHT_OPS, exact, work
from bench.gpu.queued import BOTH, FORWARD, Graphed
from bench.gpu.shapes import CIFAR_NET, resnet_50, weights
from lipkernels import backends
from lipkernels import functional as F

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GRADIENTS = {
    "polar_factor": tolerances.POLAR_GRADIENT,
    "bjorck": tolerances.BJORCK_GRADIENT,
    "spectral_normalize": tolerances.NORM_GRADIENT,
    "frobenius_normalize": tolerances.NORM_GRADIENT,
}
NETS = {"cifar": CIFAR_NET, "resnet-50": resnet_50()[:-1]}  # the convolutions


def _kernels_of(op):
    for name in ("triton", "cuda"):
        if name in implementations.IMPLEMENTED[op]:
            try:
                backends.resolve(op, implementations.IMPLEMENTED[op], DEVICE, name)
            except backends.BackendUnavailableError as error:
                yield name, [pytest.mark.skip(reason=str(error))]
            else:
                yield name, []


def on_kernels(*ops):
    """Parametrize a test over (op, backend): the kernels that there are."""
    parameters = [
        pytest.param(op, name, marks=marks, id=f"{op}-{name}")
        for op in ops
        for name, marks in _kernels_of(op)
    ]
    return pytest.mark.parametrize(("op", "backend"), parameters)


on_weight_ops = on_kernels(*GRADIENTS)


def assert_sound(results, scales=1.0):
    for i, result in enumerate(results):
        scale = scales if isinstance(scales, float) else scales[i]
        assert accuracy.operator_norm(result) <= scale * (1 + tolerances.SVD), tuple(result.shape)


def assert_exact(op, results, gradients, truth):
    value, gradient = tolerances.WEIGHT_VALUES[op][torch.float32], GRADIENTS[op][torch.float32]
    for got, expected in zip(results, truth[0], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=value)
    for got, expected in zip(gradients, truth[1], strict=True):
        assert relative_error(got, expected) <= gradient, tuple(got.shape)


def assert_equal_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def both(op, backend, problem):
    """Results and gradients as one list."""
    results, gradients = work(WEIGHT_OPS[op], backend, *problem).both()
    return [*results, *gradients]


# --------------------------------------------------------------------------- values, gradients
@pytest.mark.parametrize("shape", [*SHAPES, (53, 1031), (1500, 70)], ids=str)
@on_weight_ops
def test_one_weight(op, backend, shape):
    problem = weights([shape], DEVICE)
    results, gradients = work(WEIGHT_OPS[op], backend, *problem).both()
    assert_exact(op, results, gradients, exact(WEIGHT_OPS[op], *problem))
    assert_sound(results)


@pytest.mark.parametrize("net", NETS)
@on_weight_ops
def test_all_weights_of_a_net(op, backend, net):
    problem = weights(NETS[net], DEVICE)
    results, gradients = work(WEIGHT_OPS[op], backend, *problem).both()
    assert_exact(op, results, gradients, exact(WEIGHT_OPS[op], *problem))
    assert_sound(results)
    assert_equal_bits(both(op, backend, problem), [*results, *gradients])


@pytest.mark.parametrize("condition", [1, 10, 100, 1000])
@pytest.mark.parametrize("shape", [(64, 576), (256, 256), (700, 130)], ids=str)
@on_kernels("polar_factor")
def test_conditions(op, backend, shape, condition):
    weight = cases.weight_of_condition(shape, condition).to(DEVICE, torch.float32)
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    truth = accuracy.truth(weight, cotangent)
    (result,), (gradient,) = work(WEIGHT_OPS[op], backend, [weight], [cotangent]).both()
    limit = tolerances.POLAR_BY_CONDITION[torch.float32][condition]
    torch.testing.assert_close(result.double(), truth.polar, rtol=0, atol=limit)
    assert accuracy.orthogonality_error(result) <= tolerances.ORTHOGONALITY[torch.float32]
    assert relative_error(gradient, truth.gradient) <= tolerances.POLAR_GRADIENT[torch.float32]
    assert_sound([result])


# ----------------------------------------------------------------------------------- soundness
@cases.by_dtype((torch.float32, torch.float16, torch.bfloat16))
@on_weight_ops
def test_the_norm_never_exceeds_the_scale_in_any_format(op, backend, dtype):
    raw, _ = weights(CIFAR_NET, DEVICE)
    scales = [0.3 * 1.37**i for i in range(len(raw))]
    kept = [w.to(dtype) for w in raw]
    found = getattr(F, op)(kept, scales, backend=backend)
    results = found[0] if isinstance(found, tuple) else found
    assert all(result.dtype == dtype for result in results)
    assert_sound(results, scales)


@pytest.mark.parametrize("name", BAD_WEIGHTS)
@on_weight_ops
def test_bad_weights_give_finite_results_within_the_bound(op, backend, name):
    bad = [bad_weight(name, shape, torch.float32).to(DEVICE) for shape in ((96, 200), (70, 70))]
    found = getattr(F, op)(bad, backend=backend)
    results = found[0] if isinstance(found, tuple) else found
    assert all(bool(result.isfinite().all()) for result in results)
    assert_sound(results)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@on_weight_ops
def test_one_spoiled_weight_spoils_no_other(op, backend, bad):
    raw, _ = weights(((64, 80),) * 3, DEVICE)
    spoiled = [raw[0], raw[1].clone(), raw[2]]
    spoiled[1][3, 5] = bad
    with torch.no_grad():
        expected = WEIGHT_OPS[op](raw, backend)
        found = WEIGHT_OPS[op](spoiled, backend)
    assert bool(found[1].isnan().any())
    assert_equal_bits([found[0], found[2]], [expected[0], expected[2]])


@on_kernels("retract")
def test_retracted_weights_keep_their_norm(op, backend):
    raw, _ = weights(CIFAR_NET, DEVICE)
    near = F.polar_factor(raw, backend="reference")
    generator = torch.Generator(DEVICE).manual_seed(0)
    moved = [
        w + 1e-3 * torch.randn(w.shape, generator=generator, device=DEVICE) / w.shape[-1] ** 0.5
        for w in near
    ]
    results = F.retract(moved, backend=backend)
    truth = F.polar_factor([w.double() for w in moved], backend="reference")
    for result, expected in zip(results, truth, strict=True):
        limit = tolerances.WEIGHT_VALUES["polar_factor"][torch.float32]
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=limit)
    assert_sound(results)


@on_kernels("project_tangent")
def test_projected_gradients(op, backend):
    raw, grads = weights(CIFAR_NET, DEVICE)
    held = F.polar_factor(raw, backend="reference")
    found = F.project_tangent(grads, held, backend=backend)
    expected = F.project_tangent(
        [g.double() for g in grads], [w.double() for w in held], backend="reference"
    )
    for got, truth in zip(found, expected, strict=True):
        assert relative_error(got, truth) <= tolerances.NORM_GRADIENT[torch.float32]


# -------------------------------------------------------------------------- graphs and streams
@pytest.mark.parametrize("which", [FORWARD, BOTH])
@on_weight_ops
def test_captured_in_a_graph(op, backend, which):
    raw, cotangents = weights(CIFAR_NET, DEVICE)
    captured = Graphed([work(WEIGHT_OPS[op], backend, raw, cotangents)], which)
    for seed in (1, 2):
        others, others_cotangents = weights(CIFAR_NET, DEVICE, seed)
        with torch.no_grad():
            for old, new in zip((*raw, *cotangents), (*others, *others_cotangents), strict=True):
                old.copy_(new)
        captured()
        found = captured.first()
        expected = work(WEIGHT_OPS[op], backend, others, others_cotangents)
        if which == FORWARD:
            assert_equal_bits(found, expected.forward())
        else:
            for got, wanted in zip(found, expected.both(), strict=True):
                assert_equal_bits(got, wanted)


@on_weight_ops
def test_two_streams_at_once(op, backend):
    problems = [weights(CIFAR_NET, DEVICE, seed) for seed in (0, 1)]
    expected = [both(op, backend, problem) for problem in problems]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = [[], []]
    for _ in range(4):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(both(op, backend, problems[i]))
    torch.cuda.synchronize()
    for i in range(2):
        for results in found[i]:
            assert_equal_bits(results, expected[i])


@pytest.fixture
def no_waiting():
    """A function that forbids the host to wait for the device, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@on_weight_ops
def test_the_host_never_waits(op, backend, no_waiting):
    problem = weights(CIFAR_NET, DEVICE)
    for _ in range(2):
        both(op, backend, problem)
    no_waiting()
    both(op, backend, problem)


def test_waiting_would_be_noticed(no_waiting):
    x = torch.ones(1, device=DEVICE)
    no_waiting()
    with pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


# ---------------------------------------------------------------------------------------- nets
def net():
    """Layers of every constraint that has kernels, and every image op."""
    torch.manual_seed(0)
    return lnn.Sequential(
        lnn.InvertibleDownSampling(2),
        lnn.ScaledL2NormPool2d(2),
        torch.nn.Flatten(),
        lnn.SpectralLinear(12 * 16, 256),
        lnn.GroupSort2(),
        lnn.SpectralLinear(256, 128),
        lnn.GroupSort2(),
        lnn.SpectralLinear(128, 64, eps_bjorck=None),
        lnn.FullSort(),
        lnn.FrobeniusLinear(64, 10, disjoint_neurons=False),
    ).to(DEVICE)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 3, 16, 16, generator=generator).to(DEVICE)


def test_a_grouped_net_trains_without_waiting(no_waiting):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lipkernels.group_weights(model)
    batches = [batch(seed) for seed in range(4)]
    for i, x in enumerate(batches):
        if i == 2:
            no_waiting()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_compiled_steps_of_a_grouped_net_are_those_of_eager():
    torch._dynamo.reset()
    nets = [net(), net()]
    for model in nets:
        lipkernels.group_weights(model)

    def loss_of(model):
        return lambda x: model(x).square().mean()

    functions = [loss_of(nets[0]), torch.compile(loss_of(nets[1]), fullgraph=True)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in nets]
    for seed in range(3):
        losses = []
        for function, optimizer in zip(functions, optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(function(batch(seed)))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_every_layer_of_a_trained_net_holds_its_bound():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    lipkernels.group_weights(model)
    for seed in range(5):
        optimizer.zero_grad()
        model(batch(seed)).square().mean().neg().backward()
        optimizer.step()
    layers = [layer for layer in model if hasattr(layer, "raw_weight")]
    assert len(layers) == 4
    with torch.no_grad():
        assert_sound([layer.weight for layer in layers], [layer.matrix_scale() for layer in layers])


# -------------------------------------------------------------------------------------- images
IMAGE_OPS = {
    "space_to_depth": lambda x, b: F.space_to_depth(x, 2, backend=b),
    "depth_to_space": lambda x, b: F.depth_to_space(x, 2, backend=b),
    "group_sort": lambda x, b: F.group_sort(x, 2, backend=b),
    "l2_norm_pool2d": lambda x, b: F.l2_norm_pool2d(x, 2, backend=b),
    "scaled_avg_pool2d": lambda x, b: F.scaled_avg_pool2d(x, 2, scale=2.0, backend=b),
}


@pytest.mark.parametrize("shape", [(128, 64, 32, 32), (3, 20, 18, 50)], ids=str)
@on_kernels(*IMAGE_OPS)
def test_images(op, backend, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    grad = torch.randn(IMAGE_OPS[op](x, "reference").shape, device=DEVICE)

    def function(inputs, name):
        return [IMAGE_OPS[op](inputs[0], name)]

    truth = exact(function, [x], [grad])
    results, gradients = work(function, backend, [x], [grad]).both()
    limit = tolerances.POOL_VALUES[torch.float32] if "pool" in op else 0.0
    assert relative_error(results[0], truth[0][0]) <= limit
    assert relative_error(gradients[0], truth[1][0]) <= limit
