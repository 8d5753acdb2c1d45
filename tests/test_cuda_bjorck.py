"""The named Bjorck iteration in CUDA, against the reference in float64."""

import cases
import pytest
import torch
from bad_weights import BAD_WEIGHTS, bad_weight
from cuda_kernels import DEVICE, MARKS, in_every_order

from lipkernels import functional as F
from lipkernels.kernels.cuda import bjorck, library

pytestmark = MARKS

VALUES = 2e-6  # 9e-7
GRADIENT = 5e-6  # 9e-7
TRIPLET = 1e-10  # 1.4e-12
SETTINGS = [
    ((5, 8), 3, 0.0),
    ((9, 4), 9, 0.0),
    ((1, 7), 3, 0.0),
    ((7, 1), 2, 0.0),
    ((6, 6), 0, 0.0),
    ((5, 8), 9, 0.1),
    ((1, 5, 8), 9, 0.1),
    ((20, 33), 15, 1e-3),
    ((70, 64), 4, 0.0),
]


def forward(weights, scales, dtype=torch.float32, beta=0.4, n_iter=4, tol=0.0):
    """Results and saved triplets, on the CPU; without backward."""
    us = [torch.ones(w.shape[:-1]).to(DEVICE) for w in weights]
    device = [w.to(DEVICE) for w in weights]
    results, new_us, saved = bjorck.forward(device, us, scales, dtype, beta, n_iter, tol)
    for u, left in zip(new_us, saved[1::3], strict=True):
        assert torch.equal(u, left.float()) or left.isnan().any()
    return [r.cpu() for r in results], [t.cpu() for t in saved]


def backward(grads, weights, saved, scales, beta=0.4, n_iter=4, tol=0.0):
    lists = ([t.to(DEVICE) for t in tensors] for tensors in (grads, weights, saved))
    return [g.cpu() for g in bjorck.backward(*lists, scales, beta, n_iter, tol)]


def largest(x):
    return torch.linalg.svdvals(x.double()).amax()


@pytest.mark.parametrize(("shape", "n_iter", "tol"), SETTINGS)
def test_values_and_gradients(shape, n_iter, tol):
    w = cases.weight_of_condition(shape, 20).float()
    wide = w.double().requires_grad_()
    gamma = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    settings = {"beta": 0.4, "n_iter": n_iter, "tol": tol}
    exact, _ = F.bjorck(wide, 1.5, **settings, backend="reference")
    exact.backward(gamma.double())
    (x,), saved = forward([w], [1.5], **settings)
    assert largest(x) <= 1.5
    torch.testing.assert_close(x.double(), exact.detach(), rtol=0, atol=1.5 * VALUES)
    sigma, u, v = saved
    left, values, right = torch.linalg.svd(w.double(), full_matrices=False)
    assert (values[..., 0] <= sigma).all() and (sigma <= values[..., 0] * (1 + TRIPLET)).all()
    assert 1 - (u * left[..., 0]).sum().abs() <= TRIPLET
    assert 1 - (v * right[..., 0, :]).sum().abs() <= TRIPLET
    (gradient,) = backward([gamma], [w], saved, [1.5], **settings)
    difference = torch.linalg.norm(gradient.double() - wide.grad)
    assert difference <= GRADIENT * torch.linalg.norm(wide.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bad_weights_stay_within_the_bound(dtype):
    shapes = [(6, 9), (12, 5), (20, 20)]
    names = list(BAD_WEIGHTS)
    weights = [bad_weight(n, shapes[i % 3], torch.float32) for i, n in enumerate(names)]
    scales = [1.5, 0.7, 3.0] * len(weights)
    results, saved = forward(weights, scales[: len(weights)], dtype)
    grads = [torch.randn_like(r) for r in results]
    gradients = backward(grads, weights, saved, scales[: len(weights)])
    for name, x, g, w, scale in zip(names, results, gradients, weights, scales, strict=False):
        assert x.dtype == dtype and x.isfinite().all() and largest(x) <= scale, name
        assert g.dtype == w.dtype and g.isfinite().all(), name


def test_tied_singular_values():
    """Every power of the Gram matrix is one: the bound is m^(1 / 2^27) too large."""
    w = torch.linalg.qr(cases.weight_of_condition((64, 40), 1))[0].float()
    (x,), (sigma, _, _) = forward([w], [1.0])
    exact = largest(w)
    assert exact <= sigma <= exact * (1 + 1e-6) and largest(x) <= 1


def test_weights_and_gradients_that_are_not_finite_give_nan():
    w, good = torch.randn(5, 7), torch.randn(4, 4)
    for bad in (torch.nan, torch.inf):
        w[2, 3] = bad
        (x, other), saved = forward([w, good], [1.0, 1.0])
        assert x.isnan().all() and other.isfinite().all()
        assert all(t.isnan().all() for t in saved[:3])
        gradients = backward(
            [torch.randn(5, 7), torch.full((4, 4), bad)], [w, good], saved, [1.0] * 2
        )
        assert all(g.isnan().all() for g in gradients)


def test_gradients_of_any_magnitude():
    w = cases.weight_of_condition((5, 9), 10).float()
    gamma = torch.randn(5, 9)
    _, saved = forward([w], [1.0])
    (expected,) = backward([gamma], [w], saved, [1.0])
    for power in (2.0**-60, 2.0**60):
        (gradient,) = backward([gamma * power], [w], saved, [1.0])
        assert torch.equal(gradient, expected * power)
        _, other = forward([w * power], [1.0])
        (gradient,) = backward([gamma], [w * power], other, [1.0])
        assert torch.equal(gradient, expected / power)
    half = w.half()
    _, saved = forward([half], [1.0])
    (gradient,) = backward([gamma * 1e30], [half], saved, [1.0])
    assert gradient.isfinite().all() and gradient.abs().max() == torch.finfo(torch.float16).max


def test_many_steps_do_not_overflow():
    """Gamma grows by 1 + beta a step where singular values are small: planes are scaled for it."""
    w = torch.diag(torch.tensor([1.0, 1e-12, 1e-13]))
    wide = w.double().requires_grad_()
    F.bjorck(wide, n_iter=40, tol=0.0, beta=0.5, backend="reference")[0].sum().backward()
    settings = {"beta": 0.5, "n_iter": 40, "tol": 0.0}
    _, saved = forward([w], [1.0], **settings)
    (gradient,) = backward([torch.ones(3, 3)], [w], saved, [1.0], **settings)
    difference = torch.linalg.norm(gradient.double() - wide.grad)
    assert difference <= 1e-3 * torch.linalg.norm(wide.grad)


@pytest.mark.skipif(
    not library.is_simt(), reason="the order of threads is the SIMT shim's to choose"
)
def test_lists_and_any_order_of_threads_give_the_same_bits():
    shapes = [(5, 8), (40, 20), (12, 12), (3, 70)]
    weights = [cases.weight_of_condition(s, 10, i).float() for i, s in enumerate(shapes)]
    grads = [torch.randn(s) for s in shapes]

    def run():
        results, saved = forward(weights, [1.0] * 4)
        return [*results, *saved, *backward(grads, weights, saved, [1.0] * 4)]

    found = in_every_order(run)
    for tensors in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[0], strict=True))
    for i, w in enumerate(weights):
        (alone,), saved = forward([w], [1.0])
        assert torch.equal(alone, found[0][i])
        assert torch.equal(backward([grads[i]], [w], saved, [1.0])[0], found[0][-4 + i])


def test_more_weights_than_a_launch_has():
    w = cases.weight_of_condition((3, 4), 5).float()
    results, saved = forward([w] * 41, [1.0] * 41)
    assert all(torch.equal(r, results[0]) for r in results)
    gradients = backward([torch.ones(3, 4)] * 41, [w] * 41, saved, [1.0] * 41)
    assert all(torch.equal(g, gradients[0]) for g in gradients)


def test_what_fits():
    assert bjorck.fits(torch.empty(64, 900)) and bjorck.fits(torch.empty(1, 900, 64))
    assert not bjorck.fits(torch.empty(65, 66))
    assert not bjorck.fits(torch.empty(2, 4, 4))  # a batch stops together
    assert not bjorck.fits(torch.empty(8, 8, dtype=torch.float64))
