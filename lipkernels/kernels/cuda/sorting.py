"""GroupSort of pairs by csrc/cuda/sorting.cu: values and one saved bit a pair, and its gradient.

Groups of other sizes are not for these kernels: see :mod:`lipkernels.kernels.sorting`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipkernels.kernels.cuda.library import INT, INT64, POINTER, declared
from lipkernels.kernels.cuda.sampling import contiguous

# The numbers that lk_sort_pairs knows them by.
_FORMATS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.uint8: 4,
    torch.bool: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}

_sort_pairs = declared("lk_sort_pairs", POINTER, POINTER, POINTER, INT64, INT64, INT)
_swap_pairs = declared("lk_swap_pairs", POINTER, POINTER, POINTER, INT64, INT64, INT)


def _sizes(x: Tensor, dim: int) -> tuple[int, int]:
    """How many pairs there are, and how many elements on a pair's second one is."""
    return x.numel() // 2, math.prod(x.shape[dim % x.dim() + 1 :])


def group_sort(x: Tensor, group_size: int, dim: int) -> tuple[Tensor, Tensor]:
    """As :func:`lipkernels.reference.sorting.group_sort`, of pairs; the index is packed bits."""
    if x.dtype not in _FORMATS:
        raise TypeError(f"input: expected one of {list(_FORMATS)}, got {x.dtype}")
    y, swaps = x.new_empty(x.shape), x.new_empty((-(-x.numel() // 16),), dtype=torch.uint8)
    if x.numel():
        x = contiguous(x)
        arguments = (x.data_ptr(), y.data_ptr(), swaps.data_ptr(), *_sizes(x, dim))
        _sort_pairs(x.device, *arguments, _FORMATS[x.dtype])
    return y, swaps


def scatter_groups(grad: Tensor, index: Tensor, group_size: int, dim: int) -> Tensor:
    """As :func:`lipkernels.reference.sorting.scatter_groups`, of this file's index."""
    y = grad.new_empty(grad.shape)
    if grad.numel():
        x, swaps = contiguous(grad), index.contiguous()
        arguments = (x.data_ptr(), y.data_ptr(), swaps.data_ptr(), *_sizes(x, dim))
        _swap_pairs(x.device, *arguments, x.itemsize)
    return y


def gather_groups(x: Tensor, index: Tensor, group_size: int, dim: int) -> Tensor:
    """As :func:`lipkernels.reference.sorting.gather_groups`: an exchange is its own inverse."""
    return scatter_groups(x, index, group_size, dim)
