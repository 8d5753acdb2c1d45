"""GroupSort of pairs in CUDA: the reference bit by bit, ties and NaN included; what it saves."""

import math

import pytest
import torch
from cases import FLOATS, INTEGERS, by_dtype
from cuda_kernels import DEVICE, MARKS, in_every_order

from lipkernels import functional as F
from lipkernels.kernels import sorting as ops
from lipkernels.kernels.cuda import sorting as kernels
from lipkernels.reference import sorting as reference

pytestmark = MARKS
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x):
    return x.view(BITS[x.itemsize])


def values(shape, dtype, seed=0):
    """Few different values, so that many pairs are ties; NaN of both signs, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, shape, generator=generator)
    if dtype == torch.bool or dtype == torch.uint8:
        return x.abs().to(dtype).to(DEVICE)
    x = x.to(dtype)
    if dtype.is_floating_point:
        where = torch.randint(0, 12, shape, generator=generator)
        for i, special in enumerate((-0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-7)):
            x[where == i] = special
    return x.to(DEVICE)


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


@pytest.mark.parametrize("case", SHAPES, ids=str)
@by_dtype((*FLOATS, torch.uint8))
def test_sort_and_permutation_are_the_reference_bit_by_bit(case, dtype):
    shape, dim = case
    x = values(shape, dtype)
    expected, index = reference.group_sort(x, 2, dim)
    got, saved = kernels.group_sort(x, 2, dim)
    assert torch.equal(bits(got), bits(expected))
    first = index.unflatten(dim, (-1, 2)).select(dim + 1, 0).flatten()
    assert saved.dtype == torch.uint8 and saved.shape == (math.ceil(x.numel() / 16),)
    assert torch.equal(unpacked(saved, first.numel()), first.bool())
    grad = torch.arange(x.numel(), device=DEVICE).view(shape).to(dtype)
    for name in ("gather_groups", "scatter_groups"):
        moved = getattr(kernels, name)(grad, saved, 2, dim)
        assert torch.equal(bits(moved), bits(getattr(reference, name)(grad, index, 2, dim)))


@by_dtype((*FLOATS, *INTEGERS, torch.bool))
def test_every_format(dtype):
    for shape in ((3, 20, 2), (3, 20, 16), (7, 16), (2, 6)):
        x = values(shape, dtype, seed=len(shape))
        y = F.group_sort(x, 2, backend="cuda")
        assert y.dtype == dtype
        assert torch.equal(bits(y), bits(reference.group_sort(x, 2, 1)[0]))


@by_dtype((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
def test_the_ends_of_an_integer_format(dtype):
    info = torch.iinfo(dtype)
    x = torch.tensor([info.max, info.min, 0, info.max, 1, info.min], dtype=dtype, device=DEVICE)
    for view in (x[None], x[:, None].expand(6, 16).contiguous()[None]):
        expected = reference.group_sort(view, 2, 1)[0]
        assert torch.equal(F.group_sort(view, 2, backend="cuda"), expected)


def test_layouts_and_addresses():
    x = values((2, 6, 5, 8), torch.float32)
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.mT,
        x[..., ::2],
        x[:1].expand(3, 6, 5, 8),
        x.flatten()[1:-1][:192].view(2, 6, 2, 8),
    ):
        got = F.group_sort(view, 2, backend="cuda")
        assert got.is_contiguous()
        assert torch.equal(bits(got), bits(reference.group_sort(view, 2, 1)[0]))


def test_other_groups_are_sorted_by_others():
    for shape, size, dim in (((2, 12, 3), 3, 1), ((4, 40), 40, 1), ((6, 2), 1, 0)):
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        y = F.group_sort(x, size, dim, backend="cuda")
        assert torch.equal(y, reference.group_sort(x.detach(), size, dim)[0])
        (got,) = torch.autograd.grad(y, x, y.detach())
        assert torch.equal(got, x.detach())


@pytest.mark.parametrize("shape", [(16, 64), (3, 4, 5, 5), (1, 2), (1, 18)], ids=str)
def test_one_bit_is_saved_for_each_pair(shape):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.group_sort(x, 2, backend="cuda")
    assert sum(t.untyped_storage().nbytes() for t in saved) == math.ceil(x.numel() / 16)


def test_gradients_of_any_order():
    for shape, dim in (((3, 8), 1), ((2, 4, 3), 1), ((2, 4, 4), 2)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
        x.requires_grad_()

        def cubed(t, dim=dim):
            return F.group_sort(t**3, 2, dim, backend="cuda")

        assert torch.autograd.gradcheck(cubed, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(cubed, x, fast_mode=True)


def test_the_same_in_every_order_of_threads():
    for shape in ((3, 70, 9), (3, 70, 8), (5, 74)):
        x = values(shape, torch.bfloat16)
        expected, index = reference.group_sort(x, 2, 1)
        results = in_every_order(lambda x=x: kernels.group_sort(x, 2, 1))
        for got, saved in results:
            assert torch.equal(bits(got), bits(expected))
            assert torch.equal(saved, results[0][1])
        for back in in_every_order(lambda x=x, s=results[0][1]: kernels.scatter_groups(x, s, 2, 1)):
            assert torch.equal(bits(back), bits(reference.scatter_groups(x, index, 2, 1)))


def test_op_and_its_fake_agree():
    x = torch.randn(2, 6, 5, device=DEVICE, requires_grad=True)
    for size in (2, 3):
        torch.library.opcheck(ops.group_sort_op, (x, size, 1, "cuda"))
        index = ops.group_sort_op(x.detach(), size, 1, "cuda")[1]
        torch.library.opcheck(ops.gather_groups, (x, index, size, 1, "cuda"))
        torch.library.opcheck(ops.scatter_groups, (x, index, size, 1, "cuda"))
    values, index = ops.group_sort_op(torch.empty(0, 6, device=DEVICE), 2, 1, "cuda")
    assert values.shape == (0, 6) and index.shape == (0,)


def test_compiled():
    def function(x):
        return F.group_sort(F.group_sort(x, 2, backend="cuda") * 2, 4, backend="cuda")

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (3, 5):
        x = torch.randn(n, 8, 2, device=DEVICE, requires_grad=True)
        y, expected = compiled(x), function(x)
        assert torch.equal(y, expected)
        weights = torch.arange(y.numel(), dtype=y.dtype, device=DEVICE).view(y.shape)
        (got,) = torch.autograd.grad(y, x, weights)
        assert torch.equal(got, torch.autograd.grad(expected, x, weights)[0])


def test_a_format_without_an_order_is_refused():
    with pytest.raises(TypeError, match=r"input: expected one of .*float32.*got torch.complex64"):
        kernels.group_sort(torch.zeros(1, 2, dtype=torch.complex64, device=DEVICE), 2, 1)
