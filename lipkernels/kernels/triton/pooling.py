"""L2-norm and average pooling and their gradients, one launch each.

Three shapes of windows have kernels of their own, each for both pools (see `pool_terms`): "tiles",
side by side in a contiguous image that they fill, "rows", a window that is the whole image, and
"windows", any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipkernels.kernels.triton.offsets import is_long
from lipkernels.kernels.triton.pool_rows import gather_rows, spread_rows
from lipkernels.kernels.triton.pool_tiles import gather_tiles, spread_tiles
from lipkernels.kernels.triton.pool_windows import gather_windows, spread_windows
from lipkernels.kernels.triton.rounding import halves
from lipkernels.reference import pooling as reference

NUM_WARPS = 4
_TILE_BYTES = 8192
_ANY_BLOCK = 1024
_WIDEST_TILE = 16  # columns of a window that is folded in registers

# Of the sum of squares and of the sum over each window, and of their gradients.
GATHER: dict[str, Any] = {"tiles": gather_tiles, "rows": gather_rows, "windows": gather_windows}
SPREAD: dict[str, Any] = {"tiles": spread_tiles, "rows": spread_rows, "windows": spread_windows}


@dataclass(frozen=True)
class Plan:
    """Which kernels, over how many elements, and their arguments."""

    kind: str
    sizes: dict[str, int]
    constants: dict[str, Any]
    n: int  # programs of the forward kernel, of the backward kernel
    n_backward: int
    backward_sizes: dict[str, int]


def _output_size(size: int, k: int, s: int, p: int, ceil_mode: bool) -> int:
    """As torch counts windows: with ``ceil_mode`` the last one starts inside of the image."""
    n = (size + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
    return n - 1 if ceil_mode and (n - 1) * s >= size + p else n


def plan(
    shape: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    channels_last: bool,
    itemsize: int,
) -> tuple[tuple[int, int], Plan]:
    """(height, width) of the output, and how to compute it."""
    *outer, height, width = shape
    out_height, out_width = (
        _output_size(*numbers, ceil_mode)
        for numbers in zip((height, width), kernel, stride, padding, strict=True)
    )
    planes, most = math.prod(outer), 16 // itemsize
    windows, pixels = planes * out_height * out_width, planes * height * width
    long = {"LONG": is_long(max(windows, pixels)), "num_warps": NUM_WARPS}
    fills = kernel == stride and (out_height * kernel[0], out_width * kernel[1]) == (height, width)
    whole = fills and (out_height, out_width) == (1, 1)
    columns = kernel[1]
    if not channels_last and padding == [0, 0] and fills:
        if whole and height * width > _WIDEST_TILE:
            length = height * width
            block = min(1 << (length - 1).bit_length(), 1024)
            rows = max(_TILE_BYTES // itemsize // block, 1)
            vl = math.gcd(length, most)
            sizes = {"n": planes, "length": length // vl}
            constants = {"ROWS": rows, "BLOCK": block, "VL": vl, **long}
            programs = -(-planes // rows)
            return (1, 1), Plan("rows", sizes, constants, programs, programs, sizes)
        if columns <= _WIDEST_TILE and columns & (columns - 1) == 0:
            block = _TILE_BYTES // itemsize // columns
            vw, vn = math.gcd(width, most), math.gcd(windows, most)
            sizes = {
                **{"n": windows // vn, "height": height, "width": width // vw},
                **{"out_height": out_height, "out_columns": out_width * columns // vw},
            }
            constants = {"KH": kernel[0], "KW": columns, "BLOCK": block, "VN": vn, "VW": vw, **long}
            programs = -(-windows // block)
            size = (out_height, out_width)
            return size, Plan("tiles", sizes, constants, programs, programs, sizes)
    channels = outer[-1] if channels_last else 1
    vc = math.gcd(channels, most)
    sizes = {
        **{"height": height, "width": width, "out_height": out_height, "out_width": out_width},
        "channels": channels // vc,
    }
    constants = {
        **dict(
            zip(("KH", "KW", "SH", "SW", "PH", "PW"), (*kernel, *stride, *padding), strict=True)
        ),
        **{"BLOCK": _ANY_BLOCK, "VC": vc, "LAST": channels_last, **long},
    }
    return (out_height, out_width), Plan(
        "windows",
        {"n": windows // vc, **sizes},
        constants,
        -(-windows // _ANY_BLOCK),
        -(-pixels // _ANY_BLOCK),
        {"n": pixels // vc, **sizes},
    )


def _gathered(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    number: float,
    norm: bool,
) -> Tensor:
    memory_format = reference.memory_format(x)
    x = x.resolve_neg().contiguous(memory_format=memory_format)
    last = memory_format == torch.channels_last
    size, how = plan(tuple(x.shape), kernel, stride, padding, ceil_mode, last, x.itemsize)
    y = torch.empty(
        (*x.shape[:-2], *size), dtype=x.dtype, device=x.device, memory_format=memory_format
    )
    if y.numel():
        GATHER[how.kind][(how.n,)](
            x, y, number, *halves(number), **how.sizes, **how.constants, NORM=norm
        )
    return y


def l2_norm_pool2d(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> Tensor:
    """As :func:`lipkernels.reference.pooling.l2_norm_pool2d`."""
    return _gathered(x, kernel, stride, padding, ceil_mode, 0.0, norm=True)


def scaled_avg_pool2d(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    scale: float,
) -> Tensor:
    """As :func:`lipkernels.reference.pooling.scaled_avg_pool2d`."""
    number = scale / math.prod(kernel)
    return _gathered(x, kernel, stride, padding, ceil_mode, number, norm=False)


def l2_norm_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    eps: float,
) -> Tensor:
    """As :func:`lipkernels.reference.pooling.l2_norm_pool2d_vjp`."""
    memory_format = reference.memory_format(x)
    x, y, grad = (t.resolve_neg().contiguous(memory_format=memory_format) for t in (x, y, grad))
    last = memory_format == torch.channels_last
    _, how = plan(tuple(x.shape), kernel, stride, padding, ceil_mode, last, x.itemsize)
    out = torch.empty_like(x)
    if x.numel():
        SPREAD[how.kind][(how.n_backward,)](
            x, y, grad, out, eps, *halves(eps), **how.backward_sizes, **how.constants, NORM=True
        )
    return out


def scaled_avg_pool2d_backward(
    grad: Tensor,
    shape: list[int],
    channels_last: bool,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    scale: float,
) -> Tensor:
    """As :func:`lipkernels.reference.pooling.scaled_avg_pool2d_vjp`."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grad = grad.resolve_neg().contiguous(memory_format=memory_format)
    _, how = plan(tuple(shape), kernel, stride, padding, ceil_mode, channels_last, grad.itemsize)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    if out.numel():
        number, sizes = scale / math.prod(kernel), how.backward_sizes
        # Neither the image nor the result is read: `grad` stands for them.
        SPREAD[how.kind][(how.n_backward,)](
            grad, grad, grad, out, number, *halves(number), **sizes, **how.constants, NORM=False
        )
    return out
