"""GroupSort against Python's sorted, and MaxMin, HouseHolder, LPReLU against their formulas."""

import itertools
import math

import cases
import pytest
import torch
from cases import ANY_DTYPE, INTEGERS, by_dtype, on_backends

from lipkernels import functional as F


def slow_group_sort(x, group_size, dim):
    size = x.shape[dim] if group_size is None else group_size
    out = x.clone().movedim(dim, -1)
    for index in itertools.product(*(range(n) for n in out.shape[:-1])):
        row = out[index].tolist()
        groups = [sorted(row[i : i + size]) for i in range(0, len(row), size or 1)]
        out[index] = torch.tensor(list(itertools.chain(*groups)), dtype=x.dtype)
    return out.movedim(-1, dim)


@on_backends("group_sort")
def test_values(case, backend):
    x = case.input(torch.float32)
    y = case.call(x.to(cases.device_of(backend)), backend=backend)
    assert torch.equal(y.cpu(), slow_group_sort(x, **case.arguments))


@by_dtype(tuple(d for d in ANY_DTYPE if d.itemsize > 1 or d in INTEGERS))
def test_every_dtype(dtype):
    for case in cases.without_empty(cases.of("group_sort")):
        x = case.input(dtype)
        y = case.call(x)
        assert y.dtype == dtype and y.shape == x.shape
        assert torch.equal(y, slow_group_sort(x, **case.arguments))


def test_negative_and_positive_dim_agree():
    x = torch.randn(2, 4, 6, 8)
    for dim in range(4):
        assert torch.equal(F.group_sort(x, 2, dim), F.group_sort(x, 2, dim - 4))


def test_ties_send_each_gradient_to_one_element():
    x = torch.zeros(1, 6, requires_grad=True)
    y = F.group_sort(x, 3)
    y.backward(torch.arange(6.0)[None])
    assert torch.equal(x.grad, torch.arange(6.0)[None])  # stable: the order is kept


def test_the_permutation_takes_one_byte_an_element():
    x = torch.randn(16, 64, requires_grad=True)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.group_sort(x, 2)
    assert sum(t.untyped_storage().nbytes() for t in saved) == x.numel()


def test_gradients():
    for case in cases.without_empty(cases.of("group_sort")):
        if case.layout != "contiguous" or math.prod(case.shape) > 100:
            continue
        x = case.input(torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(case.call, x)

        def cubed(t, case=case):
            return case.call(t**3)

        assert torch.autograd.gradgradcheck(cubed, x)


def test_gradient_of_wide_groups():
    x = torch.randn(2, 600, dtype=torch.float64, requires_grad=True)
    order = x.detach().unflatten(1, (2, 300)).argsort(2)
    grad = torch.randn(2, 600).double()
    F.group_sort(x, 300).backward(grad)
    expected = torch.zeros(2, 2, 300).double().scatter(2, order, grad.unflatten(1, (2, 300)))
    assert torch.equal(x.grad, expected.flatten(1))


# --------------------------------------------------------------------------- other activations
def test_max_min():
    x = torch.tensor([[1.5, -2.0, 0.0]])
    assert torch.equal(F.max_min(x), torch.tensor([[1.5, 0.0, 0.0, 0.0, 2.0, 0.0]]))
    x = torch.randn(2, 3, 4, 5)
    for dim in (1, 3, -2):
        low, high = F.max_min(x, dim).chunk(2, dim)
        assert torch.equal(low, x.clamp_min(0)) and torch.equal(high, (-x).clamp_min(0))


def slow_householder(a, b, theta):
    if a * math.sin(theta / 2) - b * math.cos(theta / 2) <= 0:
        return a, b
    c, s = math.cos(theta), math.sin(theta)
    return c * a + s * b, s * a - c * b


@pytest.mark.parametrize("dim", [1, -1, 2])
def test_householder(dim):
    x = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    theta = torch.tensor([0.3, 1.5707, 4.0]).double()
    y = F.householder(x, theta, dim)
    a, b = x.movedim(dim, -1).chunk(2, -1)
    got_a, got_b = y.movedim(dim, -1).chunk(2, -1)
    for index in itertools.product(range(3), range(6), range(3)):
        expected = slow_householder(a[index].item(), b[index].item(), theta[index[-1]].item())
        assert got_a[index].item() == pytest.approx(expected[0], abs=1e-14)
        assert got_b[index].item() == pytest.approx(expected[1], abs=1e-14)
    assert torch.autograd.gradcheck(
        lambda t, angle: F.householder(t, angle, dim),
        (x.requires_grad_(), theta.requires_grad_()),
    )


def test_householder_at_a_right_angle_sorts_pairs():
    x = torch.randn(5, 8).double()
    y = F.householder(x, torch.full((4,), math.pi / 2, dtype=torch.float64))
    pairs = torch.stack(x.chunk(2, 1)).sort(0)[0]
    torch.testing.assert_close(y, torch.cat((pairs[0], pairs[1]), 1), rtol=0, atol=1e-14)


@by_dtype((torch.float16, torch.bfloat16))
def test_householder_in_half_precision_rounds_its_result_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator).to(dtype)
    theta = (6 * torch.rand(32, generator=generator)).to(dtype)
    y = F.householder(x, theta)
    assert y.dtype == dtype
    exact = F.householder(x.double(), theta.double())
    pair = torch.hypot(*x.double().chunk(2, 1)).repeat(1, 2)
    assert ((y.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * pair).all()


def test_lprelu():
    x = torch.tensor([[-2.0, 3.0, -4.0]])
    assert torch.equal(F.lprelu(x, torch.tensor([0.5])), torch.tensor([[-1.0, 3.0, -2.0]]))
    slopes = torch.tensor([7.0, 0.5, -3.0])
    assert torch.equal(F.lprelu(x, slopes), torch.tensor([[-2.0, 3.0, 4.0]]))
    image = torch.randn(2, 3, 4, 5)
    y = F.lprelu(image, slopes)
    expected = torch.where(image >= 0, image, image * slopes.clamp(-1, 1)[:, None, None])
    assert torch.equal(y, expected)
