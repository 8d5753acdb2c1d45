"""The polar factor in Triton: accuracy, the bound without a tolerance, gradients, launches."""

import cases
import pytest
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from cases import weight_of_condition

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels.triton import polar, polar_backward, schedule
from lipkernels.reference import polar as reference

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]

SHAPES = [(6, 9), (12, 5), (20, 20)]
SCALES = [1.5, 0.7, 3.0]
# Of the polar factor before the margin that roundings to a format cost.
ORTHOGONALITY = 2e-6  # 5e-7
NORM = 1e-6  # 3e-7
VALUES = {1: 2e-6, 10: 2e-6, 100: 5e-6, 1000: 1e-4}  # 6e-7, 7e-7, 2e-6, 3e-5
GRADIENT = {1: 2e-6, 10: 5e-6, 100: 1e-4, 1000: 1e-3}  # 4e-7, 9e-7, 4e-6, 1e-4
NET = [(8, 27), (16, 72), (40, 24), (20, 20), (20, 20), (10, 16)]
NET += [(8, 8), (8, 16), (16, 12), (4, 12), (6, 10), (1, 9)]
LAUNCHES = 60


def oracle(w):
    left, _, right = torch.linalg.svd(w.double().cpu(), full_matrices=False)
    return left @ right


def unrounded(weights):
    """U without a margin."""
    return polar.polar_factors([w.to(DEVICE) for w in weights], [1.0] * len(weights))[0]


def largest(x):
    return torch.linalg.svdvals(x.detach().double().cpu()).amax()


@pytest.mark.parametrize("row", range(3))
def test_a_row_of_the_schedule_is_what_the_table_says(row):
    low, high, error = schedule.INTERVALS[row]
    x = torch.linspace(0, high * 1.0029, 20001, dtype=torch.float64)
    e = 1 - x.square()
    value = x * sum(c * e**k for k, c in enumerate(schedule.COEFFICIENTS[row]))
    assert (value - 1).abs()[x >= low].max() <= error
    assert value.min() >= 0 and value.max() <= 1 + error


def test_rows_follow_one_another():
    (_, high, grown), near, following = schedule.INTERVALS
    assert following[0] <= 1 - grown and 1 + grown <= following[1] <= high
    assert near[0] ** 2 <= 0.4 and near[1] >= high  # E of at most 0.6, and no x above `high`
    assert max(1 - (1 - grown) ** 2, (1 + grown) ** 2 - 1) <= 0.31


@pytest.mark.parametrize("condition", list(VALUES))
@pytest.mark.parametrize("shape", [(5, 5), (13, 17), (64, 9)])
def test_accuracy_by_condition(shape, condition):
    w = weight_of_condition(shape, condition).float()
    (u,) = (x.double().cpu() for x in unrounded([w]))
    gram = u @ u.mT if shape[0] <= shape[1] else u.mT @ u
    eye = torch.eye(len(gram), dtype=torch.float64)
    assert torch.linalg.matrix_norm(gram - eye, 2) <= ORTHOGONALITY
    assert largest(u) <= 1 + NORM
    torch.testing.assert_close(u, oracle(w), rtol=0, atol=VALUES[condition])


def test_accuracy_of_several_blocks():
    w = weight_of_condition((70, 66), 100).float()
    (u,) = (x.double().cpu() for x in unrounded([w]))
    eye = torch.eye(66, dtype=torch.float64)
    assert torch.linalg.matrix_norm(u.mT @ u - eye, 2) <= ORTHOGONALITY
    assert largest(u) <= 1 + NORM
    torch.testing.assert_close(u, oracle(w), rtol=0, atol=VALUES[100])


def test_bad_weights_stay_within_the_bound_and_have_finite_gradients():
    names = ["Hilbert", "1e38", *BAD_WEIGHTS]
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(names))]
    scales = [SCALES[i % len(SCALES)] for i in range(len(names))]
    rows, columns = (torch.arange(n) for n in shapes[0])
    members = [1 / (1.0 + rows[:, None] + columns[None, :])]
    members.append(torch.randn(shapes[1]).clamp(-3, 3) * 1e38)
    for name, shape in zip(names[2:], shapes[2:], strict=True):
        members.append(bad_weight(name, shape, torch.float32))
    leaves = [w.to(DEVICE).requires_grad_() for w in members]
    results = F.polar_factor(leaves, scales, backend="triton")
    torch.autograd.backward(results, [torch.randn_like(r) for r in results])
    for name, w, result, scale in zip(names, leaves, results, scales, strict=True):
        assert result.isfinite().all() and largest(result) <= scale, name
        assert w.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_within_the_bound_and_near_it(dtype):
    eps = torch.finfo(dtype).eps
    for name in ("gaussian", "spike"):
        weights = [bad_weight(name, shape, dtype).to(DEVICE) for shape in SHAPES]
        for result, scale in zip(
            F.polar_factor(weights, SCALES, backend="triton"), SCALES, strict=True
        ):
            assert result.dtype == dtype and largest(result) <= scale, name
    orthogonal = [torch.nn.init.orthogonal_(torch.empty(s)).to(dtype).to(DEVICE) for s in SHAPES]
    results = F.polar_factor(orthogonal, SCALES, backend="triton")
    for result, scale in zip(results, SCALES, strict=True):
        assert scale * (1 - 2 * eps) <= largest(result) <= scale


# A tall one is the transpose of a wide one, and a row has no condition: see what they add.
@pytest.mark.parametrize(
    ("shape", "condition"),
    [
        *((shape, condition) for shape in ((5, 5), (13, 17)) for condition in GRADIENT),
        *(((9, 4), condition) for condition in (10, 1000)),
        ((1, 6), 1),
    ],
)
def test_gradient_by_condition(shape, condition):
    w = weight_of_condition(shape, condition).float().to(DEVICE).requires_grad_()
    gamma = torch.randn(shape)
    F.polar_factor(w, 2.0, backend="triton").backward(gamma.to(DEVICE))
    exact = reference.polar_factor(w.detach().double().cpu())
    expected = reference.polar_factor_vjp(2 * gamma.double(), *exact)
    difference = torch.linalg.norm(w.grad.double().cpu() - expected)
    assert difference <= GRADIENT[condition] * torch.linalg.norm(expected)


def test_gradient_of_several_blocks():
    w = weight_of_condition((66, 70), 30).float().to(DEVICE).requires_grad_()
    gamma = torch.randn(66, 70)
    F.polar_factor(w, backend="triton").backward(gamma.to(DEVICE))
    exact = reference.polar_factor(w.detach().double().cpu())
    expected = reference.polar_factor_vjp(gamma.double(), *exact)
    difference = torch.linalg.norm(w.grad.double().cpu() - expected)
    assert difference <= GRADIENT[10] * torch.linalg.norm(expected)


def test_gradients_of_any_magnitude():
    w = weight_of_condition((5, 9), 10).float().to(DEVICE)
    gamma = torch.randn(5, 9).to(DEVICE)

    def gradient(weight, grad):
        leaf = weight.clone().requires_grad_()
        F.polar_factor(leaf, backend="triton").backward(grad)
        return leaf.grad

    expected = gradient(w, gamma)
    for power in (2.0**-60, 2.0**60):
        assert torch.equal(gradient(w, gamma * power), expected * power)
        assert torch.equal(gradient(w * power, gamma), expected / power)
    assert gradient(w * 1e-38, gamma).isfinite().all()
    assert not gradient(w, torch.zeros_like(gamma)).any()
    gamma[1, 2] = torch.nan
    assert gradient(w, gamma).isnan().all()


def test_a_list_is_bitwise_its_members_and_runs_are_equal():
    shapes = [(8, 27), (16, 72), (40, 24), (20, 20)]
    weights = [weight_of_condition(s, 30, i).float().to(DEVICE) for i, s in enumerate(shapes)]
    weights.append(weight_of_condition((2, 4, 4), 30).float().mT.to(DEVICE))

    def run(members):
        leaves = [w.clone().requires_grad_() for w in members]
        results = F.polar_factor(leaves, backend="triton")
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
        return [*results, *(w.grad for w in leaves)]

    together, again = run(weights), run(weights)
    alone = [run([w]) for w in weights]
    for i, (a, b) in enumerate(zip(together, again, strict=True)):
        k, half = i % len(weights), i // len(weights)
        assert torch.equal(a, b) and torch.equal(a, alone[k][half])


def test_saved_square_factor_is_symmetric_to_the_bit():
    w = weight_of_condition((70, 70), 10).float().to(DEVICE)
    _, (factor,), (spectrum,), (scalars,) = polar.polar_factors([w], [1.0])
    assert torch.equal(factor, factor.mT)
    values = torch.linalg.svdvals(w.double().cpu()) / scalars[0].item()
    assert -spectrum[0] >= values[0] >= -spectrum[0] / 1.5
    assert values[-1] / 70**0.25 <= spectrum[1] <= values[-1]


def test_launches_of_a_net(monkeypatch, capsys):
    launches = []
    kind = type(polar.gram)
    run = kind.run

    def counted(self, *args, **kwargs):
        launches.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    weights = [weight_of_condition(s, 5, i).float().to(DEVICE) for i, s in enumerate(NET)]
    leaves = [w.requires_grad_() for w in weights]
    results = F.polar_factor(leaves, backend="triton")
    forward = len(launches)
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    with capsys.disabled():
        print(f" {len(NET)} weights: {forward} launches forward, {len(launches) - forward} back ")
    assert forward == 7 + 4 * (schedule.STEPS - 1) + 4
    assert len(launches) - forward == 8 + polar_backward.INVERSE + 2 * polar_backward.SMITH
    assert len(launches) <= LAUNCHES
    for w, result in zip(weights, results, strict=True):
        torch.testing.assert_close(
            result.double().cpu(), oracle(w.detach()), rtol=0, atol=VALUES[10]
        )
