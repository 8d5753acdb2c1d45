"""GroupSort in Triton beyond pairs, which test_kernels_sorting.py has: the reference bit by bit."""

import cases
import pytest
import torch
from cases import FLOATS, INTEGERS, by_dtype
from kernel_data import bits, ties

pytest.importorskip("triton")

from lipkernels import backends
from lipkernels import functional as F
from lipkernels.kernels.triton import sorting as kernels
from lipkernels.reference import sorting as reference

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]


# (shape, group_size, dim): more than one program, sizes that end within one, both sorts.
SHAPES = [
    ((12, 7), 4, 0),
    ((2, 12, 15, 17), 3, 1),
    ((1, 64, 8, 8), 32, 1),
    ((3, 66), 33, 1),
    ((2, 100, 3), 50, 1),
    ((2, 300), 150, 1),
]


# bfloat16: each of the sorts once more; test_every_format has all others.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in SHAPES),
        *((case, torch.bfloat16) for case in (SHAPES[1], SHAPES[4])),
    ],
    ids=str,
)
def test_sort_and_permutation_are_the_reference_bit_by_bit(case, dtype):
    shape, size, dim = case
    x = ties(shape, dtype).to(DEVICE)
    expected, index = reference.group_sort(x, size, dim)
    got, saved = kernels.group_sort(x, size, dim)
    assert torch.equal(bits(got), bits(expected))
    assert saved.dtype == index.dtype and torch.equal(saved, index)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    for name in ("gather_groups", "scatter_groups"):
        moved = getattr(kernels, name)(grad, saved, size, dim)
        assert torch.equal(moved, getattr(reference, name)(grad, index, size, dim))


@by_dtype((*FLOATS, *INTEGERS, torch.bool))
def test_every_format(dtype):
    for size, shape in ((3, (3, 120, 2)), (40, (1, 80, 2))):
        x = ties(shape, dtype, seed=size).to(DEVICE)
        y = F.group_sort(x, size, backend="triton")
        assert y.dtype == dtype
        assert torch.equal(bits(y), bits(reference.group_sort(x, size, 1)[0]))


@by_dtype((torch.int32, torch.int64, torch.uint8))
def test_the_ends_of_an_integer_format(dtype):
    info = torch.iinfo(dtype)
    x = torch.tensor([info.max, info.min, 0, info.max, 1, info.min], dtype=dtype, device=DEVICE)
    for copies, size in ((1, 3), (10, 60)):
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
        x = ties((3, 80, 2), torch.float32).to(DEVICE)
        expected, index = reference.group_sort(x, size, 1)
        got, saved = kernels.group_sort(x, size, 1)
        assert torch.equal(bits(got), bits(expected))
        assert torch.equal(
            kernels.scatter_groups(x.nan_to_num(), saved, size, 1),
            reference.scatter_groups(x.nan_to_num(), index, size, 1),
        )
