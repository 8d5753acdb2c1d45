"""Weights of any batch dimensions as a flat list of matrices, for the library's problems."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor


def members(tensors: Sequence[Tensor]) -> Iterator[tuple[int, ...]]:
    """For each matrix of a weight (..., rows, cols), where its part of each tensor begins.

    The first tensor is the weight; all are contiguous and have its batch dimensions.

    >>> import torch
    >>> w, sigma = torch.zeros(2, 3, 5), torch.zeros(2)
    >>> first, second = members([w, sigma])
    >>> [there - here for here, there in zip(first, second)]
    [60, 4]
    """
    n = math.prod(tensors[0].shape[:-2])
    addresses = [t.data_ptr() for t in tensors]
    steps = [t.numel() // n * t.element_size() for t in tensors]
    for k in range(n):
        yield tuple(at + k * step for at, step in zip(addresses, steps, strict=True))
