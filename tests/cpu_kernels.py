"""What the tests of the C++ library for the CPU share."""

import contextlib

import torch

from lipkernels import functional as F
from lipkernels.kernels.cpu import library as cpu

F32 = torch.float32


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def instruction_set(number):
    library = cpu.library()
    before = library.lk_instruction_set()
    library.lk_use_instruction_set(number)
    try:
        yield library.lk_instruction_set() == number
    finally:
        library.lk_use_instruction_set(before)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def near_orthogonal(*shape, seed=0, noise=0.02):
    """A weight of which the library computes every part itself."""
    w = torch.nn.init.orthogonal_(torch.empty(shape), generator=generator(seed))
    return w + noise / max(shape) ** 0.5 * torch.randn(shape, generator=generator(seed + 1))


def oracle(w):
    left, _, right = torch.linalg.svd(w.double(), full_matrices=False)
    return left @ right


def results_and_gradients(weights, backend="cpu"):
    leaves = [w.clone().requires_grad_() for w in weights]
    results = F.polar_factor(leaves, backend=backend)
    grads = [torch.randn(w.shape, generator=generator(9)).to(w.dtype) for w in weights]
    return [r.detach() for r in results], torch.autograd.grad(results, leaves, grads)


def everything(weights):
    """All that the library computes of them."""
    results, gradients = results_and_gradients(weights)
    return [
        *results,
        *gradients,
        *F.retract([w / 1.01 for w in weights], backend="cpu"),
        *F.project_tangent(list(gradients), results, backend="cpu"),
        *(F.group_sort(w, 2, dim=-1, backend="cpu") for w in weights if w.shape[-1] % 2 == 0),
    ]


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()
