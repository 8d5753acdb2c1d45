"""The named Bjorck iteration of every weight of a group, and its exact gradient.

    X_0 = W / sigma_max(W),    X_{k+1} = X_k + beta E_k X_k,    E_k = I - X_k X_k^T

two launches a step. sigma_max is that of `lipkernels.kernels.triton.spectral`: never too small. A
weight whose step would change it by at most ``tol`` keeps what it has; it is told so by the launch
after that step, which reads what the step has summed, and its programs return at once from then on.

Gradient, with S_k = Gamma_{k+1} X_k^T + X_k Gamma_{k+1}^T:

    Gamma_k = Gamma_{k+1} + beta (E_k Gamma_{k+1} - S_k X_k)

Backward repeats the iteration, keeps every X_k and E_k in a workspace while it runs, and goes back
through them: two launches a step again.
"""

# A call of a Triton function has no type; pyright takes those that return tuples for endless.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipkernels.kernels.triton import planes, spectral
from lipkernels.kernels.triton.elements import launch, part_of
from lipkernels.kernels.triton.group import Group, Matrix, group
from lipkernels.kernels.triton.half import rounded_within
from lipkernels.kernels.triton.planes import (
    SCALE,
    load_planes,
    raw_block,
    store_planes,
    store_raw_block,
    store_symmetric,
    to_unit_magnitude,
)
from lipkernels.kernels.triton.products import (
    B,
    add_a_b,
    add_a_bt,
    identity,
    tiling,
)
from lipkernels.kernels.triton.workspace import (
    LANES,
    Layout,
    is_tall,
    largest,
    layout,
    lower_blocks,
    maxima_blocks,
    sides,
    square_at,
    sum_of_blocks,
    wide_at,
    wide_blocks,
)
from lipkernels.reference.rounding import worst_case_factor

_UNSCALE = tl.constexpr(1.0 / (128.0 * 128.0))
# Gamma, of Frobenius norm at most two, grows by (1 + beta)^n at most: 875 after 15 steps of 1/2.
_GAMMA_SCALE, _S_SCALE = tl.constexpr(32.0), tl.constexpr(16.0)
GRAM_STAGES = 2  # of its loop: with a third sm_80 has too few registers
_OWN_MARGIN = 1.0 - 2.0**-21  # for what planes round, beyond what the worst-case factor allows for


# steps: after each step, for each matrix, twice the steps that it took, and one where it stopped
@triton.jit
def _steps_taken(
    table, batches, sums, p, tol, before, FIRST: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr
):
    """The state of matrix ``p`` after one more step: it stops where all of its batch would."""
    if FIRST:
        taken = 0
    else:
        taken = tl.load(before + p)
        if (taken & 1) == 0:
            moved = 0
            first, last = tl.load(batches + 2 * p), tl.load(batches + 2 * p + 1)
            for q in range(first, last):
                m, n, _, _ = sides(table, q)
                change = tl.sqrt(sum_of_blocks(table, sums, q, m, n, B, LANES))
                moved += tl.where(change > tol, 1, 0)
            stopped = (tol > 0) & (moved == 0)
            taken = tl.where(stopped, taken + 1, taken + 2)
    return taken


@triton.jit
def pack(weights, table, tiles, places, hi, lo, ALIGNED: tl.constexpr, B: tl.constexpr):
    """X_0."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, _, ldn = sides(table, p)
    x = raw_block(part_of(weights, places, p, 0, 1, ALIGNED), i, j, m, n, is_tall(table, p), B)
    store_planes(hi, lo, wide_at(table, p, m, ldn, 0), i, j, m, ldn, SCALE, x, B, B)


@triton.jit
def gram(
    table, tiles, batches, hi, lo, sums, before, after, tol, x_slot, e_slot, FIRST: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """E = I - X X^T, unless the step before was the last."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    taken = _steps_taken(table, batches, sums, p, tol, before, FIRST, B, LANES)
    if i == 0:
        tl.store(after + p, taken)
    if (taken & 1) != 0:
        return
    m, _, ldm, ldn = sides(table, p)
    x = wide_at(table, p, m, ldn, x_slot)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, x, x, i, j, m, m, ldn, B, BK, DESCRIPTORS)
    e = identity(i, j, m, B) - acc * _UNSCALE
    store_symmetric(hi, lo, square_at(table, p, m, ldm, e_slot), i, j, m, ldm, SCALE, e, B)


@triton.jit
def step(
    table, tiles, hi, lo, sums, state, beta, x_slot, e_slot, out_slot,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """X + beta E X."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    if (tl.load(state + p) & 1) != 0:
        return
    m, _, ldm, ldn = sides(table, p)
    x, e = wide_at(table, p, m, ldn, x_slot), square_at(table, p, m, ldm, e_slot)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_b(acc, hi, lo, e, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS) * _UNSCALE * beta
    tl.store(sums + t, tl.sum(tl.sum(acc * acc, 1), 0))
    acc += load_planes(hi, lo, x, i, j, m, ldn, SCALE, B, B)
    store_planes(hi, lo, wide_at(table, p, m, ldn, out_slot), i, j, m, ldn, SCALE, acc, B, B)


@triton.jit
def finish(
    results, table, tiles, places, multipliers, batches, hi, lo, sums, before, tol,
    FIRST: tl.constexpr, ALIGNED: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The last X that was taken, in one of two slots, times a multiplier."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    slot = (_steps_taken(table, batches, sums, p, tol, before, FIRST, B, LANES) >> 1) & 1
    m, n, _, ldn = sides(table, p)
    x = load_planes(hi, lo, wide_at(table, p, m, ldn, slot), i, j, m, ldn, SCALE, B, B)
    x *= tl.load(multipliers + p).to(tl.float32)
    base = part_of(results, places, p, 0, 1, ALIGNED)
    store_raw_block(base, i, j, m, n, is_tall(table, p), x, B)


@triton.jit
def pack_gradient(
    grads, table, tiles, places, batches, maxima, hi, lo, sums, before, after, units, tol, slot,
    FIRST: tl.constexpr, ALIGNED: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gamma / unit, of Frobenius norm at most two; and how many steps were taken in all."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, _, ldn = sides(table, p)
    bits = largest(table, maxima, p, LANES)
    x = raw_block(part_of(grads, places, p, 0, 1, ALIGNED), i, j, m, n, is_tall(table, p), B)
    x, unit = to_unit_magnitude(x, bits)
    root = tl.sqrt(m.to(tl.float32) * n.to(tl.float32))
    out = wide_at(table, p, m, ldn, slot)
    store_planes(hi, lo, out, i, j, m, ldn, _GAMMA_SCALE, x / root, B, B)
    taken = _steps_taken(table, batches, sums, p, tol, before, FIRST, B, LANES)
    if (i == 0) & (j == 0):
        tl.store(units + p, tl.where(bits < 0x7F800000, unit * root, float("nan")))
        tl.store(after + p, taken >> 1)


@triton.jit
def across(
    table, tiles, hi, lo, taken, k, slot, s_slot,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """S_k; Gamma is in ``slot`` and the next one, in turns."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    left = tl.load(taken + p) - 1 - k
    if left < 0:
        return
    m, _, ldm, ldn = sides(table, p)
    g, x = wide_at(table, p, m, ldn, slot + (left & 1)), wide_at(table, p, m, ldn, k)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, g, x, i, j, m, m, ldn, B, BK, DESCRIPTORS)
    acc = add_a_bt(acc, hi, lo, x, g, i, j, m, m, ldn, B, BK, DESCRIPTORS)
    acc *= 1.0 / (_GAMMA_SCALE * SCALE)
    s = square_at(table, p, m, ldm, s_slot)
    store_symmetric(hi, lo, s, i, j, m, ldm, _S_SCALE, acc, B)


@triton.jit
def step_back(
    table, tiles, hi, lo, taken, beta, k, slot, s_slot,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Gamma + beta (E Gamma - S X)."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    left = tl.load(taken + p) - 1 - k
    if left < 0:
        return
    m, _, ldm, ldn = sides(table, p)
    g, x = wide_at(table, p, m, ldn, slot + (left & 1)), wide_at(table, p, m, ldn, k)
    e, s = square_at(table, p, m, ldm, k), square_at(table, p, m, ldm, s_slot)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_b(acc, hi, lo, e, g, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
    acc *= -_S_SCALE / _GAMMA_SCALE
    acc = add_a_b(acc, hi, lo, s, x, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
    acc *= -beta / (_S_SCALE * SCALE)
    acc += load_planes(hi, lo, g, i, j, m, ldn, _GAMMA_SCALE, B, B)
    out = wide_at(table, p, m, ldn, slot + 1 - (left & 1))
    store_planes(hi, lo, out, i, j, m, ldn, _GAMMA_SCALE, acc, B, B)


@triton.jit
def finish_gradient(
    out, table, tiles, places, scales, hi, lo, taken, units, slot,
    ALIGNED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """dL/dX_0, times the scale."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, _, ldn = sides(table, p)
    g = wide_at(table, p, m, ldn, slot + (tl.load(taken + p) & 1))
    x = load_planes(hi, lo, g, i, j, m, ldn, _GAMMA_SCALE, B, B)
    x *= tl.load(units + p) * tl.load(scales + p).to(tl.float32)
    store_raw_block(part_of(out, places, p, 0, 1, ALIGNED), i, j, m, n, is_tall(table, p), x, B)


# ----------------------------------------------------------------------------------- the launches
def _layout(n_wide: int, n_squares: int, matrices: tuple[Matrix, ...]) -> Layout:
    return layout(matrices, n_wide, n_squares)


class _Iteration:
    """X_0 .. X_n of a group of normalized float32 weights, in ``ring`` slots that take turns."""

    def __init__(
        self, x: list[Tensor], beta: float, n_iter: int, tol: float, n_wide: int, n_squares: int
    ):
        self.shapes: Group = group(x)
        device = self.shapes.device
        key = ("bjorck", n_wide, n_squares)
        self.layout: Layout = self.shapes.plan(key, functools.partial(_layout, n_wide, n_squares))
        self.table = self.shapes.table(key, torch.int64, lambda: self.layout.rows)
        self.batches = self.shapes.table("batches", torch.int32, self._batches)
        self.beta, self.n_iter, self.tol = beta, n_iter, tol
        self.n = len(self.shapes.matrices)
        self.hi, self.lo = torch.empty((2, self.layout.size), dtype=torch.float16, device=device)
        self.sums = torch.empty(self.layout.n_blocks, dtype=torch.float32, device=device)
        self.state = torch.empty((n_iter + 2, self.n), dtype=torch.int32, device=device)
        product = tiling(device)
        self.built = product.constants | product.options
        self.wide = self.shapes.tiles("wide blocks", wide_blocks)
        self.lower = self.shapes.tiles("lower blocks", lower_blocks)
        places, aligned = self.shapes.places(x)
        launch(
            pack, len(self.wide), x[0], self.table, self.wide, places, self.hi, self.lo,
            ALIGNED=aligned, B=B, num_warps=planes.WARPS,
        )  # fmt: skip

    def _batches(self) -> list[tuple[int, int]]:
        """First and last + 1 matrix of the batch that each matrix is of."""
        rows, first = [], 0
        for n in self.shapes.batches:
            rows += [(first, first + n)] * n
            first += n
        return rows

    def run(self, ring: int, squares: int) -> None:
        """The iteration, X_k in slot k mod ``ring`` and E_k in k mod ``squares``."""
        for k in range(self.n_iter):
            x, e, following = k % ring, k % squares, (k + 1) % ring
            launch(
                gram, len(self.lower), self.table, self.lower, self.batches, self.hi, self.lo,
                self.sums, self.state[max(k - 1, 0)], self.state[k], self.tol, x, e,
                FIRST=k == 0, LANES=LANES, **self.built | {"num_stages": GRAM_STAGES},
            )  # fmt: skip
            launch(
                step, len(self.wide), self.table, self.wide, self.hi, self.lo, self.sums,
                self.state[k], self.beta, x, e, following, **self.built,
            )  # fmt: skip

    @property
    def last_state(self) -> Tensor:
        return self.state[max(self.n_iter - 1, 0)]


def forward(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    scales: Sequence[float],
    dtype: torch.dtype,
    beta: float,
    n_iter: int,
    tol: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """As ``lipkernels::bjorck``, for weights that are not float64."""
    x, new_us, saved = spectral.forward(weights, us, [1.0] * len(weights), torch.float32)
    narrow = dtype != torch.float32
    multipliers = [
        _OWN_MARGIN if narrow else scale * worst_case_factor(one, scale, dtype) * _OWN_MARGIN
        for one, scale in zip(x, scales, strict=True)
    ]
    results = [torch.empty_like(one) for one in x]
    iteration = _Iteration(x, beta, n_iter, tol, n_wide=2, n_squares=1)
    iteration.run(ring=2, squares=1)
    places, aligned = iteration.shapes.places(results)
    launch(
        finish, len(iteration.wide), results[0], iteration.table, iteration.wide, places,
        iteration.shapes.numbers(multipliers), iteration.batches, iteration.hi, iteration.lo,
        iteration.sums, iteration.last_state, tol,
        FIRST=n_iter == 0, ALIGNED=aligned, B=B, LANES=LANES, num_warps=planes.WARPS,
    )  # fmt: skip
    return (rounded_within(results, scales, dtype) if narrow else results), new_us, saved


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    scales: Sequence[float],
    beta: float,
    n_iter: int,
    tol: float,
) -> list[Tensor]:
    """As ``lipkernels::bjorck_backward``, for weights that are not float64."""
    us = [u.to(torch.float32) for u in saved[1 :: spectral.SAVED_PER_WEIGHT]]
    x, _, _ = spectral.forward(weights, us, [1.0] * len(weights), torch.float32)
    grads = [g.float().contiguous() for g in grads]
    out = [torch.empty_like(g) for g in grads]
    slot = n_iter + 1  # of Gamma, after X_0 .. X_n
    it = _Iteration(x, beta, n_iter, tol, n_wide=n_iter + 3, n_squares=n_iter + 1)
    it.run(ring=n_iter + 1, squares=n_iter + 1)
    shapes, device = it.shapes, it.shapes.device
    maxima = torch.empty(it.layout.n_maxima, dtype=torch.int32, device=device)
    units = torch.empty(it.n, dtype=torch.float32, device=device)
    entries = shapes.table(
        "entries", torch.int64, lambda: [(a.rows * a.cols,) for a in shapes.matrices]
    )
    places, aligned = shapes.places(grads)
    tiles, taken = shapes.tiles("maxima", maxima_blocks), it.state[n_iter + 1]
    launch(
        planes.magnitudes, len(tiles), grads[0], tiles, places, entries, maxima,
        WIDTH=1, ALIGNED=aligned, BLOCK=planes.BLOCK, num_warps=planes.WARPS,
    )  # fmt: skip
    launch(
        pack_gradient, len(it.wide), grads[0], it.table, it.wide, places, it.batches, maxima,
        it.hi, it.lo, it.sums, it.last_state, taken, units, tol, slot,
        FIRST=n_iter == 0, ALIGNED=aligned, B=B, LANES=LANES, num_warps=planes.WARPS,
    )  # fmt: skip
    for k in reversed(range(n_iter)):
        common = (it.hi, it.lo, taken)
        launch(across, len(it.lower), it.table, it.lower, *common, k, slot, n_iter, **it.built)
        launch(
            step_back, len(it.wide), it.table, it.wide, *common, beta, k, slot, n_iter,
            **it.built,
        )  # fmt: skip
    places, aligned = shapes.places(out)
    launch(
        finish_gradient, len(it.wide), out[0], it.table, it.wide, places,
        shapes.numbers(scales), it.hi, it.lo, taken, units, slot,
        ALIGNED=aligned, B=B, num_warps=planes.WARPS,
    )  # fmt: skip
    return spectral.backward(out, weights, saved, [1.0] * len(weights))
