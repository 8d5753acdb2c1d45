"""The polar factor of every weight of a group, by matrix products alone: 31 launches.

    X <- z_k(X X^T) X,  Z <- z_k Z      up to STEPS times: see `schedule` for the polynomials
    X <- X + 1/2 E X,   E = I - X X^T   twice: polishing, in a form that rounding does not harm

from X = W / s, s^2 >= lambda_max(W W^T) rigorously, and Z = I. X ends as U, and Z as s P^-1. Each
step starts from the exact X X^T of what the one before left, so errors in the direction of U grow
with the condition number of W, not with its square. Every matrix has its own state on the device: a
row of numbers that says which of its buffers is current and whether it is done. The host launches
the same sequence for any weights; programs of matrices that are done return at once.

A step is four launches: E (`gram`), E^2 (`square`), z (`polynomial`: the powers E^3 and E^4 are
products of E and E^2) and X, Z (`apply`). The first one has a fifth, since s is known only when two
of its products are there: with G = W W^T / |W|_F^2, whose trace is one, and mu = 1/m,

    s^2 = min(|G|_F, mu + |(G - mu I)^2|_F^(1/2)) |W|_F^2,

which is within 1% to 46% of the largest eigenvalue.

What sums over a matrix need is added up by the programs of the next launch, each for itself, always
in the same order: no atomics, and equal inputs give equal bits.

Note [Fast]
With ``fast`` the steps, not the polishing, read the upper plane of a factor alone: E, E^2 and z,
which are symmetric, have 11 bits, and what is multiplied by z keeps its 22. For W = P U the step
then leaves (z + D) P U with a symmetric D, |D|_2 about 1e-3, instead of z P U. In P's eigenvectors
the direction changes by

    D_ij (p_j - p_i) / (z_i p_i + z_j p_j)  <=  |D_ij| / min z,

whatever the condition number of W is; a rounding of X would be divided by the smallest p. Singular
values that are off are put right by the next steps and the polishing.

The polynomials of these steps have 2% of room (see `schedule`). Roundings that conspire could still
push a singular value beyond it, from where the next step takes it anywhere. So the polishing
measures what it was given, and shrinks what is not certainly within its reach (see
`polar_finish`): the bound of the result does not depend on the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipkernels.kernels.triton import planes, schedule
from lipkernels.kernels.triton.elements import launch
from lipkernels.kernels.triton.group import Group, Matrix, group
from lipkernels.kernels.triton.half import rounded_within
from lipkernels.kernels.triton.polar_finish import finish, last_gram, polish
from lipkernels.kernels.triton.polar_start import center, first_gram, first_square, pack
from lipkernels.kernels.triton.polar_state import N_SQUARES, N_SUMS, N_WIDE
from lipkernels.kernels.triton.polar_step import apply, gram, polynomial, square
from lipkernels.kernels.triton.products import B, Tiling, tiling
from lipkernels.kernels.triton.workspace import (
    LANES,
    Layout,
    layout,
    lower_blocks,
    maxima_blocks,
    of_kind,
    square_blocks,
    wide_blocks,
)
from lipkernels.reference.rounding import worst_case_factor

_OWN_MARGIN = 1.0 - 2.0**-22  # for roundings of these kernels beyond those of the worst-case factor


def _layout(matrices: tuple[Matrix, ...]) -> Layout:
    return layout(matrices, n_wide=N_WIDE, n_squares=N_SQUARES)


class _Forward:
    """The launches of one group, all float32 results, in order."""

    def __init__(
        self,
        weights: list[Tensor],
        outputs: list[list[Tensor]],
        multipliers: list[float],
        fast: bool,
    ):
        self.fast = fast
        self.shapes: Group = group(weights)
        device = self.shapes.device
        self.layout: Layout = self.shapes.plan("polar", _layout)
        self.kept = weights  # copies among them, which must outlive the launches
        self.weights, self.outputs = weights[0], [part[0] for part in outputs]
        self.table = self.shapes.table("polar", torch.int64, lambda: self.layout.rows)
        self.places, self.aligned = self.shapes.places(weights)
        self.to, self.to_aligned = self.shapes.places(*outputs)
        self.multipliers = self.shapes.numbers(multipliers)
        self.n = len(self.shapes.matrices)
        self.hi, self.lo = torch.empty((2, self.layout.size), dtype=torch.float16, device=device)
        self.state = torch.empty((schedule.STEPS + 2, self.n), dtype=torch.int32, device=device)
        self.units = torch.empty(2 * self.n, dtype=torch.float32, device=device)
        self.norms = torch.empty(2 * self.n, dtype=torch.float32, device=device)
        self.sums = torch.empty(N_SUMS * self.layout.n_lower, dtype=torch.float32, device=device)
        self.squares = torch.empty(3 * self.layout.n_blocks, dtype=torch.float32, device=device)
        self.product: Tiling = tiling(device)

    def _start(self) -> None:
        shapes, layout, device = self.shapes, self.layout, self.shapes.device
        maxima = torch.empty(layout.n_maxima, dtype=torch.int32, device=device)
        numbers = shapes.table(
            "entries", torch.int64, lambda: [(a.rows * a.cols,) for a in shapes.matrices]
        )
        tiles = shapes.tiles("maxima", maxima_blocks)
        launch(
            planes.magnitudes, len(tiles),
            self.weights, tiles, self.places, numbers, maxima,
            WIDTH=1, ALIGNED=self.aligned, BLOCK=planes.BLOCK, num_warps=planes.WARPS,
        )  # fmt: skip
        tiles = shapes.tiles("wide blocks", wide_blocks)
        launch(
            pack, len(tiles),
            self.weights, self.table, tiles, self.places, maxima, self.hi, self.lo, self.units,
            self.squares, self.n,
            WIDTH=1, ALIGNED=self.aligned, B=B, LANES=LANES, num_warps=planes.WARPS,
        )  # fmt: skip
        tiles, product = self._lower(), self.product
        grid, common = len(tiles), (self.table, tiles, self.hi, self.lo)
        launch(
            first_gram, grid,
            *common, self.squares, self.norms, self.sums, layout.n_lower,
            FAST=self.fast, LANES=LANES, **product.constants, **product.options,
        )  # fmt: skip
        launch(
            first_square, grid,
            *common, self.sums, layout.n_lower,
            FAST=self.fast, **product.constants, **product.options,
        )  # fmt: skip
        launch(
            center, grid,
            *common, self.sums, self.norms, layout.n_lower, self.n,
            B=B, LANES=LANES, num_warps=planes.WARPS,
        )  # fmt: skip

    def _lower(self) -> Tensor:
        return self.shapes.tiles("lower blocks", lower_blocks)

    def _step(self, k: int) -> None:
        layout, product, first = self.layout, self.product, k == 0
        rows = schedule.FAST_COEFFICIENTS if self.fast else schedule.COEFFICIENTS
        coefficients = self.shapes.table(
            ("polar coefficients", self.fast), torch.float32, lambda: rows
        )
        tiles = self._lower()
        grid, now, following = len(tiles), self.state[k], self.state[k + 1]
        common = (self.table, tiles, self.hi, self.lo)
        built = {**product.constants, **product.options, "FAST": self.fast}
        if not first:
            launch(gram, grid, *common, now, self.sums, layout.n_lower, **built)
            launch(square, grid, *common, now, self.sums, layout.n_lower, **built)
        launch(
            polynomial, grid,
            self.table, tiles, coefficients, self.hi, self.lo, now, following,
            int(k == schedule.STEPS - 1), self.sums, layout.n_lower,
            FIRST=first, LANES=LANES, **built,
        )  # fmt: skip
        tiles = self._first_applied() if first else self._applied()
        launch(
            apply, len(tiles),
            self.table, tiles, self.hi, self.lo, now, following, self.norms, self.n,
            FIRST=first, **built,
        )  # fmt: skip

    def _first_applied(self) -> Tensor:
        return self.shapes.tiles("blocks of X", lambda a: of_kind(0, wide_blocks(a)))

    def _applied(self) -> Tensor:
        def blocks(a: Matrix) -> list[tuple[int, ...]]:
            return of_kind(0, wide_blocks(a)) + of_kind(1, square_blocks(a))

        return self.shapes.tiles("blocks of X and Z", blocks)

    def _finish(self) -> None:
        def last(a: Matrix) -> list[tuple[int, ...]]:
            lower = lower_blocks(a)
            p = of_kind(1, lower) if a.rows == a.cols else []
            return of_kind(0, lower) + p + of_kind(2, lower)

        def results(a: Matrix) -> list[tuple[int, ...]]:
            inverse = of_kind(1, square_blocks(a)) if a.rows != a.cols else []
            return of_kind(0, wide_blocks(a)) + inverse

        shapes, product, n_sums = self.shapes, self.product, self.layout.n_lower
        built = product.constants | product.options
        now, following = self.state[schedule.STEPS], self.state[schedule.STEPS + 1]
        tiles = self._lower()
        launch(
            gram, len(tiles),
            self.table, tiles, self.hi, self.lo, now, self.sums, n_sums, FAST=False, **built,
        )  # fmt: skip
        built["FAST"] = self.fast
        tiles = self._applied()
        launch(
            polish, len(tiles),
            self.table, tiles, self.hi, self.lo, now, following, self.sums, n_sums,
            self.squares, self.layout.n_blocks, LANES=LANES, **built,
        )  # fmt: skip
        tiles = shapes.tiles("E, P, Z Z^T", last)
        launch(
            last_gram, len(tiles),
            self.outputs[1], self.table, tiles, self.to, self.hi, self.lo, following,
            self.sums, n_sums, self.squares, self.layout.n_blocks,
            WIDTH=4, ALIGNED=self.to_aligned, LANES=LANES, **built,
        )  # fmt: skip
        tiles = shapes.tiles("U, Q", results)
        launch(
            finish, len(tiles),
            *self.outputs, self.table, tiles, self.to, self.multipliers, self.hi, self.lo,
            following, self.units, self.norms, self.sums, n_sums, self.n,
            self.squares, self.layout.n_blocks,
            WIDTH=4, ALIGNED=self.to_aligned, LANES=LANES, **built,
        )  # fmt: skip

    def run(self) -> None:
        self._start()
        for k in range(schedule.STEPS):
            self._step(k)
        self._finish()


def empty_outputs(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Lists of results, factors, spectra and scalars, as ``lipkernels::polar_factor`` has them."""
    shapes = []
    for w in weights:
        *batch, rows, cols = w.shape
        m = min(rows, cols)
        shapes.append((w.shape, (*batch, m, m), (*batch, m), (*batch, 2)))
    device = weights[0].device
    return [
        [torch.empty(shape, dtype=torch.float32, device=device) for shape in kind]
        for kind in zip(*shapes, strict=True)
    ]


def polar_factors(
    weights: Sequence[Tensor], factors: Sequence[float], fast: bool = False
) -> list[list[Tensor]]:
    """Results ``factor U`` in float32 of weights that are not float64, and what is saved."""
    outputs = empty_outputs(weights)
    for kind in dict.fromkeys(w.dtype for w in weights):
        members = [i for i, w in enumerate(weights) if w.dtype == kind]
        _Forward(
            [weights[i].contiguous() for i in members],
            [[part[i] for i in members] for part in outputs],
            [factors[i] for i in members],
            fast,
        ).run()
    return outputs


def forward(
    weights: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype, fast: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """As ``lipkernels::polar_factor``, for weights that are not float64; fast: see Note [Fast]."""
    multipliers = [1.0] * len(weights)
    if dtype == torch.float32:
        multipliers = [
            scale * worst_case_factor(w.to("meta", torch.float32), scale, dtype) * _OWN_MARGIN
            for w, scale in zip(weights, scales, strict=True)
        ]
    results, *saved = polar_factors(weights, multipliers, fast)
    if dtype != torch.float32:
        results = rounded_within(results, scales, dtype)
    return results, [tensor for parts in zip(*saved, strict=True) for tensor in parts]
