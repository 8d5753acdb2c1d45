"""GroupSort of pairs by the kernels for GPUs: the reference bit by bit, and what they save."""

import math

import pytest
import torch
from cases import FLOATS, INTEGERS, by_dtype, device_of, is_interpreted, on_gpu_backends
from kernel_data import bits, ties

from lipkernels import functional as F
from lipkernels.kernels import sorting as ops
from lipkernels.reference import sorting as reference

on_kernels = on_gpu_backends("group_sort")


def unpacked(swaps, n):
    """One boolean for each of n pairs."""
    return ((swaps[:, None] >> torch.arange(8, device=swaps.device)) & 1).flatten()[:n].bool()


# (shape, dim): more than one block, rows of words and of elements, ends within a word, a byte.
SHAPES = [
    ((3, 6), 1),
    ((1, 2), 1),
    ((5, 1402), 1),
    ((2, 4, 9, 31), 1),
    ((2, 6, 16, 48), 1),
    ((12, 7), 0),
    ((2, 12, 4, 4), 1),
    ((3, 2, 8), 1),
    ((1, 6, 1024), 1),
    ((10, 4), 0),
]


@on_kernels
@pytest.mark.parametrize("case", SHAPES, ids=str)
@by_dtype((*FLOATS, torch.uint8))
def test_sort_and_permutation_are_the_reference_bit_by_bit(case, dtype, backend):
    if is_interpreted(backend) and dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("test_every_format has the other formats")
    shape, dim = case
    x = ties(shape, dtype).to(device_of(backend))
    expected, index = reference.group_sort(x, 2, dim)
    got, saved = ops.FORWARD[backend](x, 2, dim)
    assert torch.equal(bits(got), bits(expected))
    first = index.unflatten(dim, (-1, 2)).select(dim + 1, 0).flatten()
    assert saved.dtype == torch.uint8 and saved.shape == (math.ceil(x.numel() / 16),)
    assert torch.equal(unpacked(saved, first.numel()), first.bool())
    grad = torch.arange(x.numel(), device=x.device).view(shape).to(dtype)
    for move, exact in (
        (ops.GATHER, reference.gather_groups),
        (ops.SCATTER, reference.scatter_groups),
    ):
        moved = move[backend](grad, saved, 2, dim)
        assert torch.equal(bits(moved), bits(exact(grad, index, 2, dim)))


@on_kernels
@by_dtype((*FLOATS, *INTEGERS, torch.bool))
def test_every_format(dtype, backend):
    for shape in ((3, 20, 2), (3, 20, 16), (7, 16), (2, 6)):
        x = ties(shape, dtype, seed=len(shape)).to(device_of(backend))
        y = F.group_sort(x, 2, backend=backend)
        assert y.dtype == dtype
        assert torch.equal(bits(y), bits(reference.group_sort(x, 2, 1)[0]))


@on_kernels
@by_dtype(INTEGERS)
def test_the_ends_of_an_integer_format(dtype, backend):
    info = torch.iinfo(dtype)
    x = torch.tensor([info.max, info.min, 0, info.max, 1, info.min], dtype=dtype)
    x = x.to(device_of(backend))
    for view in (x[None], x[:, None].expand(6, 16).contiguous()[None]):
        expected = reference.group_sort(view, 2, 1)[0]
        assert torch.equal(F.group_sort(view, 2, backend=backend), expected)


@on_kernels
def test_layouts_and_addresses(backend):
    x = ties((2, 6, 5, 8), torch.float32).to(device_of(backend))
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.mT,
        x[..., ::2],
        x[:1].expand(3, 6, 5, 8),
        x.flatten()[1:-1][:192].view(2, 6, 2, 8),
    ):
        got = F.group_sort(view, 2, backend=backend)
        assert got.is_contiguous()
        assert torch.equal(bits(got), bits(reference.group_sort(view, 2, 1)[0]))


@on_kernels
@pytest.mark.parametrize("shape", [(16, 64), (3, 4, 5, 5), (1, 2), (1, 18)], ids=str)
def test_one_bit_is_saved_for_each_pair(shape, backend):
    x = torch.randn(shape, device=device_of(backend), requires_grad=True)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.group_sort(x, 2, backend=backend)
    assert sum(t.untyped_storage().nbytes() for t in saved) == math.ceil(x.numel() / 16)


@on_kernels
def test_gradients_of_any_order(backend):
    for shape, size, dim in (((3, 8), 2, 1), ((2, 4, 3), 2, 1), ((2, 6, 2), 3, 1)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device_of(backend))
        x.requires_grad_()

        def cubed(t, size=size, dim=dim):
            return F.group_sort(t**3, size, dim, backend=backend)

        assert torch.autograd.gradcheck(cubed, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(cubed, x, fast_mode=True)


@on_kernels
def test_op_and_its_fake_agree(backend):
    x = torch.randn(2, 6, 5, device=device_of(backend), requires_grad=True)
    for size in (2, 3):
        torch.library.opcheck(ops.group_sort_op, (x, size, 1, backend))
        index = ops.group_sort_op(x.detach(), size, 1, backend)[1]
        torch.library.opcheck(ops.gather_groups, (x, index, size, 1, backend))
        torch.library.opcheck(ops.scatter_groups, (x, index, size, 1, backend))
    values, index = ops.group_sort_op(torch.empty(0, 6, device=x.device), 2, 1, backend)
    assert values.shape == (0, 6) and index.shape == (0,)


@on_kernels
def test_compiled(backend):
    def function(x):
        return F.group_sort(F.group_sort(x, 2, backend=backend) * 2, 4, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (3, 5):
        x = torch.randn(n, 8, 2, device=device_of(backend), requires_grad=True)
        y, expected = compiled(x), function(x)
        assert torch.equal(y, expected)
        weights = torch.arange(y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
        (got,) = torch.autograd.grad(y, x, weights)
        assert torch.equal(got, torch.autograd.grad(expected, x, weights)[0])
