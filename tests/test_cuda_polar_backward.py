"""The gradient of the polar factor in CUDA, against the reference in float64."""

import cases
import cuda_kernels
import pytest
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from cases import weight_of_condition

from lipkernels import functional as F
from lipkernels.kernels.cuda import polar, polar_backward
from lipkernels.reference import polar as reference

pytestmark = cuda_kernels.MARKS
DEVICE = cases.device_of("cuda")

# Relative errors by condition number, of gradients of the exact P or P^-1: those in the twin's test
# are 2e-6, 5e-6, 1e-4 and 1e-3.
GRADIENT = {1: 2e-6, 10: 3e-6, 100: 5e-6, 1000: 1e-4}  # 6e-7, 8e-7, 1.6e-6, 2.9e-5
SHAPES = [(1, 1), (1, 6), (5, 1), (5, 5), (9, 4), (13, 17), (17, 16), (33, 20), (20, 70), (150, 40)]
LARGE = [(64, 64), (64, 65), (80, 64)]


def gradient_like(shape):
    """Not the numbers that `weight_of_condition` draws: along W every gradient is zero."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def saved_of(weight):
    """What a forward that makes no error would have saved, in float32."""
    u, vectors, p, unit = reference.polar_factor(weight.double())
    m = min(weight.shape[-2:])
    power = 1 if weight.shape[-2] == weight.shape[-1] else -1
    factor = (vectors * p.unsqueeze(-2).pow(power)) @ vectors.mT
    spectrum = torch.zeros_like(p)
    spectrum[..., 0] = -p[..., -1] * 1.2  # a bound from above
    if m > 1:
        spectrum[..., 1] = p[..., 0] / 1.2
    scalars = torch.cat((unit[..., 0], torch.full_like(unit[..., 0], 0.75)), dim=-1)
    return 0.75 * u, [factor, spectrum, scalars]


def gradients(weights, grads, scales, out=torch.float32):
    """Of the exact polar factors of float32 weights, as if those were in the format ``out``."""
    results, saved = [], []
    for w in weights:
        result, parts = saved_of(w)
        results.append(result.float().to(DEVICE))
        saved += [part.float().to(DEVICE) for part in parts]
    devices = [w.to(out).to(DEVICE) for w in weights]
    grads = [g.to(DEVICE) for g in grads]
    got = polar_backward.backward(grads, devices, results, saved, scales)
    return [g.cpu() for g in got]


def exact_gradient(weight, grad, scale):
    w = weight.double()
    return reference.polar_factor_vjp(scale * grad.double(), *reference.polar_factor(w))


def relative(got, expected):
    """The larger sum of squares is one where the exact gradient is zero: of a single number."""
    size = torch.linalg.norm(expected)
    return float(torch.linalg.norm(got.double() - expected) / (size if size > 0 else 1.0))


@pytest.mark.parametrize("condition", list(GRADIENT))
def test_ragged_group_by_condition(condition):
    weights = [weight_of_condition(shape, condition).float() for shape in SHAPES]
    grads = [gradient_like(shape) for shape in SHAPES]
    scales = [0.5 + i for i in range(len(SHAPES))]
    for w, g, scale, got in zip(
        weights, grads, scales, gradients(weights, grads, scales), strict=True
    ):
        assert got.shape == w.shape and got.dtype == torch.float32
        assert relative(got, exact_gradient(w, g, scale)) <= GRADIENT[condition], w.shape


def test_the_largest_sides():
    condition, shapes = 100, LARGE
    if polar.largest_side(torch.device(DEVICE)) == 128:
        shapes = [*LARGE, (66, 70), (150, 65), (128, 128)]
    for shape in shapes:
        w, g = weight_of_condition(shape, condition).float(), gradient_like(shape)
        (got,) = gradients([w], [g], [1.0])
        limit = 2 * GRADIENT[condition]  # a sum of 128 instead of 64
        assert relative(got, exact_gradient(w, g, 1.0)) <= limit, shape


@pytest.mark.parametrize("shape", [(5, 300), (260, 12)])
def test_blocks_that_share_columns(shape, monkeypatch):
    w, g = weight_of_condition(shape, 10).float(), gradient_like(shape)
    for cluster in (2, 4, 8):
        monkeypatch.setattr(polar_backward, "cluster_of", lambda *_, size=cluster: size)
        (got,) = gradients([w], [g], [1.0])
        assert relative(got, exact_gradient(w, g, 1.0)) <= GRADIENT[10]


def test_with_its_own_forward():
    shapes = [(13, 17), (20, 20), (2, 9, 4)]
    leaves = [weight_of_condition(s, 10).float().to(DEVICE).requires_grad_() for s in shapes]
    grads = [gradient_like(s) for s in shapes]
    results = F.polar_factor(leaves, [1.0, 2.0, 3.0], backend="cuda")
    torch.autograd.backward(results, [g.to(DEVICE) for g in grads])
    for scale, (leaf, grad) in enumerate(zip(leaves, grads, strict=True), start=1):
        exact = exact_gradient(leaf.detach().cpu(), grad, float(scale))
        assert relative(leaf.grad.cpu(), exact) <= GRADIENT[10]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    for shape in ((9, 20), (16, 16), (30, 7)):
        w = weight_of_condition(shape, 5).to(dtype)
        leaf = w.clone().to(DEVICE).requires_grad_()
        grad = gradient_like(shape).to(dtype)
        F.polar_factor(leaf, 2.0, backend="cuda").backward(grad.to(DEVICE))
        expected = exact_gradient(w, grad, 2.0)
        assert leaf.grad.dtype == dtype
        assert relative(leaf.grad.cpu(), expected) <= torch.finfo(dtype).eps / 2


def test_gradients_of_any_magnitude():
    w, g = weight_of_condition((9, 5), 10).float(), gradient_like((9, 5))
    (expected,) = gradients([w], [g], [1.0])
    for power in (2.0**-70, 2.0**70):
        assert torch.equal(gradients([w], [g * power], [1.0])[0], expected * power)
        assert torch.equal(gradients([w * power], [g], [1.0])[0], expected / power)
        both = gradients([w * power * 2.0**40], [g * power * 2.0**40], [1.0])[0]
        assert torch.equal(both, expected)
    assert torch.equal(gradients([w], [torch.zeros(9, 5)], [1.0])[0], torch.zeros(9, 5))
    (subnormal,) = gradients([w], [g * 2.0**-135], [1.0])
    torch.testing.assert_close(subnormal, expected * 2.0**-135, rtol=1e-2, atol=2.0**-147)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
def test_what_exceeds_a_format_becomes_its_largest_number(dtype):
    limit = torch.finfo(dtype).max
    for shape in ((4, 6), (3, 3), (6, 2)):
        w = weight_of_condition(shape, 2).float() * 2.0**-120
        (got,) = gradients([w], [gradient_like(shape) * 1e30], [1.0], torch.float32)
        assert got.abs().max() == torch.finfo(torch.float32).max
        w = weight_of_condition(shape, 2).to(dtype).float()
        (got,) = gradients([w], [gradient_like(shape).clamp(-1, 1) * 3e38], [4.0], dtype)
        assert got.dtype == dtype and got.isfinite().all() and got.abs().max() == limit


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (40, 3)])
def test_bad_gradients_and_weights(shape, bad):
    w, g = weight_of_condition(shape, 3).float(), gradient_like(shape)
    g[-1, 0] = bad
    (got,) = gradients([w], [g], [1.0])
    assert got.isnan().all()
    w[0, -1] = bad
    leaf = w.clone().to(DEVICE).requires_grad_()
    F.polar_factor(leaf, backend="cuda", check=False).backward(torch.ones(shape, device=DEVICE))
    assert leaf.grad.isnan().all()


def test_pathological_weights_have_finite_gradients():
    names = [*BAD_WEIGHTS]
    shapes = [[(6, 9), (12, 5), (20, 20)][i % 3] for i in range(len(names))]
    leaves = [
        bad_weight(name, shape, torch.float32).to(DEVICE).requires_grad_()
        for name, shape in zip(names, shapes, strict=True)
    ]
    results = F.polar_factor(leaves, backend="cuda")
    torch.autograd.backward(results, [torch.randn_like(r) for r in results])
    for name, leaf in zip(names, leaves, strict=True):
        assert leaf.grad.isfinite().all(), name


def test_exactly_symmetric_directions_vanish():
    # dL/dU = S U with S symmetric: T - T^T = 0, and only what leaves the row space counts.
    w = weight_of_condition((7, 7), 10).float()
    u = reference.polar_factor(w.double())[0]
    s = gradient_like((7, 7)).double()
    (got,) = gradients([w], [((s + s.T) @ u).float()], [1.0])
    assert got.abs().max() <= 2e-5  # 10 / 2 times the rounding of the gradient


@pytest.mark.parametrize("clusters", [1, 2])
def test_any_order_of_threads_gives_the_same_bits(monkeypatch, clusters):
    monkeypatch.setattr(polar_backward, "cluster_of", lambda *_: clusters)
    weights = [weight_of_condition(s, 10).float() for s in ((13, 17), (9, 70), (40, 33), (8, 8))]
    grads = [gradient_like(w.shape) for w in weights]
    first, *others = cuda_kernels.in_every_order(lambda: gradients(weights, grads, [1.0] * 4))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_a_list_is_bitwise_its_members():
    shapes = [(13, 17), (2, 9, 4), (20, 20)]
    weights = [weight_of_condition(s, 10).float() for s in shapes]
    grads = [gradient_like(s) for s in shapes]
    grads[0] = grads[0].mT.contiguous().mT
    together = gradients(weights, grads, [1.0, 2.0, 3.0])
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        assert torch.equal(gradients([w], [g.contiguous()], [i + 1.0])[0], together[i])


def test_a_launch_for_each_size_of_clusters(monkeypatch):
    launches = []
    for name in ("_small", "_large"):
        monkeypatch.setattr(
            polar_backward, name, lambda *call, of=name: launches.append((of, call[2], call[5]))
        )
    weights = [weight_of_condition(s, 2).float() for s in (*SHAPES, (3, 5, 7), (5, 600))]
    gradients(weights, [gradient_like(w.shape) for w in weights], [1.0] * len(weights))
    assert launches == [("_small", len(SHAPES) + 3, 1), ("_small", 1, 2)]


def test_more_than_a_launch_takes():
    w, g = weight_of_condition((60, 3, 5), 3).float(), gradient_like((60, 3, 5))
    (got,) = gradients([w], [g], [1.0])
    for k in (0, 55, 56, 59):
        assert torch.equal(gradients([w[k]], [g[k]], [1.0])[0], got[k])
