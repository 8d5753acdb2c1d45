"""Spectral normalization of a group of weights, and its gradient.

The divisor is the upper bound of `norms`, tight to 1e-9 or better and computed anew on every call:
the stored start vectors of a power iteration are not needed, and cannot mislead it.

A result in half precision is rounded, and its own norm bounded; where it exceeds the scale, the
matrix is divided by that norm and by a little more, and rounded again, up to ATTEMPTS times; after
the last the worst case of rounding is paid in full (as `lipkernels.reference.rounding` does, which
asks the host in between; here the device decides).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton import norms, packing
from lipkernels.kernels.triton.elements import (
    block_at,
    launch,
    narrowed,
    part_of,
    saturated,
    sum_of,
    widened,
)
from lipkernels.kernels.triton.frobenius import (
    WHOLE,
    blocks_of,
    partial_sums,
    same_formats,
    write_block,
)
from lipkernels.kernels.triton.group import ALIGNMENT, Group, group
from lipkernels.kernels.triton.power import inverse_or_zero
from lipkernels.reference.rounding import worst_case_factor

SAVED_PER_WEIGHT = 3  # sigma, u, v
COLUMNS = 32  # of X that one program of write_triplets takes
BY_TILES = {"ROWS": 16, "COLUMNS": 128}  # of a gradient
DECISIONS = 64  # matrices of one program of decide
WARPS = 4

ATTEMPTS = 4
# Of a rounded matrix: a tied norm within eps / 32 for sides up to 2^14, the others to rounding.
SQUARINGS_OF_HALF = {torch.bfloat16: 14, torch.float16: 17}
HALF = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def write_triplets(
    x, sigmas, vectors, sigma_parts, lefts, rights, table, tiles, places, transposed,
    ALIGNED: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    SIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sigma and the vector of the small side, as found, and the other one, X^T u / sigma."""
    t = tl.program_id(0).to(tl.int64)
    p, b = tl.load(tiles + 2 * t).to(tl.int64), tl.load(tiles + 2 * t + 1)
    its = table + p * WIDTH
    m, leading = tl.load(its + 3), tl.load(its + 5) * UNIT
    row, column = tl.arange(0, SIDE), b.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    vector = vectors + tl.load(its + 2) * UNIT + row
    matrix = x + tl.load(its) * UNIT + row[:, None] * leading + column[None, :]
    sums = tl.zeros((SIDE, COLUMNS), tl.float64)
    for at in range(0, m, SIDE):
        sums += tl.load(matrix + at * leading).to(tl.float64) * tl.load(vector + at)[:, None]
    sigma = tl.load(sigmas + p)
    spoiled = sigma * 0.0  # NaN if sigma is
    other = tl.sum(sums, axis=0) * inverse_or_zero(sigma)
    left = part_of(lefts, places, p, 1, 3, ALIGNED)
    right = part_of(rights, places, p, 2, 3, ALIGNED)
    of_small, of_large = left, right
    if tl.load(transposed + p) != 0:
        of_small, of_large = right, left
    tl.store(of_large + column, other + spoiled, mask=column < tl.load(its + 4))
    if b == 0:
        tl.store(part_of(sigma_parts, places, p, 0, 3, ALIGNED), sigma)
        for at in range(0, m, SIDE):
            entries = tl.load(vector + at)
            tl.store(of_small + at + row, entries + spoiled, mask=at + row < m)


@triton.jit
def apply(
    weights, results, table, tiles, places, factors, sigmas,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factor W / sigma, rounded."""
    t = tl.program_id(0).to(tl.int64)
    p, b = tl.load(tiles + 2 * t), tl.load(tiles + 2 * t + 1)
    n, start = tl.load(table + 2 * p), b.to(tl.int64) * BLOCK
    factor = tl.load(factors + p) * inverse_or_zero(tl.load(sigmas + p))
    x = block_at(part_of(weights, places, p, 0, 2, ALIGNED), start, n, BLOCK)
    out = narrowed(x * factor, results.dtype.element_ty)
    write_block(part_of(results, places, p, 1, 2, ALIGNED), start, n, out, BLOCK)


@triton.jit
def round_packed(
    x, rounded, tiles, factors, sigmas, skip,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The same of a packed matrix, in float32. tiles: (matrix, block of the workspace)"""
    t = tl.program_id(0).to(tl.int64)
    p = tl.load(tiles + 2 * t)
    if tl.load(skip + p) == 0:
        at = tl.load(tiles + 2 * t + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        factor = tl.load(factors + p) * inverse_or_zero(tl.load(sigmas + p))
        y = narrowed(tl.load(x + at).to(tl.float64) * factor, DTYPE)
        tl.store(rounded + at, widened(y).to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def decide(
    factors, bounds, scales, worst, skip, n, smaller,
    LAST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The next factor of every matrix whose rounded norm exceeds its scale. NaN does."""
    p = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = p < n
    bound = tl.load(bounds + p, mask=inside, other=0.0)
    scale = tl.load(scales + p, mask=inside, other=1.0)
    factor = tl.load(factors + p, mask=inside, other=1.0)
    good = bound <= scale
    if LAST:
        following = tl.load(worst + p, mask=inside, other=1.0)
    else:
        following = factor * (scale / tl.where(good, 1.0, bound)) * smaller
    tl.store(factors + p, tl.where(good, factor, following), mask=inside)
    tl.store(skip + p, good.to(tl.int32), mask=inside)


# places: Gamma, result, sigma, u, v. tiles: (matrix, block of rows, block of columns)
@triton.jit
def differentiate(
    grads, results, sigmas, lefts, rights, blocks, tiles, sides, places, scales, products, limit,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """scale (Gamma - <Gamma, W> / sigma u v^T) / sigma, saturated."""
    t = tl.program_id(0).to(tl.int64)
    p = tl.load(tiles + 3 * t).to(tl.int64)
    rows, columns = tl.load(sides + 2 * p), tl.load(sides + 2 * p + 1)
    row = tl.load(tiles + 3 * t + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.load(tiles + 3 * t + 2).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inverse = inverse_or_zero(tl.load(part_of(sigmas, places, p, 2, 5, ALIGNED)))
    n, first = tl.load(blocks + 2 * p), tl.load(blocks + 2 * p + 1)
    along = sum_of(products + first, tl.cdiv(n, BLOCK), LANES) * inverse
    u = tl.load(part_of(lefts, places, p, 3, 5, ALIGNED) + row, mask=row < rows, other=0.0)
    v = tl.load(
        part_of(rights, places, p, 4, 5, ALIGNED) + column, mask=column < columns, other=0.0
    )
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    grad = tl.load(part_of(grads, places, p, 0, 5, ALIGNED) + at, mask=inside, other=0.0)
    out = widened(grad) - (along * u)[:, None] * v[None, :]
    out = saturated(out * (inverse * tl.load(scales + p)), limit)
    out = narrowed(out, results.dtype.element_ty)
    tl.store(part_of(results, places, p, 1, 5, ALIGNED) + at, out, mask=inside)


# ------------------------------------------------------------------------------------ launchers
def _triplets(
    weights: Sequence[Tensor], shapes: Group, packed: Tensor, sigmas: Tensor, vectors: Tensor
) -> list[Tensor]:
    """sigma, u and v of every weight, in tensors of their own."""
    saved = []
    for w in weights:
        *batch, rows, cols = w.shape
        for shape in (batch, (*batch, rows), (*batch, cols)):
            saved.append(torch.empty(shape, dtype=torch.float64, device=shapes.device))
    lists = [saved[k::SAVED_PER_WEIGHT] for k in range(SAVED_PER_WEIGHT)]
    places, aligned = shapes.places(*lists)
    tiles = shapes.tiles(
        "spectral columns", lambda m: [(b,) for b in range(-(-m.large // COLUMNS))]
    )
    transposed = shapes.table(
        "spectral transposed", torch.int32, lambda: [(int(m.tall),) for m in shapes.matrices]
    )
    launch(
        write_triplets, len(tiles), packed, sigmas, vectors, *(tensors[0] for tensors in lists),
        norms.tables(shapes).matrices, tiles, places, transposed,
        ALIGNED=aligned, UNIT=ALIGNMENT, WIDTH=norms.COLUMNS_OF_TABLE,
        SIDE=norms.SIDE, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return saved


def _factors_of_half(
    shapes: Group, packed: Tensor, sigmas: Tensor, scales: Tensor, worst: Tensor, dtype: torch.dtype
) -> Tensor:
    """Per matrix, f with |round(f W / sigma)|_2 <= scale; as large as some attempts make it."""
    eps, n = torch.finfo(dtype).eps, len(shapes.matrices)
    factors, bounds = scales.clone(), torch.empty_like(sigmas)
    skip = torch.zeros(n, dtype=torch.int32, device=shapes.device)
    form = packing.layout(shapes, wide=True)
    size = packing.TILE["ROWS"] * packing.TILE["COLUMNS"]

    def blocks() -> list[tuple[int, int]]:
        return [
            (p, start // size + b)
            for p, (start, (rows, columns)) in enumerate(zip(form.starts, form.padded, strict=True))
            for b in range(rows * columns // size)
        ]

    tiles = shapes.table("spectral packed", torch.int32, blocks)
    rounded = torch.empty_like(packed)
    for attempt in range(ATTEMPTS):
        launch(
            round_packed, len(tiles), packed, rounded, tiles, factors, sigmas, skip,
            BLOCK=size, DTYPE=HALF[dtype], num_warps=WARPS,
        )  # fmt: skip
        norms.largest_singular_values(rounded, shapes, skip, bounds, SQUARINGS_OF_HALF[dtype])
        launch(
            decide, -(-n // DECISIONS),
            factors, bounds, scales, worst, skip, n, 1 - eps * 2.0 ** (attempt - 4),
            LAST=attempt == ATTEMPTS - 1, LANES=DECISIONS, num_warps=WARPS,
        )  # fmt: skip
    return factors


def _forward_of_one_format(
    weights: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    shapes = group(weights)
    results = [w.new_empty(w.shape, dtype=dtype) for w in weights]
    places, aligned = shapes.places(weights, results)
    worst = shapes.numbers(
        [k * worst_case_factor(x, k, dtype) for x, k in zip(results, scales, strict=True)]
    )
    n = len(shapes.matrices)
    sigmas = torch.empty(n, dtype=torch.float64, device=shapes.device)
    skip = torch.zeros(n, dtype=torch.int32, device=shapes.device)
    table, tiles = blocks_of(shapes)
    packed = packing.packed(weights, shapes, wide=True)
    vectors = norms.largest_singular_values(packed, shapes, skip, sigmas)
    saved = _triplets(weights, shapes, packed, sigmas, vectors)
    factors = worst
    if dtype in HALF:
        numbers = shapes.numbers(scales)
        factors = _factors_of_half(shapes, packed, sigmas, numbers, worst, dtype)
    launch(
        apply, len(tiles), weights[0], results[0], table, tiles, places, factors, sigmas,
        ALIGNED=aligned, BLOCK=WHOLE["BLOCK"], num_warps=WARPS,
    )  # fmt: skip
    return results, saved


def forward(
    weights: Sequence[Tensor], us: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As ``lipkernels::spectral_normalize``, of weights that are not float64; saves sigma, u, v."""
    weights = [w.contiguous() for w in weights]
    found: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for members in same_formats(weights):
        results, saved = _forward_of_one_format(
            [weights[i] for i in members], [scales[i] for i in members], dtype
        )
        for k, i in enumerate(members):
            found[i] = results[k], saved[SAVED_PER_WEIGHT * k : SAVED_PER_WEIGHT * (k + 1)]
    ordered = [found[i] for i in range(len(weights))]
    new_us = [torch.empty_like(u) for u in us]
    torch._foreach_copy_(new_us, [triplet[1] for _, triplet in ordered])  # pyright: ignore[reportPrivateImportUsage]
    return [result for result, _ in ordered], new_us, [t for _, parts in ordered for t in parts]


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """As ``lipkernels::spectral_normalize_backward``, with what :func:`forward` saved."""
    grads, weights = [g.contiguous() for g in grads], [w.contiguous() for w in weights]
    results = [w.new_empty(w.shape) for w in weights]
    triplets = [saved[k::SAVED_PER_WEIGHT] for k in range(SAVED_PER_WEIGHT)]
    for members in same_formats(weights, grads):
        lists = [[tensors[i] for i in members] for tensors in (grads, results, *triplets)]
        chosen, first = [weights[i] for i in members], [tensors[0] for tensors in lists]
        shapes = group(chosen)
        table, tiles = blocks_of(shapes)
        products = torch.empty(len(tiles), dtype=torch.float64, device=shapes.device)
        squares = torch.empty_like(products)
        numbers = shapes.numbers([scales[i] for i in members])
        sides = shapes.table(
            "spectral sides", torch.int64, lambda of=shapes: [(m.rows, m.cols) for m in of.matrices]
        )
        every = shapes.tiles(
            "spectral tiles",
            lambda m: [
                (i, j)
                for i in range(-(-m.rows // BY_TILES["ROWS"]))
                for j in range(-(-m.cols // BY_TILES["COLUMNS"]))
            ],
        )
        places, aligned = shapes.places(chosen, lists[0])
        launch(
            partial_sums, len(tiles),
            chosen[0], first[0], table, tiles, places, squares, products,
            HAS_GRADS=True, WIDTH=2, ALIGNED=aligned, BLOCK=WHOLE["BLOCK"], num_warps=WARPS,
        )  # fmt: skip
        places, aligned = shapes.places(*lists)
        launch(
            differentiate, len(every),
            *first, table, every, sides, places, numbers, products,
            torch.finfo(chosen[0].dtype).max,
            ALIGNED=aligned, **WHOLE, **BY_TILES, num_warps=WARPS,
        )  # fmt: skip
    return results
