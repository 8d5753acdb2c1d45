"""How often a sliding window reads each input element: what turns a kernel's norm into a layer's.

Let K be the kernel of a convolution as a matrix (c_out / groups, c_in / groups * taps), one for
each group. Every output position reads one patch of the input, padding copies included, so

    |conv(x)|^2 <= |K|_2^2 sum over outputs of |patch|^2 = |K|_2^2 sum_i n_i x_i^2
                <= |K|_2^2 max_i n_i |x|^2

with n_i the number of (output, tap) pairs that read element i. n factorizes over the dimensions.
With zero padding, the supremum of one dimension's factor over all sizes is ceil(k g / s), g =
gcd(dilation, stride): the taps that reach a given element lie in one residue class modulo s. Other
paddings copy border elements, which are counted one by one. The bound is attained when K is square
orthogonal. A transposed convolution is the adjoint, and has the same norm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

_MODES = ("zeros", "reflect", "replicate", "circular", "symmetric")


def _source(position: int, size: int, mode: str) -> int | None:
    """The input element that the padded ``position`` (0 = first real one) copies."""
    if 0 <= position < size:
        return position
    if mode == "zeros":
        return None
    if mode == "circular":
        return position % size
    if mode == "replicate":
        return 0 if position < 0 else size - 1
    if mode == "reflect":
        return -position if position < 0 else 2 * (size - 1) - position
    return -1 - position if position < 0 else 2 * size - 1 - position  # symmetric


def _smallest_size(left: int, right: int, mode: str) -> int:
    widest = max(left, right)
    return {"reflect": widest + 1, "circular": max(widest, 1), "symmetric": max(widest, 1)}.get(
        mode, 1
    )


def smallest_input(kernel: int, left: int, right: int, dilation: int, mode: str) -> int:
    """The least size, in one dimension, that the padding allows and the window fits in."""
    return max(1, _smallest_size(left, right, mode), dilation * (kernel - 1) + 1 - left - right)


def _check_window(kernel: int, stride: int, dilation: int, mode: str) -> None:
    if min(kernel, stride, dilation) < 1:
        raise ValueError(
            "window: expected a kernel size, stride and dilation of at least 1, got"
            f" {kernel}, {stride} and {dilation}"
        )
    if mode not in _MODES:
        raise ValueError(f"padding_mode: expected one of {_MODES}, got {mode!r}")


def _check_size(size: int, kernel: int, left: int, right: int, dilation: int, mode: str) -> None:
    least, extent = smallest_input(kernel, left, right, dilation, mode), dilation * (kernel - 1) + 1
    if size < least:
        raise ValueError(
            f"size: expected at least {least} for a kernel that spans {extent} and {mode} padding"
            f" of {left} and {right}, got {size}"
        )


def _reads_at_size(
    kernel: int, stride: int, left: int, right: int, dilation: int, mode: str, size: int
) -> int:
    extent = dilation * (kernel - 1) + 1
    n_outputs = max(0, (size + left + right - extent) // stride + 1)
    reads = [0] * size
    for output in range(n_outputs):
        for tap in range(kernel):
            source = _source(output * stride + tap * dilation - left, size, mode)
            if source is not None:
                reads[source] += 1
    return max(reads, default=0)


@functools.lru_cache(maxsize=4096)
def max_reads(
    kernel: int,
    stride: int,
    left: int,
    right: int,
    dilation: int,
    mode: str,
    size: int | None = None,
) -> int:
    """Largest number of (output, tap) pairs that read one input element, in one dimension.

    ``left`` and ``right`` are the padding widths, ``mode`` one of zeros, reflect, replicate,
    circular, symmetric. ``size`` None: the largest over all sizes that the padding allows. Raises
    ValueError for a window or a size that no convolution has.
    """
    _check_window(kernel, stride, dilation, mode)
    if size is not None:
        _check_size(size, kernel, left, right, dilation, mode)
        return _reads_at_size(kernel, stride, left, right, dilation, mode, size)
    unpadded = math.ceil(kernel * math.gcd(dilation, stride) / stride)
    if mode == "zeros" or left == right == 0:
        return unpadded
    # Beyond `settled` the two borders no longer meet; what is left is the phase of the last window,
    # which has period `stride`.
    settled = left + right + dilation * (kernel - 1) + stride + 2
    sizes = range(_smallest_size(left, right, mode), settled + stride + 1)
    return max(
        unpadded,
        *(_reads_at_size(kernel, stride, left, right, dilation, mode, n) for n in sizes),
    )


def operator_factor(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    mode: str,
    size: Sequence[int] | None = None,
) -> float:
    """sqrt(max_i n_i), rounded up: |conv|_2 <= operator_factor * |K|_2."""
    sizes = [None] * len(kernel) if size is None else list(size)
    reads = math.prod(
        max_reads(k, s, left, right, d, mode, n)
        for k, s, (left, right), d, n in zip(kernel, stride, padding, dilation, sizes, strict=True)
    )
    root = math.isqrt(reads)
    return float(root) if root * root == reads else math.nextafter(math.sqrt(reads), math.inf)
