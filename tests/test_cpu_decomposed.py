"""Polar factors of large ill-conditioned weights: eigenvectors in float32, and what follows."""

import math

import pytest
import torch
from cpu_kernels import assert_same_bits, generator, instruction_set
from operator_norm import assert_within

from lipkernels import functional as F
from lipkernels.kernels.cpu import decomposed
from lipkernels.kernels.cpu import library as cpu

pytestmark = pytest.mark.skipif(not cpu.is_built(), reason="no C++ library here")

M = 150
F64 = torch.float64


def geometric(condition):
    return torch.logspace(0, -math.log10(condition), M, dtype=F64)


def with_small(n_small, size):
    values = torch.linspace(0.5, 1, M, dtype=F64)
    values[:n_small] = size * torch.linspace(1, 2, n_small, dtype=F64)
    return values


_I = torch.arange(M, dtype=F64)
SPECTRA = {
    "condition 5": geometric(5),
    "condition 100": geometric(100),
    "condition 1e4": geometric(1e4),
    "condition 5e5": geometric(5e5),
    "even": (_I + 1) / M,
    "one small": with_small(1, 1e-3),
    "one tiny": with_small(1, 5e-6),
    "many tiny": with_small(60, 1e-5),
    "one large": 0.01 + 0.99 * (_I == 7),
    "a gap": torch.where(_I < 70, 1e-4 * (1 + _I / 70), 1 + _I / M),
    "equal ones": torch.tensor([1e-4, 0.0625, 0.25, 1.0], dtype=F64)[(_I % 4).long()],
    # Crowded where one treatment ends and the next one begins.
    **{
        f"around {part}": torch.where(_I < 100, part + 1e-3 * torch.sin(_I), 1.0)
        * (1 - 0.999 * (_I == 3))
        for part in (0.1, 0.125, 0.15, 0.25, 0.4)
    },
}
SHAPES = [(M, M), (M, 400), (400, M)]


def factors(shape, seed=0):
    noise = torch.randn(shape[0], M, generator=generator(seed), dtype=F64)
    other = torch.randn(shape[1], M, generator=generator(seed + 1), dtype=F64)
    return torch.linalg.qr(noise)[0], torch.linalg.qr(other)[0]


def exact(w, grad):
    """U and the gradient of <grad, U>, from the singular value decomposition in float64."""
    left, p, right = torch.linalg.svd(w.double(), full_matrices=False)
    inner = left.mT @ grad.double() @ right.mT
    skew = (inner - inner.mT) / (p[:, None] + p)
    out = left @ skew @ right
    if w.shape[0] > w.shape[1]:
        rest = grad.double() - left @ (left.mT @ grad.double())
        out = out + (rest @ right.mT / p) @ right
    elif w.shape[0] < w.shape[1]:
        rest = grad.double() - (grad.double() @ right.mT) @ right
        out = out + left @ (left.mT @ rest / p[:, None])
    return left @ right, out


def result_and_gradient(w, grad, scale=1.0):
    leaf = w.clone().requires_grad_()
    u = F.polar_factor(leaf, scale, backend="cpu")
    return u.detach(), torch.autograd.grad(u, leaf, grad)[0]


@pytest.fixture
def only_refined(monkeypatch):
    """Whatever the library says of a weight."""

    def instead(x, _in_float64, scale, margin, into):
        for i in range(len(x)):
            assert decomposed._refined(x[i], scale, margin, [t[i : i + 1] for t in into])

    monkeypatch.setattr(decomposed, "_directly", instead)


@pytest.fixture
def asked(monkeypatch):
    """What float32's eigenvectors were tried for, and whether they did."""
    outcomes = []

    def recorded(*arguments, refined=decomposed._refined):
        outcomes.append(refined(*arguments))
        return outcomes[-1]

    monkeypatch.setattr(decomposed, "_refined", recorded)
    return outcomes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_values_and_gradients(name, shape, only_refined):
    left, right = factors(shape)
    w = ((left * SPECTRA[name]) @ right.mT).float()
    grad = torch.randn(shape, generator=generator(9))
    u, gradient = result_and_gradient(w, grad)
    expected, expected_gradient = exact(w, grad)
    assert_within(u, 1.0)
    assert torch.linalg.matrix_norm(u - expected, 2) <= 4e-6  # 2e-6
    error = torch.dist(gradient.double(), expected_gradient) / expected_gradient.norm()
    assert error <= (1e-5 if name.startswith("around") else 4e-6)  # 5.3e-6, 1.6e-6


@pytest.mark.parametrize("number", range(len(cpu.INSTRUCTION_SETS)))
def test_every_instruction_set(number, only_refined):
    with instruction_set(number) as is_there:
        if not is_there:
            pytest.skip(f"no {cpu.INSTRUCTION_SETS[number]} here")
        w = torch.randn(300, 300, generator=generator())
        grad = torch.randn(300, 300, generator=generator(1))
        u, gradient = result_and_gradient(w, grad)
    expected, expected_gradient = exact(w, grad)
    assert_within(u, 1.0)
    assert torch.linalg.matrix_norm(u - expected, 2) <= 5e-6
    assert torch.dist(gradient.double(), expected_gradient) <= 5e-6 * expected_gradient.norm()


@pytest.mark.parametrize("size", [1e-11, 1e-5, 1e5, 1e11])
def test_every_size(size, only_refined):
    w = torch.randn(140, 140, generator=generator())
    grad = torch.randn(140, 140, generator=generator(1))
    u, gradient = result_and_gradient(size * w, grad, 0.3)
    expected, expected_gradient = exact(size * w, grad)
    assert_within(u, 0.3)
    assert torch.linalg.matrix_norm(u - 0.3 * expected, 2) <= 2e-6
    error = torch.dist(gradient.double(), 0.3 * expected_gradient)
    assert error <= 5e-6 * 0.3 * expected_gradient.norm()


UNFIT = {
    "condition 1e8": with_small(1, 1e-8),
    "rank 149": with_small(1, 0.0),
    "rank 90": with_small(60, 0.0),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_float32_cannot_tell_is_left_to_float64(name, asked, monkeypatch):
    left, right = factors((M, 200))
    w = ((left * UNFIT[name]) @ right.mT).float()
    grad = torch.randn(w.shape, generator=generator(9))
    found = result_and_gradient(w, grad)
    assert asked == [False]
    assert_within(found[0], 1.0)
    monkeypatch.setattr(decomposed, "_refined", lambda *_: False)
    assert_same_bits(found, result_and_gradient(w, grad))


def test_where_it_pays(asked):
    def tried(w):
        asked.clear()
        F.polar_factor(w.float(), backend="cpu")
        return asked == [True]

    square, wide = torch.randn(300, 300, generator=generator()), factors((M, 700))
    assert tried(square)
    assert not tried(square[:100, :100])
    assert not tried(factors((M, M))[0] * geometric(1e4) @ factors((M, M))[1].mT)
    assert tried(wide[0] * with_small(1, 1e-3) @ wide[1].mT[:, :600])
    assert not tried(wide[0] * with_small(1, 1e-3) @ wide[1].mT)


def test_a_batch_is_its_matrices():
    weights = torch.randn(4, 130, 130, generator=generator())
    weights[1] = torch.nn.init.orthogonal_(torch.empty(130, 130), generator=generator())
    weights[2, 5] = weights[2, 6]  # for float64
    grads = torch.randn(weights.shape, generator=generator(1))
    batch = result_and_gradient(weights, grads)
    for i in range(4):
        assert_within(batch[0][i], 1.0)
        assert_same_bits([x[i] for x in batch], result_and_gradient(weights[i], grads[i]))
