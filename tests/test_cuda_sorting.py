"""GroupSort in CUDA beyond test_kernels_sorting.py: other groups, and the order of threads."""

import pytest
import torch
from cuda_kernels import DEVICE, MARKS, in_every_order
from kernel_data import bits, ties

from lipkernels import functional as F
from lipkernels.kernels.cuda import sorting as kernels
from lipkernels.reference import sorting as reference

pytestmark = MARKS


def test_other_groups_are_sorted_by_others():
    for shape, size, dim in (((2, 12, 3), 3, 1), ((4, 40), 40, 1), ((6, 2), 1, 0)):
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        y = F.group_sort(x, size, dim, backend="cuda")
        assert torch.equal(y, reference.group_sort(x.detach(), size, dim)[0])
        (got,) = torch.autograd.grad(y, x, y.detach())
        assert torch.equal(got, x.detach())


def test_the_same_in_every_order_of_threads():
    for shape in ((3, 70, 9), (3, 70, 8), (5, 74)):
        x = ties(shape, torch.bfloat16).to(DEVICE)
        expected, index = reference.group_sort(x, 2, 1)
        results = in_every_order(lambda x=x: kernels.group_sort(x, 2, 1))
        for got, saved in results:
            assert torch.equal(bits(got), bits(expected))
            assert torch.equal(saved, results[0][1])
        for back in in_every_order(lambda x=x, s=results[0][1]: kernels.scatter_groups(x, s, 2, 1)):
            assert torch.equal(bits(back), bits(reference.scatter_groups(x, index, 2, 1)))


def test_a_format_without_an_order_is_refused():
    with pytest.raises(TypeError, match=r"input: expected one of .*float32.*got torch.complex64"):
        kernels.group_sort(torch.zeros(1, 2, dtype=torch.complex64, device=DEVICE), 2, 1)
