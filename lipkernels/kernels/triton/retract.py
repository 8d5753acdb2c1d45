"""Weights back to their constraint, and gradients along it, for a whole group.

*Retraction* is the polar factor: a weight that an optimizer has left near the constraint is done
after one step and the polishing, and the other launches find nothing to do. How near it is need not
be known on the host.

*Projection*, wide convention, X = W / scale (see `lipkernels.reference.retract`): four launches,

    D = G - S X,    S = (G X^T + X G^T) / 2
"""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton import planes
from lipkernels.kernels.triton.elements import launch, part_of, saturated
from lipkernels.kernels.triton.group import Matrix, group
from lipkernels.kernels.triton.planes import (
    SCALE,
    raw_block,
    store_planes,
    store_raw_block,
    store_symmetric,
    to_unit_magnitude,
)
from lipkernels.kernels.triton.polar import forward
from lipkernels.kernels.triton.products import B, add_a_b, add_a_bt, tiling
from lipkernels.kernels.triton.rounding import rounded
from lipkernels.kernels.triton.workspace import (
    LANES,
    Layout,
    is_tall,
    largest,
    layout,
    lower_blocks,
    maxima_blocks,
    of_kind,
    sides,
    square_at,
    wide_at,
    wide_blocks,
)

_G, _X = (tl.constexpr(i) for i in range(2))  # wide slots; S is the one square
_UNSCALE = tl.constexpr(1.0 / (128.0 * 128.0))


@triton.jit
def pack(
    grads, weights, table, tiles, places, scales, maxima, hi, lo, units,
    ALIGNED: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Kind 0: G / unit; 1: X. units: the unit, or NaN for a G that is not finite."""
    t = tl.program_id(0)
    p, kind = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    m, n, _, ldn = sides(table, p)
    tall = is_tall(table, p)
    if kind == 0:
        bits = largest(table, maxima, p, LANES)
        x = raw_block(part_of(grads, places, p, 0, 3, ALIGNED), i, j, m, n, tall, B)
        x, unit = to_unit_magnitude(x, bits)
        if (i == 0) & (j == 0):
            tl.store(units + p, tl.where(bits < 0x7F800000, unit, float("nan")))
    else:
        x = raw_block(part_of(weights, places, p, 1, 3, ALIGNED), i, j, m, n, tall, B)
        x = x * (1.0 / tl.load(scales + p)).to(tl.float32)
    store_planes(hi, lo, wide_at(table, p, m, ldn, kind), i, j, m, ldn, SCALE, x, B, B)


@triton.jit
def across(table, tiles, hi, lo, B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """S."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, _, ldm, ldn = sides(table, p)
    g, x = wide_at(table, p, m, ldn, _G), wide_at(table, p, m, ldn, _X)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, g, x, i, j, m, m, ldn, B, BK, DESCRIPTORS)
    acc = add_a_bt(acc, hi, lo, x, g, i, j, m, m, ldn, B, BK, DESCRIPTORS)
    acc *= 0.5 * _UNSCALE
    store_symmetric(hi, lo, square_at(table, p, m, ldm, 0), i, j, m, ldm, SCALE, acc, B)


@triton.jit
def subtract(
    grads, out, table, tiles, places, hi, lo, units, limit, ALIGNED: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """D = G - S X, in the format of G."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, ldm, ldn = sides(table, p)
    tall = is_tall(table, p)
    s, x = square_at(table, p, m, ldm, 0), wide_at(table, p, m, ldn, _X)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_b(acc, hi, lo, s, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
    g = raw_block(part_of(grads, places, p, 0, 3, ALIGNED), i, j, m, n, tall, B)
    d = saturated(g - acc * _UNSCALE * tl.load(units + p), limit)
    d = rounded(d, out.dtype.element_ty)
    store_raw_block(part_of(out, places, p, 2, 3, ALIGNED), i, j, m, n, tall, d, B)


def _layout(matrices: tuple[Matrix, ...]) -> Layout:
    return layout(matrices, n_wide=2, n_squares=1)


def _packed(a: Matrix) -> list[tuple[int, ...]]:
    return of_kind(0, wide_blocks(a)) + of_kind(1, wide_blocks(a))


def _project(grads: list[Tensor], weights: list[Tensor], scales: list[float], out: list[Tensor]):
    """All ``grads`` have one format, and so have all ``weights``."""
    shapes = group(grads)
    place, device = shapes.plan("retract", _layout), shapes.device
    table = shapes.table("retract", torch.int64, lambda: place.rows)
    places, aligned = shapes.places(grads, weights, out)
    entries = shapes.table(
        "entries", torch.int64, lambda: [(a.rows * a.cols,) for a in shapes.matrices]
    )
    hi, lo = torch.empty((2, place.size), dtype=torch.float16, device=device)
    maxima = torch.empty(place.n_maxima, dtype=torch.int32, device=device)
    units = torch.empty(len(shapes.matrices), dtype=torch.float32, device=device)
    product = tiling(device)
    built = product.constants | product.options
    tiles = shapes.tiles("maxima", maxima_blocks)
    launch(
        planes.magnitudes, len(tiles),
        grads[0], tiles, places, entries, maxima,
        WIDTH=3, ALIGNED=aligned, BLOCK=planes.BLOCK, num_warps=planes.WARPS,
    )  # fmt: skip
    tiles = shapes.tiles("G, X", _packed)
    launch(
        pack, len(tiles),
        grads[0], weights[0], table, tiles, places, shapes.numbers(scales), maxima,
        hi, lo, units, ALIGNED=aligned, B=B, LANES=LANES, num_warps=planes.WARPS,
    )  # fmt: skip
    tiles = shapes.tiles("lower blocks", lower_blocks)
    launch(across, len(tiles), table, tiles, hi, lo, **built)
    tiles = shapes.tiles("wide blocks", wide_blocks)
    launch(
        subtract, len(tiles),
        grads[0], out[0], table, tiles, places, hi, lo, units, torch.finfo(out[0].dtype).max,
        ALIGNED=aligned, **built,
    )  # fmt: skip


def project(
    grads: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    """As :func:`lipkernels.reference.retract.project`, for formats other than float64."""
    out = [torch.empty_like(g) for g in grads]
    formats = [(g.dtype, w.dtype) for g, w in zip(grads, weights, strict=True)]
    for wanted in dict.fromkeys(formats):
        members = [i for i, found in enumerate(formats) if found == wanted]
        _project(
            [grads[i] for i in members],
            [weights[i].contiguous() for i in members],
            [scales[i] for i in members],
            [out[i] for i in members],
        )
    return out


def retract(weights: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """As :func:`lipkernels.reference.retract.retract`, for formats other than float64."""
    found: dict[int, Tensor] = {}
    for kind in dict.fromkeys(w.dtype for w in weights):
        members = [i for i, w in enumerate(weights) if w.dtype == kind]
        results, _ = forward([weights[i] for i in members], [scales[i] for i in members], kind)
        found.update(zip(members, results, strict=True))
    return [found[i] for i in range(len(weights))]
