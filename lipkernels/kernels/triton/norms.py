r"""Upper bounds of the largest singular values of a group of matrices, rigorous and tight.

With the Gram matrix G = X X^T of the small side m, B_0 = G and B_{k+1} = (B_k / |B_k|_F)^2,

    beta_k = |G^(2^k)|_F^(1 / 2^k) = prod_j |B_j|_F^(1 / 2^j),
    lambda_max <= beta_k <= lambda_max m^(1 / 2^(k+1)),

and B_k tends to the projector on the top eigenspace, whose largest column is a top eigenvector.
No estimate is trusted, and nothing is asked of the host: a matrix is finished once B_k has rank
one to rounding (|B_k|_F = 1 after a normalization), after about ten squarings for a gap of one
percent, and its programs return at once from then on. Where singular values are tied, all of
SQUARINGS are done; beta is then at most m^(1 / 2^26) too large.

Note [Rounding]
Everything is float64, in which products of float32 numbers are exact. The Gram matrix is off by at
most gamma_n |X|_F^2 <= gamma_n m lambda_max. A square of a matrix of Frobenius norm one is off by
gamma_m, and its largest eigenvalue is at least 1/m: a relative error of m gamma_m, which beta_k has
at the power 1 / 2^(k+1), so that all of them together come to less than one. Normalizations,
symmetrizations and sums of squares are of the order of a single rounding. :func:`_allowance` has
twice the sum of it all. For 512 x 4608 it is 6e-10.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton import packing
from lipkernels.kernels.triton.elements import launch, sum_of
from lipkernels.kernels.triton.group import ALIGNMENT, Group, offsets
from lipkernels.kernels.triton.power import inverse_or_zero

SIDE = packing.TILE["ROWS"]  # of the tiles of G and its powers
DEPTH = 16  # of one product of tiles of powers
PARTS = {"DEPTH": 32, "num_warps": 8}  # of gram_parts; a divisor of the padding of X
SPLIT = 1024  # columns of X that one program of gram_parts sums over, at least
PROGRAMS = 256  # of one matrix in gram_parts, where it has fewer tiles
LANES = 128
SQUARINGS = 25
HISTORY = 32  # numbers kept for each matrix, more than SQUARINGS
RANK_ONE = 1e-12  # 1 - |B|_F^2: the second eigenvalue is 1e-6 of the first, squared once more
WARPS = 4
COLUMNS_OF_TABLE = 8  # of Tables.matrices


# table: offsets / UNIT of X, of its power, of its vector; m, n, leading dimension of X / UNIT;
# first part, first sum of squares.
@triton.jit
def gram_parts(
    x, parts, table, tiles, skip,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of X X^T, summed over some of the columns, the last ones all zeros.

    tiles: (matrix, i, j, its part, first column / UNIT, columns)
    """
    t = tl.program_id(0).to(tl.int64)
    p = tl.load(tiles + 6 * t).to(tl.int64)
    i, j = tl.load(tiles + 6 * t + 1).to(tl.int64), tl.load(tiles + 6 * t + 2).to(tl.int64)
    if tl.load(skip + p) == 0:
        its = table + p * WIDTH
        leading = tl.load(its + 5) * UNIT
        side, depth = tl.arange(0, SIDE), tl.arange(0, DEPTH)
        first = tl.load(tiles + 6 * t + 4) * UNIT
        at = x + tl.load(its) * UNIT + first + side[:, None] * leading + depth[None, :]
        left, right = at + i * SIDE * leading, at + j * SIDE * leading
        tile = tl.zeros((SIDE, SIDE), tl.float64)
        for k in range(0, tl.load(tiles + 6 * t + 5), DEPTH):
            a, b = tl.load(left + k).to(tl.float64), tl.load(right + k).to(tl.float64)
            tile = tl.dot(a, tl.trans(b), tile, out_dtype=tl.float64)
        part = tl.load(its + 6) + tl.load(tiles + 6 * t + 3)
        tl.store(parts + part * (SIDE * SIDE) + side[:, None] * SIDE + side[None, :], tile)


@triton.jit
def _symmetric(tile):
    return 0.5 * (tile + tl.trans(tile))


@triton.jit
def _sum_of_parts(parts, first, n, SIDE: tl.constexpr):
    side = tl.arange(0, SIDE)
    tile = tl.zeros((SIDE, SIDE), tl.float64)
    for s in range(0, n):
        part = parts + (first + s) * (SIDE * SIDE)
        tile += tl.load(part + side[:, None] * SIDE + side[None, :])
    return tile


@triton.jit
def _bound(first, log, allowance):
    """sigma from |G|_F and the logarithm of the other factors; NaN where it is not finite."""
    sigma = tl.sqrt(first * tl.exp(log) * allowance)
    return tl.where(first < float("inf"), sigma, float("nan"))


@triton.jit(do_not_specialize=["squarings"])
def small_tops(
    parts, sigmas, vectors, table, tiles, skip, allowances, squarings,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, RANK_ONE: tl.constexpr,
):  # fmt: skip
    """All that follows, for a matrix whose small side is one tile. tiles: (matrix, parts)"""
    t = tl.program_id(0).to(tl.int64)
    p = tl.load(tiles + 2 * t).to(tl.int64)
    if tl.load(skip + p) == 0:
        its = table + p * WIDTH
        tile = _symmetric(_sum_of_parts(parts, tl.load(its + 6), tl.load(tiles + 2 * t + 1), SIDE))
        first = tl.sqrt(tl.sum(tile * tile))
        tile *= inverse_or_zero(first)
        log, weight = first * 0.0, 0.25
        spread = tl.where(first > 0.0, 1.0, 0.0).to(
            tl.float64
        )  # nothing to do for zero and for NaN
        k = 0
        while (k < squarings) & (spread > RANK_ONE):
            tile = _symmetric(tl.dot(tile, tile, out_dtype=tl.float64))
            squares = tl.sum(tile * tile)
            log += weight * tl.log(squares)
            tile *= 1.0 / tl.sqrt(squares)
            spread = 1.0 - squares
            weight *= 0.5
            k += 1
        tl.store(sigmas + p, _bound(first, log, tl.load(allowances + p)))
        side = tl.arange(0, SIDE)
        diagonal = tl.sum(tl.where(side[:, None] == side[None, :], tile, 0.0), axis=1)
        # Where a NaN has spoiled all of it: column 0. The largest of nothing but NaN is no column.
        top = tl.argmax(tl.where(diagonal == diagonal, diagonal, -1.0), axis=0)
        column = tl.sum(tl.where(side[None, :] == top, tile, 0.0), axis=1)
        norm = tl.sqrt(tl.sum(column * column))
        vector = column * inverse_or_zero(norm)
        vector = tl.where(side == 0, tl.where(norm == 0.0, 1.0, vector), vector)
        tl.store(vectors + tl.load(its + 2) * UNIT + side, vector)


@triton.jit
def _write_symmetric(matrix, leading, tile, i, j, SIDE: tl.constexpr):
    """The tile and its mirror image; the weight of its squares in the matrix's."""
    side = tl.arange(0, SIDE)
    at = matrix + side[:, None] * leading + side[None, :]
    tl.store(at + i * SIDE * leading + j * SIDE, tile)
    if i != j:
        tl.store(at + j * SIDE * leading + i * SIDE, tl.trans(tile))


@triton.jit
def gram_sums(
    parts, powers, squares, table, tiles, skip,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """B_0 = G from its parts, and its sums of squares. tiles: (matrix, i, j, number, parts)"""
    t = tl.program_id(0).to(tl.int64)
    p = tl.load(tiles + 5 * t).to(tl.int64)
    i, j = tl.load(tiles + 5 * t + 1).to(tl.int64), tl.load(tiles + 5 * t + 2).to(tl.int64)
    number, n = tl.load(tiles + 5 * t + 3), tl.load(tiles + 5 * t + 4)
    if tl.load(skip + p) == 0:
        its = table + p * WIDTH
        tile = _sum_of_parts(parts, tl.load(its + 6) + number * n, n, SIDE)
        weight = 2.0
        if i == j:
            tile = _symmetric(tile)
            weight = 1.0
        leading = tl.cdiv(tl.load(its + 3), SIDE) * SIDE
        _write_symmetric(powers + tl.load(its + 1) * UNIT, leading, tile, i, j, SIDE)
        tl.store(squares + tl.load(its + 7) + number, weight * tl.sum(tile * tile))


@triton.jit(do_not_specialize=["k"])
def square(
    powers, results, squares, new_squares, history, done, table, tiles, skip, k,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
    LANES: tl.constexpr, HISTORY: tl.constexpr, RANK_ONE: tl.constexpr,
):  # fmt: skip
    """One tile of B_{k+1} = (B_k / |B_k|_F)^2. done: 1 + the k at which a matrix was finished."""
    t = tl.program_id(0).to(tl.int64)
    p = tl.load(tiles + 5 * t).to(tl.int64)
    i, j = tl.load(tiles + 5 * t + 1).to(tl.int64), tl.load(tiles + 5 * t + 2).to(tl.int64)
    number = tl.load(tiles + 5 * t + 3)
    if (tl.load(skip + p) == 0) & (tl.load(done + p) == 0):
        its = table + p * WIDTH
        n_tiles = tl.cdiv(tl.load(its + 3), SIDE)
        total = sum_of(squares + tl.load(its + 7), n_tiles * (n_tiles + 1) // 2, LANES)
        # Every program of a matrix comes to the same decision; the first one tells the next launch.
        going = (total > 0.0) & ((k == 0) | (1.0 - total > RANK_ONE))
        if number == 0:
            tl.store(history + p * HISTORY + k, total)
            if going == 0:
                tl.store(done + p, k + 1)
        if going:
            side, depth = tl.arange(0, SIDE), tl.arange(0, DEPTH)
            leading = n_tiles * SIDE
            start = tl.load(its + 1) * UNIT
            at = powers + start + side[:, None] * leading + depth[None, :]
            left, right = at + i * SIDE * leading, at + j * SIDE * leading
            tile = tl.zeros((SIDE, SIDE), tl.float64)
            for at_k in range(0, leading, DEPTH):
                a, b = tl.load(left + at_k), tl.load(right + at_k)
                tile = tl.dot(a, tl.trans(b), tile, out_dtype=tl.float64)
            tile *= 1.0 / total
            weight = 2.0
            if i == j:
                tile = _symmetric(tile)
                weight = 1.0
            _write_symmetric(results + start, leading, tile, i, j, SIDE)
            tl.store(new_squares + tl.load(its + 7) + number, weight * tl.sum(tile * tile))


@triton.jit(do_not_specialize=["squarings"])
def tops(
    even, odd, even_squares, odd_squares, sigmas, vectors, history, done, table, tiles, skip,
    allowances, squarings,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr, LANES: tl.constexpr,
    HISTORY: tl.constexpr,
):  # fmt: skip
    """The bound, and the largest column of the last power. tiles: (matrix,)"""
    p = tl.load(tiles + tl.program_id(0)).to(tl.int64)
    if tl.load(skip + p) == 0:
        its = table + p * WIDTH
        m = tl.load(its + 3)
        n_tiles = tl.cdiv(m, SIDE)
        leading = n_tiles * SIDE
        last = tl.load(done + p) - 1
        if last < 0:
            last = squarings
        matrix, squares = even, even_squares
        if last % 2 == 1:
            matrix, squares = odd, odd_squares
        matrix += tl.load(its + 1) * UNIT
        total = sum_of(squares + tl.load(its + 7), n_tiles * (n_tiles + 1) // 2, LANES)
        k = tl.arange(0, HISTORY)
        # The last one is not in the history if the squarings ran out; it is the same number if so.
        sums = tl.load(history + p * HISTORY + k, mask=k < last, other=1.0)
        sums = tl.where(k == last, total, sums)
        first = tl.sqrt(tl.sum(tl.where(k == 0, sums, 0.0)))
        logs = tl.where((k > 0) & (sums > 0.0), tl.log(tl.where(sums > 0.0, sums, 1.0)), 0.0)
        log = tl.sum(logs * tl.exp2(-1.0 - k.to(tl.float64)))
        spoiled = tl.sum(tl.where(sums == sums, 0, 1)) > 0
        first = tl.where(spoiled, float("nan"), first)
        tl.store(sigmas + p, _bound(first, log, tl.load(allowances + p)))

        lane = tl.arange(0, LANES)
        largest = tl.full((LANES,), -1.0, tl.float64)
        where = tl.zeros((LANES,), tl.int64)
        for at in range(0, m, LANES):
            inside = at + lane < m
            x = tl.load(matrix + (at + lane) * (leading + 1), mask=inside, other=-1.0)
            where = tl.where(x > largest, at + lane, where)
            largest = tl.maximum(largest, x)
        best = tl.max(largest)
        top = tl.min(tl.where(largest == best, where, m - 1))
        row = matrix + top * leading
        squares_of_row = tl.zeros((LANES,), tl.float64)
        for at in range(0, m, LANES):
            x = tl.load(row + at + lane, mask=at + lane < m, other=0.0)
            squares_of_row += x * x
        norm = tl.sqrt(tl.sum(squares_of_row))
        inverse = inverse_or_zero(norm)
        for at in range(0, leading, LANES):
            inside = at + lane < leading
            x = tl.load(row + at + lane, mask=inside, other=0.0) * inverse
            x = tl.where(at + lane == 0, tl.where(norm == 0.0, 1.0, x), x)
            tl.store(vectors + tl.load(its + 2) * UNIT + at + lane, x, mask=inside)


# ------------------------------------------------------------------------------------- launcher
class Sizes(NamedTuple):
    """Of every matrix of a group, and of the workspaces for them all."""

    sides: tuple[tuple[int, int], ...]
    splits: tuple[int, ...]
    powers: tuple[int, ...]  # where they begin; small sides of one tile have none
    vectors: tuple[int, ...]
    first_parts: tuple[int, ...]
    first_squares: tuple[int, ...]
    small: tuple[int, ...]  # positions of the matrices whose small side is one tile
    large: tuple[int, ...]  # and of the others
    n_parts: int
    n_powers: int
    n_squares: int
    n_vectors: int


class Tables(NamedTuple):
    """On the device; ``None`` where there is nothing to do."""

    matrices: Tensor
    allowances: Tensor
    parts: Tensor
    small: Tensor | None
    tiles: Tensor | None
    large: Tensor | None


def _allowance(m: int, n: int) -> float:
    return 1.0 + 2.0**-52 * (m * (n + 16) + m * (m + 16) + 64)


def _triangle(m: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(-(-m // SIDE)) for j in range(i + 1)]


def sizes(shapes: Group) -> Sizes:
    """Of the wide matrices of a group, packed (see `packing`)."""
    form = packing.layout(shapes, wide=True)

    def build(_: Sequence[object]) -> Sizes:
        sides = form.sides
        counts = [len(_triangle(m)) for m, _ in sides]
        splits = tuple(
            max(1, min(-(-n // SPLIT), PROGRAMS // count))
            for (_, n), count in zip(sides, counts, strict=True)
        )
        part_counts = [c * s for c, s in zip(counts, splits, strict=True)]
        powers, n_powers = offsets([rows**2 if rows > SIDE else 0 for rows, _ in form.padded])
        vectors, n_vectors = offsets([rows for rows, _ in form.padded])
        positions = range(len(sides))
        return Sizes(
            sides,
            splits,
            tuple(powers),
            tuple(vectors),
            (0, *itertools.accumulate(part_counts)),
            (0, *itertools.accumulate(counts)),
            tuple(p for p in positions if sides[p][0] <= SIDE),
            tuple(p for p in positions if sides[p][0] > SIDE),
            sum(part_counts),
            n_powers,
            sum(counts),
            n_vectors,
        )

    return shapes.plan("norms", build)


def tables(shapes: Group) -> Tables:
    """The tables of the kernels here."""
    size, form = sizes(shapes), packing.layout(shapes, wide=True)

    def matrices() -> list[tuple[int, ...]]:
        return [
            (
                form.starts[p] // ALIGNMENT,
                size.powers[p] // ALIGNMENT,
                size.vectors[p] // ALIGNMENT,
                *sides,
                form.padded[p][1] // ALIGNMENT,
                size.first_parts[p],
                size.first_squares[p],
            )
            for p, sides in enumerate(size.sides)
        ]

    def parts() -> list[tuple[int, ...]]:
        found = []
        for p, ((m, n), splits) in enumerate(zip(size.sides, size.splits, strict=True)):
            depth = PARTS["DEPTH"]
            steps = -(-n // depth)
            ends = [steps * s // splits * depth for s in range(splits + 1)]
            for number, (i, j) in enumerate(_triangle(m)):
                for s, (first, end) in enumerate(itertools.pairwise(ends)):
                    part = number * splits + s
                    found.append((p, i, j, part, first // ALIGNMENT, end - first))
        return found

    def tiles() -> list[tuple[int, ...]]:
        return [
            (p, i, j, number, size.splits[p])
            for p in size.large
            for number, (i, j) in enumerate(_triangle(size.sides[p][0]))
        ]

    def allowances() -> list[tuple[float]]:
        return [(_allowance(m, n),) for m, n in size.sides]

    def small() -> list[tuple[int, int]]:
        return [(p, size.splits[p]) for p in size.small]

    def large() -> list[tuple[int]]:
        return [(p,) for p in size.large]

    int32 = torch.int32
    return Tables(
        shapes.table("norms", torch.int64, matrices),
        shapes.table("norms", torch.float64, allowances),
        shapes.table("norms parts", int32, parts),
        shapes.table("norms small", int32, small) if size.small else None,
        shapes.table("norms tiles", int32, tiles) if size.large else None,
        shapes.table("norms large", int32, large) if size.large else None,
    )


def largest_singular_values(
    packed: Tensor, shapes: Group, skip: Tensor, sigmas: Tensor, squarings: int = SQUARINGS
) -> Tensor:
    """Writes upper bounds into ``sigmas``, and returns the workspace of the top vectors.

    ``packed`` holds the wide matrices. Those whose entry in ``skip`` (int32) is not zero keep what
    they have in ``sigmas``. ``squarings``: at most this many.
    """
    on, size = tables(shapes), sizes(shapes)
    device = shapes.device
    kind = {"dtype": torch.float64, "device": device}
    parts = torch.empty(size.n_parts * SIDE * SIDE, **kind)
    vectors = torch.empty(size.n_vectors, **kind)
    settings = {"UNIT": ALIGNMENT, "WIDTH": COLUMNS_OF_TABLE, "SIDE": SIDE, "num_warps": WARPS}
    launch(
        gram_parts, len(on.parts), packed, parts, on.matrices, on.parts, skip,
        **{**settings, **PARTS},
    )  # fmt: skip
    if on.small is not None:
        launch(
            small_tops, len(on.small),
            parts, sigmas, vectors, on.matrices, on.small, skip, on.allowances, squarings,
            RANK_ONE=RANK_ONE, **settings,
        )  # fmt: skip
    if on.tiles is None or on.large is None:
        return vectors
    powers = [torch.empty(size.n_powers, **kind) for _ in range(2)]
    squares = [torch.empty(size.n_squares, **kind) for _ in range(2)]
    history = torch.empty(len(shapes.matrices) * HISTORY, **kind)
    done = torch.zeros(len(shapes.matrices), dtype=torch.int32, device=device)
    launch(
        gram_sums, len(on.tiles), parts, powers[0], squares[0], on.matrices, on.tiles, skip,
        **settings,
    )  # fmt: skip
    for k in range(squarings):
        here, there = k % 2, 1 - k % 2
        launch(
            square, len(on.tiles),
            powers[here], powers[there], squares[here], squares[there],
            history, done, on.matrices, on.tiles, skip, k,
            DEPTH=DEPTH, LANES=LANES, HISTORY=HISTORY, RANK_ONE=RANK_ONE, **settings,
        )  # fmt: skip
    launch(
        tops, len(on.large),
        *powers, *squares, sigmas, vectors, history, done, on.matrices, on.large, skip,
        on.allowances, squarings, LANES=LANES, HISTORY=HISTORY, **settings,
    )  # fmt: skip
    return vectors
