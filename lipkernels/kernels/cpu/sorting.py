"""Pairs by the C++ library; groups of other sizes, and narrow formats, by the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipkernels.kernels.cpu.library import library, n_threads
from lipkernels.reference import sorting as reference

_FORMATS = (torch.float32, torch.float64)


def _is_for_library(x: Tensor, group_size: int) -> bool:
    return group_size == 2 and x.dtype in _FORMATS


def _rows_and_inner(x: Tensor, dim: int) -> tuple[int, int]:
    """How many pairs of rows there are, and how long a row is."""
    inner = math.prod(x.shape[dim + 1 :])
    return x.numel() // (2 * inner), inner


def group_sort(x: Tensor, group_size: int, dim: int) -> tuple[Tensor, Tensor]:
    """As :func:`lipkernels.reference.sorting.group_sort`."""
    if not _is_for_library(x, group_size):
        return reference.group_sort(x, group_size, dim)
    x = x.resolve_neg().contiguous()
    y, index = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    library().lk_sort_pairs(
        x.data_ptr(),
        y.data_ptr(),
        index.data_ptr(),
        *_rows_and_inner(x, dim),
        x.itemsize,
        n_threads(),
    )
    return y, index


def _swapped(x: Tensor, index: Tensor, dim: int) -> Tensor:
    x = x.resolve_neg().contiguous()
    y = torch.empty_like(x)
    library().lk_swap_pairs(
        x.data_ptr(),
        y.data_ptr(),
        index.data_ptr(),
        *_rows_and_inner(x, dim),
        x.itemsize,
        n_threads(),
    )
    return y


def gather_groups(x: Tensor, index: Tensor, group_size: int, dim: int) -> Tensor:
    """As :func:`lipkernels.reference.sorting.gather_groups`."""
    if not (_is_for_library(x, group_size) and index.is_contiguous()):
        return reference.gather_groups(x, index, group_size, dim)
    return _swapped(x, index, dim)


def scatter_groups(grad: Tensor, index: Tensor, group_size: int, dim: int) -> Tensor:
    """As :func:`lipkernels.reference.sorting.scatter_groups`."""
    if not (_is_for_library(grad, group_size) and index.is_contiguous()):
        return reference.scatter_groups(grad, index, group_size, dim)
    return _swapped(grad, index, dim)
