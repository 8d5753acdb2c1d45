"""Space to depth and back as one permuted copy: each byte is read once and written once.

`permutation` chooses the tiles. Without a scale only the width of an element matters, so any format
is moved as integers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.blocks import Dim, empty_deep, empty_wide, to_depth, to_space
from lipkernels.kernels.triton.offsets import is_long
from lipkernels.kernels.triton.permutation import Q_DIMS, WIDEST, Tiling, tiling
from lipkernels.kernels.triton.rounding import from_halves, halves, rounded

NUM_WARPS = 4
_TILE_BYTES = 8192  # four loads of 16 bytes for each thread
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# fmt: off
ARGUMENTS = (
    "total", "n_q", "n_k", "n0", "n1", "n2", "n3", "n4", "x0", "x1", "x2", "x3", "x4", "x5",
    "y0", "y1", "y2", "y3", "y4", "y5", "m0", "xk0", "xk1", "yk0", "yk1", "run", "high", "low",
)
# fmt: on


# Sizes and strides come divided by a power of two (V...: a constant) and are multiplied back, which
# tells the compiler how far an address is aligned without a build for each shape. The scale comes
# twice: as a float32, and as the halves of a float64.
@triton.jit(do_not_specialize=ARGUMENTS)
def permuted_copy(
    x,
    y,
    scale,
    total,
    n_q,
    n_k,
    n0,
    n1,
    n2,
    n3,
    n4,
    x0,
    x1,
    x2,
    x3,
    x4,
    x5,
    y0,
    y1,
    y2,
    y3,
    y4,
    y5,
    m0,
    xk0,
    xk1,
    yk0,
    yk1,
    run,
    high,
    low,
    N_DIGITS: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    VT: tl.constexpr,
    VQ: tl.constexpr,
    VN: tl.constexpr,
    VR: tl.constexpr,
    VK: tl.constexpr,
    VX: tl.constexpr,
    VY: tl.constexpr,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    K_RUN: tl.constexpr,
    FLAT_X: tl.constexpr,
    FLAT_Y: tl.constexpr,
    SCALED: tl.constexpr,
    LONG: tl.constexpr,
):
    first_q, first_k = tl.program_id(0), tl.program_id(1)
    if LONG:
        first_q, first_k = first_q.to(tl.int64), first_k.to(tl.int64)
        total, n_q, n0, run = (
            total.to(tl.int64),
            n_q.to(tl.int64),
            n0.to(tl.int64),
            run.to(tl.int64),
        )
    flat = first_q * (BQ * BK) + tl.arange(0, BQ * BK)
    q = first_q * BQ + tl.arange(0, BQ)
    k = first_k * BK + tl.arange(0, BK)
    inside = (q < n_q * VQ)[:, None] & (k < n_k * VK)[None, :]

    digit, rest = q % (n0 * VN), q // (n0 * VN)
    from_q = digit if X_UNIT else digit * x0 * VX
    to_q = digit if Y_UNIT else digit * y0 * VY
    if N_DIGITS > 1:
        digit, rest = rest % n1, rest // n1
        from_q += digit * x1 * VX
        if VR > 0:  # the first two digits are one run of y
            to_q, rest = q % (run * VR), q // (run * VR)
        else:
            to_q += digit * y1 * VY
    if N_DIGITS > 2:
        digit, rest = rest % n2, rest // n2
        from_q += digit * x2 * VX
        to_q += digit * y2 * VY
    if N_DIGITS > 3:
        digit, rest = rest % n3, rest // n3
        from_q += digit * x3 * VX
        to_q += digit * y3 * VY
    if N_DIGITS > 4:
        digit, rest = rest % n4, rest // n4
        from_q += digit * x4 * VX
        to_q += digit * y4 * VY
    if N_DIGITS > 5:
        from_q += rest * x5 * VX
        to_q += rest * y5 * VY
    digit = k if K_RUN else k % m0  # in a run of x, k needs no digits
    from_k = digit if K_UNIT else digit * xk0 * VX
    if not K_RUN:
        from_k += k // m0 * xk1 * VX
    to_k = k % m0 * yk0 * VY + k // m0 * yk1 * VY

    if FLAT_X:
        value = tl.reshape(tl.load(x + flat, mask=flat < total * VT), (BQ, BK))
    else:
        value = tl.load(x + (from_q[:, None] + from_k[None, :]), mask=inside)
    if SCALED:
        if value.dtype == tl.float64:
            value = value * from_halves(high, low)
        else:
            value = rounded(value.to(tl.float32) * scale, value.dtype)
    if FLAT_Y:
        tl.store(y + flat, tl.reshape(value, (BQ * BK,)), mask=flat < total * VT)
    else:
        tl.store(y + (to_q[:, None] + to_k[None, :]), value, mask=inside)


def _divisor(numbers: list[int], most: int) -> int:
    """The largest power of two, up to ``most``, that divides all of ``numbers``."""
    return math.gcd(most, *numbers)


def _last_offset(dims: tuple[Dim, ...], side: str) -> int:
    return sum((d.size - 1) * getattr(d, side) for d in dims)


@functools.lru_cache(maxsize=1024)
def launch(
    dims: tuple[Dim, ...], itemsize: int
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """The grid, the integers and the constants of a copy, for ``permuted_copy``."""
    tiles = tiling(dims)
    most = 16 // itemsize
    q0, *q = tiles.q
    k = [*tiles.k, *[Dim(1, 0, 0)] * (2 - len(tiles.k))]
    run = k[1].size == 1 or k[1].x == k[0].x * k[0].size
    bk = min(1 << (tiles.n_k - 1).bit_length(), WIDEST)
    bq = _TILE_BYTES // itemsize // bk
    vt, vq, vn, vk = (
        _divisor([n], most) for n in (tiles.n_q * tiles.n_k, tiles.n_q, q0.size, tiles.n_k)
    )
    # What the kernel reads of them: a stride of one is a constant, a run has a single stride.
    x0, y0 = (0 if stride == 1 else stride for stride in (q0.x, q0.y))
    xk0, xk1 = 0 if k[0].x == 1 else k[0].x, 0 if run else k[1].x
    vx = _divisor([x0, *(d.x for d in q), xk0, xk1], most)
    run_of_y = q0.size * q[0].size if q and q0.y == 1 and q[0].y == q0.size else 0
    vr = _divisor([run_of_y], most) if run_of_y else 0
    vy = _divisor([y0, *(d.y for d in (*(q[1:] if run_of_y else q), *k))], most)
    q += [Dim(1, 0, 0)] * (Q_DIMS - 1 - len(q))
    integers = (
        *(tiles.n_q * tiles.n_k // vt, tiles.n_q // vq, tiles.n_k // vk),
        *(q0.size // vn, *(d.size for d in q[:-1])),
        *(x0 // vx, *(d.x // vx for d in q)),
        *(y0 // vy, *(d.y // vy for d in q)),
        *(k[0].size, xk0 // vx, xk1 // vx, k[0].y // vy, k[1].y // vy),
        run_of_y // max(vr, 1),
    )
    constants = {
        "N_DIGITS": len(tiles.q),
        **{"BQ": bq, "BK": bk, "VT": vt, "VQ": vq, "VN": vn, "VR": vr, "VK": vk},
        **{"VX": vx, "VY": vy},
        **{"X_UNIT": q0.x == 1, "Y_UNIT": q0.y == 1, "K_UNIT": k[0].x == 1, "K_RUN": run},
        **{"FLAT_X": tiles.flat_x, "FLAT_Y": tiles.flat_y},
        "LONG": is_long(max(_last_offset(dims, "x"), _last_offset(dims, "y"))),
        "num_warps": NUM_WARPS,
    }
    return (-(-tiles.n_q // bq), -(-tiles.n_k // bk)), integers, constants


def _copied(x: Tensor, y: Tensor, dims: tuple[Dim, ...], scale: float) -> Tensor:
    grid, integers, constants = launch(dims, x.itemsize)
    source, target = x, y
    if scale == 1.0:
        source, target = x.view(_BITS[x.itemsize]), y.view(_BITS[x.itemsize])
    arguments = dict(zip(ARGUMENTS, (*integers, *halves(scale)), strict=True))
    settings = {**constants, "SCALED": scale != 1.0}
    permuted_copy[grid](source, target, scale, **arguments, **settings)
    return y


def contiguous(x: Tensor) -> Tensor:
    """``x.contiguous()``, but wide on both sides where the layouts cross, as channels last do."""
    x = x.resolve_neg()
    if x.is_contiguous() or x.numel() == 0 or x.dim() > Q_DIMS:
        return x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _copied(x, y, tuple(map(Dim, x.shape, x.stride(), y.stride())), 1.0)


def _moved(
    x: Tensor, y: Tensor, dims_of: Callable[[Tensor], tuple[Dim, ...]], scale: float
) -> Tensor:
    """``y`` filled with the elements of ``x``, whose copy has the dimensions ``dims_of(x)``."""
    if x.numel() == 0:
        return y
    x = x.resolve_neg()
    if not x.is_contiguous() and _has_short_runs(tiling(dims_of(x)), x.itemsize):
        x = contiguous(x)
    return _copied(x, y, dims_of(x), scale)


def _has_short_runs(tiles: Tiling, itemsize: int) -> bool:
    """Both sides go through memory in the same short runs, in another order: two copies do better.

    So does the deep image of CRD that lies in memory with its channels last.
    """
    return not tiles.k and tiles.q[0].size * itemsize < 16


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
