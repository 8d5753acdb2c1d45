"""Symmetric padding, which torch has not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipkernels.reference import padding as _padding

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_DTYPES = (*_FLOATS, *_INTEGERS, torch.complex64, torch.complex128)


def symmetric_pad(x: Tensor, pad: Sequence[int]) -> Tensor:
    r"""Pad with the mirror image, edge included: (a b c) by (2, 1) becomes (b a a b c c).

    ``pad`` as in :func:`torch.nn.functional.pad`: (left, right) of the last dimension first. Raises
    ValueError where a width exceeds the size of its dimension.

    >>> symmetric_pad(torch.tensor([[1, 2, 3]]), (2, 1))
    tensor([[2, 1, 1, 2, 3, 3]])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"input: expected a dtype among {known}, got {x.dtype}")
    if not all(isinstance(width, int) for width in pad):
        raise TypeError(f"pad: expected integers, got {pad}")
    if len(pad) % 2 or len(pad) // 2 > x.dim():
        raise ValueError(f"pad: expected (left, right) for up to {x.dim()} dimensions, got {pad}")
    for i, width in enumerate(pad):
        if not 0 <= width <= x.shape[-1 - i // 2]:
            raise ValueError(
                f"pad: expected a width from 0 to the size {x.shape[-1 - i // 2]}, got {width}"
            )
    return _padding.symmetric_pad(x, pad)
