"""GroupSort in Triton: the reference bit by bit, ties and NaN included, and what it saves."""

import math

import cases
import pytest
import torch
from cases import FLOATS, INTEGERS, by_dtype

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels import sorting as ops
from lipkernels.kernels.triton import sorting as kernels
from lipkernels.reference import sorting as reference

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def values(shape, dtype, seed=0):
    """Few different values, so that most groups have ties; NaN of both signs, both zeros."""
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


# (shape, group_size, dim): more than one program, sizes that end within one, all three sorts.
SHAPES = [
    ((3, 6), 2, 1),
    ((5, 1402), 2, 1),
    ((2, 4, 9, 31), 2, 1),
    ((2, 6, 16, 48), 2, 1),
    ((12, 7), 4, 0),
    ((2, 12, 15, 17), 3, 1),
    ((1, 64, 8, 8), 32, 1),
    ((3, 66), 33, 1),
    ((2, 100, 3), 50, 1),
    ((2, 300), 150, 1),
]


# bfloat16: each of the three sorts once more; test_every_format has all others.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in SHAPES),
        *((case, torch.bfloat16) for case in (SHAPES[1], SHAPES[5], SHAPES[8])),
    ],
    ids=str,
)
def test_sort_and_permutation_are_the_reference_bit_by_bit(case, dtype):
    shape, size, dim = case
    x = values(shape, dtype)
    expected, index = reference.group_sort(x, size, dim)
    got, saved = kernels.group_sort(x, size, dim)
    assert torch.equal(bits(got), bits(expected))
    if size == 2:
        first = index.unflatten(dim, (-1, 2)).select(dim + 1, 0).flatten()
        assert torch.equal(unpacked(saved, first.numel()), first.bool())
    else:
        assert saved.dtype == index.dtype and torch.equal(saved, index)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    for name in ("gather_groups", "scatter_groups"):
        moved = getattr(kernels, name)(grad, saved, size, dim)
        assert torch.equal(moved, getattr(reference, name)(grad, index, size, dim))


@by_dtype((*FLOATS, *INTEGERS, torch.bool))
def test_every_format(dtype):
    for size, shape in ((2, (3, 120, 2)), (3, (3, 120, 2)), (40, (1, 80, 2))):
        x = values(shape, dtype, seed=size)
        y = F.group_sort(x, size, backend="triton")
        assert y.dtype == dtype
        assert torch.equal(bits(y), bits(reference.group_sort(x, size, 1)[0]))


@by_dtype((torch.int32, torch.int64, torch.uint8))
def test_the_ends_of_an_integer_format(dtype):
    info = torch.iinfo(dtype)
    x = torch.tensor([info.max, info.min, 0, info.max, 1, info.min], dtype=dtype, device=DEVICE)
    for copies, size in ((1, 2), (1, 3), (10, 60)):
        many = x.repeat(copies)[None]
        assert torch.equal(
            F.group_sort(many, size, backend="triton"), reference.group_sort(many, size, 1)[0]
        )


def test_groups_beyond_the_kernels():
    for shape, size, dtype in (((2, 1030), 1030, torch.float32), ((2, 66), 33, torch.float64)):
        x = torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)
        y = F.group_sort(x, size, backend="triton")
        assert torch.equal(y, F.group_sort(x, size, backend="reference"))
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
        F.group_sort(x, 2, backend="triton")
    assert sum(t.untyped_storage().nbytes() for t in saved) == math.ceil(x.numel() / 16)


def test_gradients_of_any_order():
    for shape, size, dim in (((3, 8), 2, 1), ((2, 4, 3), 2, 1), ((2, 6, 2), 3, 1)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
        x.requires_grad_()

        def cubed(t, size=size, dim=dim):
            return F.group_sort(t**3, size, dim, backend="triton")

        assert torch.autograd.gradcheck(cubed, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(cubed, x, fast_mode=True)


def test_op_and_its_fake_agree():
    x = torch.randn(2, 6, 5, device=DEVICE, requires_grad=True)
    for size in (2, 3):
        torch.library.opcheck(ops.group_sort_op, (x, size, 1, "triton"))
        index = ops.group_sort_op(x.detach(), size, 1, "triton")[1]
        torch.library.opcheck(ops.gather_groups, (x, index, size, 1, "triton"))
        torch.library.opcheck(ops.scatter_groups, (x, index, size, 1, "triton"))
    empty = torch.empty(0, 6, device=DEVICE)
    values, index = ops.group_sort_op(empty, 2, 1, "triton")
    assert values.shape == (0, 6) and index.shape == (0,)


def test_compiled():
    def function(x):
        return F.group_sort(F.group_sort(x, 2, backend="triton") * 2, 4, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (3, 5):
        x = torch.randn(n, 8, 2, device=DEVICE, requires_grad=True)
        y, expected = compiled(x), function(x)
        assert torch.equal(y, expected)
        weights = torch.arange(y.numel(), dtype=y.dtype, device=DEVICE).view(y.shape)
        (got,) = torch.autograd.grad(y, x, weights)
        assert torch.equal(got, torch.autograd.grad(expected, x, weights)[0])


def test_offsets_beyond_32_bits(monkeypatch):
    # The same kernels with 64-bit offsets, of images that have none.
    for name, first, beyond in (
        ("pair_settings", (2**29, 4, 4), (2**30, 4, 4)),
        ("element_settings", (2**30, 4, 4), (2**31, 4, 4)),
        ("column_settings", (2**20, 40), (2**30, 40)),
    ):
        settings = getattr(kernels, name)
        assert settings(*beyond)["LONG"] and not settings(*first)["LONG"]
        monkeypatch.setattr(kernels, name, lambda *a, s=settings: {**s(*a), "LONG": True})
    for size in (2, 4, 40):
        x = values((3, 80, 2), torch.float32)
        expected, index = reference.group_sort(x, size, 1)
        got, saved = kernels.group_sort(x, size, 1)
        assert torch.equal(bits(got), bits(expected))
        assert torch.equal(
            kernels.scatter_groups(x.nan_to_num(), saved, size, 1),
            reference.scatter_groups(x.nan_to_num(), index, size, 1),
        )
