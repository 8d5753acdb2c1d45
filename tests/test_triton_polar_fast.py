"""Polar factors in fast precision: the bound as ever, and what is given up, in figures."""

import cases
import pytest
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from cases import weight_of_condition

pytest.importorskip("triton")

import lipkernels
import lipkernels.nn as lnn
from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels import polar as ops
from lipkernels.kernels.triton import polar, polar_backward, schedule
from lipkernels.reference import polar as reference

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]

SHAPES = [(13, 17), (12, 5), (20, 20)]
SCALES = [1.5, 0.7, 3.0]
# By condition number: the table of `lipkernels.precision`. The largest that was found.
DIRECTION = {3: 1e-3, 100: 5e-3, 1000: 1e-2}  # 5e-4, 3e-3, 5e-3
GRADIENT = {3: 2e-3, 100: 2e-2, 1000: 2e-1}  # 4e-4, 8e-3, 6e-2
ORTHOGONALITY = 2e-6  # 5e-7, as in high precision
NORM = 1e-6


def largest(x):
    return torch.linalg.svdvals(x.detach().double().cpu()).amax()


def with_gradients(weights, grads, scales, **how):
    leaves = [w.detach().clone().requires_grad_() for w in weights]
    results = F.polar_factor(leaves, scales, backend="triton", **how)
    torch.autograd.backward(results, grads)
    return [r.detach() for r in results], [w.grad for w in leaves]


def test_a_row_of_the_schedule_has_room():
    assert schedule.FAST_COEFFICIENTS[1:] == schedule.COEFFICIENTS[1:]
    low, high, error = schedule.FAST_INTERVALS[0]
    x = torch.linspace(0, high * 1.0199, 20001, dtype=torch.float64)
    e = 1 - x.square()
    value = x * sum(c * e**k for k, c in enumerate(schedule.FAST_COEFFICIENTS[0]))
    assert (value - 1).abs()[x >= low].max() <= error
    assert value.min() >= 0 and value.max() <= 1 + error


@pytest.mark.parametrize("condition", list(DIRECTION))
def test_what_is_given_up(condition):
    """And what is not: singular values. Fast results differ from the others: it is no no-op."""
    weights = [weight_of_condition(s, condition).float().to(DEVICE) for s in SHAPES]
    if condition == 100:
        weights.append(weight_of_condition((70, 66), condition).float().to(DEVICE))
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(w.shape, generator=generator).to(DEVICE) for w in weights]
    scales = [1.0] * len(weights)
    results, gradients = with_gradients(weights, grads, scales, precision="fast")
    plain = polar.polar_factors(weights, scales, fast=True)[0]  # without a margin
    for w, grad, result, gradient, u in zip(weights, grads, results, gradients, plain, strict=True):
        exact = reference.polar_factor(w.double().cpu())
        difference = torch.linalg.matrix_norm(result.double().cpu() - exact[0], 2)
        assert 1e-5 <= difference <= DIRECTION[condition], w.shape
        expected = reference.polar_factor_vjp(grad.double().cpu(), *exact)
        difference = torch.linalg.norm(gradient.double().cpu() - expected)
        assert difference <= GRADIENT[condition] * torch.linalg.norm(expected), w.shape
        values = torch.linalg.svdvals(u.double().cpu())
        assert (values.square() - 1).abs().max() <= ORTHOGONALITY
        assert values[0] <= 1 + NORM and largest(result) <= 1


def test_bad_weights_stay_within_the_bound_and_have_finite_gradients():
    generator = torch.Generator().manual_seed(0)
    names = [*BAD_WEIGHTS, "rank one and noise", "constant and noise", "a step"]
    weights = []
    for i, name in enumerate(names):
        m, n = SHAPES[i % len(SHAPES)]
        noise = 1e-3 * torch.randn(m, n, generator=generator)
        if name == "rank one and noise":
            left, right = (torch.randn(k, 1, generator=generator) for k in (m, n))
            weights.append(left @ right.mT + noise)
        elif name == "constant and noise":
            weights.append(1.37 + noise)
        elif name == "a step":
            weights.append(torch.ones(m, n).triu())
        else:
            weights.append(bad_weight(name, (m, n), torch.float32))
    scales = [SCALES[i % len(SCALES)] for i in range(len(names))]
    weights = [w.to(DEVICE) for w in weights]
    grads = [torch.randn(w.shape, generator=generator).to(DEVICE) for w in weights]
    found = with_gradients(weights, grads, scales, precision="fast")
    for name, result, gradient, scale in zip(names, *found, scales, strict=True):
        assert result.isfinite().all() and largest(result) <= scale, name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_within_the_bound_and_near_it(dtype):
    eps = torch.finfo(dtype).eps
    weights = [bad_weight("gaussian", s, dtype).to(DEVICE) for s in SHAPES]
    results = F.polar_factor(weights, SCALES, backend="triton", precision="fast")
    for result, scale in zip(results, SCALES, strict=True):
        assert result.dtype == dtype
        assert scale * (1 - 3 * eps) <= largest(result) <= scale


@pytest.mark.parametrize(("growth", "steps"), [(1.5, 1), (3.0, 1), (1e4, 1), (1.2, 6)])
def test_the_bound_does_not_depend_on_the_steps(monkeypatch, growth, steps):
    # What roundings that conspire might do: singular values of `growth`, and of much more.
    rows = tuple(tuple(growth * c for c in row) for row in schedule.FAST_COEFFICIENTS)
    monkeypatch.setattr(schedule, "FAST_COEFFICIENTS", rows)
    monkeypatch.setattr(schedule, "STEPS", steps)
    size = 6 + int(10 * growth) % 7  # the table of coefficients is cached by the shapes
    weights = [weight_of_condition((size, n), 2).float().to(DEVICE) for n in (size, size + 19)]
    results, gradients = with_gradients(
        weights, [torch.ones_like(w) for w in weights], SCALES[:2], precision="fast"
    )
    for result, gradient, scale in zip(results, gradients, SCALES, strict=False):
        assert result.isfinite().all() and largest(result) <= scale
        assert gradient.isfinite().all()
        assert result.any() == (growth < 10 and steps == 1)  # what is lost altogether is zero


def test_the_choice_holds_for_backward_and_is_the_contexts():
    w = weight_of_condition((5, 9), 30).float().to(DEVICE)
    grad = torch.ones_like(w)
    assert lipkernels.get_polar_precision() == "high"
    _, (high,) = with_gradients([w], [grad], [1.0])
    (named,), (fast,) = with_gradients([w], [grad], [1.0], precision="fast")
    assert not torch.equal(high, fast)
    leaf = w.clone().requires_grad_()
    with lipkernels.polar_precision("fast"):
        result = F.polar_factor(leaf, backend="triton")
        assert not torch.equal(F.polar_factor(w, backend="triton", precision="high"), result)
    result.backward(grad)  # outside the block
    assert torch.equal(result, named) and torch.equal(leaf.grad, fast)
    assert lipkernels.get_polar_precision() == "high"


def test_fewer_launches_back(monkeypatch):
    launches = []
    kind = type(polar.gram)
    run = kind.run

    def counted(self, *args, **kwargs):
        launches.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    w = weight_of_condition((5, 9), 5).float().to(DEVICE)
    with_gradients([w], [w], [1.0], precision="fast")
    forward = 7 + 4 * (schedule.STEPS - 1) + 4
    back = 8 + polar_backward.FAST_INVERSE + 2 * polar_backward.FAST_SMITH
    assert len(launches) == forward + back == 57


def test_op():
    leaf = weight_of_condition((3, 5), 3).float().to(DEVICE).requires_grad_()
    call = ([leaf], [2.0], torch.float32, "fast", "triton")
    some = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.polar_factor_op, call, test_utils=some)


def test_compiled():
    layer = lnn.SpectralLinear(5, 3).to(DEVICE)
    x = torch.ones(2, 5, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def gradient(module, precision):
        layer.zero_grad()
        with lipkernels.use_backend("triton"), lipkernels.polar_precision(precision):
            y = module(x)
        y.square().sum().backward()
        return layer.raw_weight.grad.clone()

    fast = gradient(compiled, "fast")
    assert torch.equal(fast, gradient(layer, "fast"))
    assert not torch.equal(fast, gradient(compiled, "high"))  # compiled once more
