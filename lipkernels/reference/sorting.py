"""Sorting groups of neighbouring channels: GroupSort (Anil, Lucas and Grosse, arXiv 1811.05381).

Within a group the output is a permutation of the input, so the map is 1-Lipschitz in every l_p norm
and its Jacobian is orthogonal. The permutation is kept in the smallest integer type that holds it
(one byte an element up to groups of 256); the gradient is scattered back through it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def index_dtype(group_size: int) -> torch.dtype:
    """Smallest integer type for an index within a group."""
    if group_size <= 256:
        return torch.uint8
    return torch.int16 if group_size <= 2**15 else torch.int32


def _swap_pairs(x: Tensor, swap: Tensor, dim: int) -> Tensor:
    """Exchange the two entries of each pair along ``dim`` where ``swap`` (one a pair) is set."""
    pairs = x.unflatten(dim, (-1, 2))
    a, b = pairs.unbind(dim + 1)
    swapped = torch.stack((torch.where(swap, b, a), torch.where(swap, a, b)), dim + 1)
    return swapped.flatten(dim, dim + 1).contiguous()


def _is_swapped(index: Tensor, dim: int) -> Tensor:
    return index.unflatten(dim, (-1, 2)).select(dim + 1, 0).bool()


def _sort_pairs(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """:func:`group_sort` for groups of two: a comparison in place of a sort."""
    a, b = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    swap = (a > b) | (a.isnan() & ~b.isnan())  # a sort puts NaN last
    index = torch.stack((swap, ~swap), dim + 1).flatten(dim, dim + 1)
    return _swap_pairs(x, swap, dim), index.to(torch.uint8).contiguous()


def group_sort(x: Tensor, group_size: int, dim: int) -> tuple[Tensor, Tensor]:
    """``(y, index)``: each group of ``dim`` in ascending order; y = x gathered at ``index``."""
    if group_size == 2:
        return _sort_pairs(x, dim)
    groups = x.unflatten(dim, (-1, group_size))
    values, index = groups.sort(dim=dim + 1, stable=True)
    y = values.flatten(dim, dim + 1).contiguous()
    return y, index.flatten(dim, dim + 1).to(index_dtype(group_size)).contiguous()


def gather_groups(x: Tensor, index: Tensor, group_size: int, dim: int) -> Tensor:
    """``x`` permuted within its groups, as :func:`group_sort` did."""
    if group_size == 2:
        return _swap_pairs(x, _is_swapped(index, dim), dim)
    groups = x.unflatten(dim, (-1, group_size))
    where = index.unflatten(dim, (-1, group_size)).long()
    return groups.gather(dim + 1, where).flatten(dim, dim + 1).contiguous()


def scatter_groups(grad: Tensor, index: Tensor, group_size: int, dim: int) -> Tensor:
    """The transpose (and inverse) of :func:`gather_groups`: the VJP of the sort."""
    if group_size == 2:  # exchanging a pair is its own inverse
        return _swap_pairs(grad, _is_swapped(index, dim), dim)
    groups = grad.unflatten(dim, (-1, group_size))
    where = index.unflatten(dim, (-1, group_size)).long()
    out = torch.empty_like(groups).scatter(dim + 1, where, groups)
    return out.flatten(dim, dim + 1).contiguous()
