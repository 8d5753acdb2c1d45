"""Space to depth and back by csrc/cuda/sampling.cu: one permuted copy of any strides.

Without a scale only the width of an element matters, and its bits are moved.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lipkernels.kernels.blocks import Dim, empty_deep, empty_wide, to_depth, to_space
from lipkernels.kernels.cuda.library import DOUBLE, POINTER, declared
from lipkernels.kernels.cuda.tiles import DIMS, WORD, tile

_SCALINGS = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}


class _Description(ctypes.Structure):
    """CopyDescription of csrc/cuda/sampling.cu; strides in bytes."""

    _fields_ = (
        ("size", ctypes.c_int64 * DIMS),
        ("x", ctypes.c_int64 * DIMS),
        ("y", ctypes.c_int64 * DIMS),
        ("extent", ctypes.c_int32 * DIMS),
        ("by_x", ctypes.c_int32 * DIMS),
        ("dims", ctypes.c_int32),
        ("itemsize", ctypes.c_int32),
        ("scaling", ctypes.c_int32),
        ("x_width", ctypes.c_int32),
        ("y_width", ctypes.c_int32),
        ("pad_shift", ctypes.c_int32),
        ("direct", ctypes.c_int32),
    )


_permuted_copy = declared("lk_permuted_copy", POINTER, POINTER, POINTER, DOUBLE)


@functools.lru_cache(maxsize=1024)
def _described(
    dims: tuple[Dim, ...], itemsize: int, x_aligned: int, y_aligned: int, scaling: int
) -> _Description:
    found = tile(dims, itemsize, x_aligned, y_aligned)
    d = _Description(
        dims=len(found.dims),
        itemsize=itemsize,
        scaling=scaling,
        x_width=found.x_word,
        y_width=found.y_word,
        pad_shift=found.pad_shift,
        direct=found.direct,
    )
    for k, dim in enumerate(found.dims):
        d.size[k], d.x[k], d.y[k] = dim.size, dim.x * itemsize, dim.y * itemsize
        d.extent[k], d.by_x[k] = found.extents[k], found.by_x[k]
    return d


def _alignment(x: Tensor) -> int:
    """The largest power of two, up to a word, that the address is a multiple of."""
    address = x.data_ptr() | WORD
    return address & -address


def _copied(x: Tensor, y: Tensor, dims: tuple[Dim, ...], scale: float) -> Tensor:
    scaling = 0 if scale == 1.0 else _SCALINGS[x.dtype]
    description = _described(dims, x.itemsize, _alignment(x), _alignment(y), scaling)
    _permuted_copy(x.device, x.data_ptr(), y.data_ptr(), ctypes.byref(description), scale)
    return y


def contiguous(x: Tensor) -> Tensor:
    """``x.contiguous()`` with lazy negatives resolved; layouts that cross are copied in tiles."""
    x = x.resolve_conj().resolve_neg()
    if x.is_contiguous() or x.numel() == 0 or x.dim() > DIMS:
        return x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _copied(x, y, tuple(map(Dim, x.shape, x.stride(), y.stride())), 1.0)


def _moved(
    x: Tensor, y: Tensor, dims_of: Callable[[Tensor], tuple[Dim, ...]], scale: float
) -> Tensor:
    """``y`` filled with the elements of ``x``, whose copy has the dimensions ``dims_of(x)``."""
    if x.numel() == 0:
        return y
    x = x.resolve_conj().resolve_neg()
    return _copied(x, y, dims_of(x), scale)


def space_to_depth(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float
) -> Tensor:
    """As :func:`lipkernels.reference.sampling.space_to_depth`, times ``scale``."""
    y = empty_deep(x, ph, pw, channels_last)
    return _moved(x, y, lambda x: to_depth(x, y, ph, pw, mode, channels_last), scale)


def depth_to_space(
    x: Tensor, ph: int, pw: int, mode: str, channels_last: bool, scale: float
) -> Tensor:
    """As :func:`lipkernels.reference.sampling.depth_to_space`, times ``scale``."""
    y = empty_wide(x, ph, pw, channels_last)
    return _moved(x, y, lambda x: to_space(x, y, ph, pw, mode, channels_last), scale)
