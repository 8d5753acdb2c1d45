"""The gradient of the polar factor of every weight of a group, by matrix products: 29 launches.

With Gamma = dL/dU, T = Gamma U^T, Q = P^-1 (see `lipkernels.reference.polar`):

    P Y + Y P = T - T^T,    dL/dW = Q Gamma + (Y - Q T) U    (Y U for a square W)

The Lyapunov equation is solved by squared Smith steps. With q > 0 it says the same as

    Y = A Y A + 2/q N (T - T^T) N,    N = q (P + q)^-1,    A = I - 2 N = (P - q) (P + q)^-1

so that Y is the sum of A^k (2/q N (T - T^T) N) A^k over all k >= 0, and

    Y <- Y + A Y A,    A <- A A

doubles the number of terms. For q^2 = p_min p_max the largest eigenvalue of A is
rho = (sqrt(c) - 1) / (sqrt(c) + 1), c the condition number of P, and after SMITH = 7 steps what is
left of Y is rho^256: 5e-23 at c = 100, 9e-8 at c = 1000, 4% at c = 100,000. N is an inverse,
(I + H)^-1 with H = P/q, whose condition number is sqrt(c) only; where P^-1 was saved instead,
H = q P^-1 gives I - N, which turns A into -A and nothing else. It starts from the best linear
polynomial on the spectrum of I + H and multiplies (I + E), (I + E^2), (I + E^4) .. to it;
INVERSE = 7 of them leave 1e-20 at c = 100 and 2e-7 at c = 1000.

After a fast forward, whose U and P^-1 are off by 1e-3 and more, FAST_SMITH = FAST_INVERSE = 6 steps
are taken, and the products of the Smith steps read the upper planes alone (the inverse cannot:
where N came out above one, the squares of A would grow without a bound). rho^128 is 2e-4 at
c = 1000.

Conjugate gradients need a launch for every one of their 14 steps at condition 10 and 45 at 100, and
two sums in each; a Chebyshev iteration as many steps without the sums. Both were left.
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
from lipkernels.kernels.triton.group import Group, Matrix, group
from lipkernels.kernels.triton.planes import (
    SCALE,
    load_planes,
    raw_block,
    store_planes,
    store_raw_block,
    store_symmetric,
    to_unit_magnitude,
)
from lipkernels.kernels.triton.polar import forward
from lipkernels.kernels.triton.products import B, Tiling, add_a_b, add_a_bt, identity, tiling
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
    square_blocks,
    sum_of_blocks,
    wide_at,
    wide_blocks,
)

SMITH, FAST_SMITH = 7, 6
INVERSE, FAST_INVERSE = 7, 6
FINISH_STAGES = 2  # of its three loops: with a third sm_100 has too little shared memory
SAVED_PER_WEIGHT = 3  # factor, spectrum, scalars: see `lipkernels.kernels.polar`
_UNSCALE = tl.constexpr(1.0 / (128.0 * 128.0))
_R_SCALE = tl.constexpr(32.0)  # Y - Q T of a weight that has lost a rank reaches 850
# P^-1 was polished once more after its norm was bounded, which adds at most a half: I + H stays
# where the start of its inverse has |E|_2 <= 1, and no square of E can grow.
_ROOM = tl.constexpr(0.6)

# What a matrix has in the workspace: Gamma and U, then squares. V = q Y / 4.
_GAMMA, _U = (tl.constexpr(i) for i in range(2))
_H, _T, _C, _N, _E, _A, _V, _AV = (tl.constexpr(i) for i in (0, 1, 2, 3, 5, 7, 9, 11))
_SQUARES = 12  # N, E, A and V are two each, which take turns


@triton.jit
def store_skew(hi, lo, start, i, j, rows, ld, scale, x, B: tl.constexpr):
    """Block (i, j), i >= j, of a skew matrix, and minus its mirror image."""
    if i == j:
        store_planes(hi, lo, start, i, i, rows, ld, scale, 0.5 * (x - tl.trans(x)), B, B)
    else:
        store_planes(hi, lo, start, i, j, rows, ld, scale, x, B, B)
        store_planes(hi, lo, start, j, i, rows, ld, scale, -tl.trans(x), B, B)


@triton.jit
def _q_and_root(spectrum, m):
    """q = sqrt(p_min p_max) and sqrt(p_min / p_max), from what forward left."""
    largest_p = -tl.load(spectrum)
    smallest_p = tl.load(spectrum + 1, mask=m > 1, other=0.0)
    smallest_p = tl.where(m > 1, smallest_p, largest_p)
    root = tl.sqrt(smallest_p / tl.where(largest_p > 0, largest_p, 1.0))
    return largest_p * root, root


@triton.jit
def pack(
    grads, results, factors, spectra, scalars, table, tiles, places, maxima, hi, lo, units,
    squares, n_matrices,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr, B: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Kind 0: Gamma / unit; 1: U; 2: H. units: the unit, and NaN instead of 1 for a bad Gamma."""
    t = tl.program_id(0)
    p, kind = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    m, n, ldm, ldn = sides(table, p)
    tall = is_tall(table, p)
    if kind == 0:
        bits = largest(table, maxima, p, LANES)
        x = raw_block(part_of(grads, places, p, 0, WIDTH, ALIGNED), i, j, m, n, tall, B)
        x, unit = to_unit_magnitude(x, bits)
        store_planes(hi, lo, wide_at(table, p, m, ldn, _GAMMA), i, j, m, ldn, SCALE, x, B, B)
        first = tl.load(table + p * 12 + 8)
        tl.store(squares + first + i * tl.cdiv(n, B) + j, tl.sum(tl.sum(x * x, 1), 0))
        if (i == 0) & (j == 0):
            tl.store(units + p, unit)
            tl.store(units + n_matrices + p, tl.where(bits < 0x7F800000, 1.0, float("nan")))
    elif kind == 1:
        factor = tl.load(part_of(scalars, places, p, 4, WIDTH, ALIGNED) + 1)
        x = raw_block(part_of(results, places, p, 1, WIDTH, ALIGNED), i, j, m, n, tall, B)
        x = x / factor
        store_planes(hi, lo, wide_at(table, p, m, ldn, _U), i, j, m, ldn, SCALE, x, B, B)
    else:
        q, _ = _q_and_root(part_of(spectra, places, p, 3, WIDTH, ALIGNED), m)
        factor = tl.where(m == n, 1.0 / tl.where(q > 0, q, 1.0), q)
        x = raw_block(part_of(factors, places, p, 2, WIDTH, ALIGNED), i, j, m, m, 0, B)
        x = x * factor
        store_planes(hi, lo, square_at(table, p, m, ldm, _H), i, j, m, ldm, SCALE, x, B, B)


@triton.jit
def gradient_along(
    table, tiles, hi, lo, squares,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """T = Gamma U^T / |Gamma|_F."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, ldm, ldn = sides(table, p)
    gamma, u = wide_at(table, p, m, ldn, _GAMMA), wide_at(table, p, m, ldn, _U)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, gamma, u, i, j, m, m, ldn, B, BK, DESCRIPTORS)
    norm = tl.sqrt(sum_of_blocks(table, squares, p, m, n, B, LANES))
    acc *= _UNSCALE / tl.where(norm > 0, norm, 1.0)
    store_planes(hi, lo, square_at(table, p, m, ldm, _T), i, j, m, ldm, SCALE, acc, B, B)


@triton.jit
def start(
    spectra, table, tiles, places, hi, lo, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """C = (T - T^T) / 2, N = b M + a I and E = I - N M for M = I + H.

    1 - x (a + b x) = T_2(c - d x) / T_2(c), the Chebyshev polynomial, on the interval of M.
    """
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, _, ldm, _ = sides(table, p)
    at_t, at_h = square_at(table, p, m, ldm, _T), square_at(table, p, m, ldm, _H)
    across = load_planes(hi, lo, at_t, j, i, m, ldm, SCALE, B, B)
    c = 0.5 * (load_planes(hi, lo, at_t, i, j, m, ldm, SCALE, B, B) - tl.trans(across))
    store_skew(hi, lo, square_at(table, p, m, ldm, _C), i, j, m, ldm, SCALE, c, B)

    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, at_h, at_h, i, j, m, m, ldm, B, BK, DESCRIPTORS) * _UNSCALE
    _, root = _q_and_root(part_of(spectra, places, p, 0, WIDTH, ALIGNED), m)
    root = tl.minimum(tl.maximum(root * _ROOM, 1e-4), _ROOM)
    low, high = 1.0 + root, 1.0 + 1.0 / root
    middle, slope = (high + low) / (high - low), 2.0 / (high - low)
    whole = 2.0 * middle * middle - 1.0
    a, b = 4.0 * middle * slope / whole, -2.0 * slope * slope / whole
    h = load_planes(hi, lo, at_h, i, j, m, ldm, SCALE, B, B)
    eye = identity(i, j, m, B)
    n = (a + b) * eye + b * h
    e = (1.0 - a - b) * eye - (a + 2 * b) * h - b * acc
    store_symmetric(hi, lo, square_at(table, p, m, ldm, _N), i, j, m, ldm, SCALE, n, B)
    store_symmetric(hi, lo, square_at(table, p, m, ldm, _E), i, j, m, ldm, SCALE, e, B)


@triton.jit
def invert(
    table, tiles, hi, lo, step, B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """Kind 0: N <- N + N E; 1: E <- E^2."""
    t = tl.program_id(0)
    p, kind = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    m, _, ldm, _ = sides(table, p)
    now = step & 1
    e, n = square_at(table, p, m, ldm, _E + now), square_at(table, p, m, ldm, _N + now)
    a = tl.where(kind == 0, n, e)
    out = square_at(table, p, m, ldm, tl.where(kind == 0, _N, _E) + 1 - now)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, a, e, i, j, m, m, ldm, B, BK, DESCRIPTORS) * _UNSCALE
    if kind == 0:
        acc += load_planes(hi, lo, n, i, j, m, ldm, SCALE, B, B)
    store_symmetric(hi, lo, out, i, j, m, ldm, SCALE, acc, B)


@triton.jit
def first_half(
    table, tiles, hi, lo, n_slot, B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """N C = -N C^T, in the place of A V, and A = I - 2 N; I - N for N where H = q P^-1."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, ldm, _ = sides(table, p)
    inverse, c = square_at(table, p, m, ldm, n_slot), square_at(table, p, m, ldm, _C)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, inverse, c, i, j, m, m, ldm, B, BK, DESCRIPTORS) * -_UNSCALE
    if m != n:
        acc = load_planes(hi, lo, c, i, j, m, ldm, SCALE, B, B) - acc
    store_planes(hi, lo, square_at(table, p, m, ldm, _AV), i, j, m, ldm, SCALE, acc, B, B)
    a = identity(i, j, m, B) - 2 * load_planes(hi, lo, inverse, i, j, m, ldm, SCALE, B, B)
    store_planes(hi, lo, square_at(table, p, m, ldm, _A), i, j, m, ldm, SCALE, a, B, B)


@triton.jit
def second_half(
    table, tiles, hi, lo, n_slot, B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """V = N C N: the first term of q Y / 4; I - N for N where H = q P^-1."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, ldm, _ = sides(table, p)
    nc, inverse = square_at(table, p, m, ldm, _AV), square_at(table, p, m, ldm, n_slot)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, nc, inverse, i, j, m, m, ldm, B, BK, DESCRIPTORS) * _UNSCALE
    if m != n:
        acc = load_planes(hi, lo, nc, i, j, m, ldm, SCALE, B, B) - acc
    store_skew(hi, lo, square_at(table, p, m, ldm, _V), i, j, m, ldm, SCALE, acc, B)


@triton.jit
def smith_products(
    table, tiles, hi, lo, step,
    PLANES: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Kind 0: A V = -A V^T; 1: A <- A A."""
    t = tl.program_id(0)
    p, kind = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    i, j = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    m, _, ldm, _ = sides(table, p)
    now = step & 1
    a, v = square_at(table, p, m, ldm, _A + now), square_at(table, p, m, ldm, _V + now)
    b = tl.where(kind == 0, v, a)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, a, b, i, j, m, m, ldm, B, BK, DESCRIPTORS, PLANES) * _UNSCALE
    if kind == 0:
        store_planes(hi, lo, square_at(table, p, m, ldm, _AV), i, j, m, ldm, SCALE, -acc, B, B)
    else:
        out = square_at(table, p, m, ldm, _A + 1 - now)
        store_symmetric(hi, lo, out, i, j, m, ldm, SCALE, acc, B)


@triton.jit
def smith_sum(
    table, tiles, hi, lo, step,
    PLANES: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """V <- V + (A V) A."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, _, ldm, _ = sides(table, p)
    now = step & 1
    av, a = square_at(table, p, m, ldm, _AV), square_at(table, p, m, ldm, _A + now)
    v = square_at(table, p, m, ldm, _V + now)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_bt(acc, hi, lo, av, a, i, j, m, m, ldm, B, BK, DESCRIPTORS, PLANES) * _UNSCALE
    acc += load_planes(hi, lo, v, i, j, m, ldm, SCALE, B, B)
    out = square_at(table, p, m, ldm, _V + 1 - now)
    store_skew(hi, lo, out, i, j, m, ldm, SCALE, acc, B)


@triton.jit
def subtract(
    table, tiles, hi, lo, v_slot, B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """q (Y - Q T) = 4 V - H T, in the place of A V."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, _, ldm, _ = sides(table, p)
    h, at_t = square_at(table, p, m, ldm, _H), square_at(table, p, m, ldm, _T)
    acc = tl.zeros((B, B), tl.float32)
    acc = add_a_b(acc, hi, lo, h, at_t, i, j, m, m, ldm, ldm, B, BK, DESCRIPTORS) * _UNSCALE
    v = load_planes(hi, lo, square_at(table, p, m, ldm, v_slot), i, j, m, ldm, SCALE, B, B)
    out = square_at(table, p, m, ldm, _AV)
    store_planes(hi, lo, out, i, j, m, ldm, _R_SCALE, 4 * v - acc, B, B)


@triton.jit
def finish(
    out, spectra, scalars, table, tiles, places, scales, hi, lo, units, squares, v_slot, limit,
    n_matrices, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dL/dW: Q Gamma + (Y - Q T) U, or Y U for a square W; times what they were divided by."""
    t = tl.program_id(0)
    p, i, j = tl.load(tiles + 3 * t), tl.load(tiles + 3 * t + 1), tl.load(tiles + 3 * t + 2)
    m, n, ldm, ldn = sides(table, p)
    u = wide_at(table, p, m, ldn, _U)
    norm = tl.sqrt(sum_of_blocks(table, squares, p, m, n, B, LANES))
    acc = tl.zeros((B, B), tl.float32)
    if m == n:
        a = square_at(table, p, m, ldm, v_slot)
        acc = add_a_b(acc, hi, lo, a, u, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
        acc *= 4 * _R_SCALE / SCALE
    else:
        a, h = square_at(table, p, m, ldm, _AV), square_at(table, p, m, ldm, _H)
        gamma = wide_at(table, p, m, ldn, _GAMMA)
        acc = add_a_b(acc, hi, lo, h, gamma, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
        acc *= _R_SCALE / SCALE / tl.where(norm > 0, norm, 1.0)
        acc = add_a_b(acc, hi, lo, a, u, i, j, m, m, ldm, ldn, B, BK, DESCRIPTORS)
    q, _ = _q_and_root(part_of(spectra, places, p, 1, WIDTH, ALIGNED), m)
    factor = tl.load(scales + p).to(tl.float32) / tl.where(q > 0, q, 1.0)
    factor *= norm / (_R_SCALE * SCALE) * tl.load(units + n_matrices + p)
    acc = acc * factor * tl.load(units + p)
    acc = saturated(acc / tl.load(part_of(scalars, places, p, 2, WIDTH, ALIGNED)), limit)
    base = part_of(out, places, p, 0, WIDTH, ALIGNED)
    x = rounded(acc, out.dtype.element_ty)
    store_raw_block(base, i, j, m, n, is_tall(table, p), x, B)


# ----------------------------------------------------------------------------------- the launches
def _layout(matrices: tuple[Matrix, ...]) -> Layout:
    return layout(matrices, n_wide=2, n_squares=_SQUARES)


def _packed(a: Matrix) -> list[tuple[int, ...]]:
    wide = wide_blocks(a)
    return of_kind(0, wide) + of_kind(1, wide) + of_kind(2, square_blocks(a))


def _halves(a: Matrix) -> list[tuple[int, ...]]:
    lower = lower_blocks(a)
    return of_kind(0, lower) + of_kind(1, lower)


def _whole_and_half(a: Matrix) -> list[tuple[int, ...]]:
    return of_kind(0, square_blocks(a)) + of_kind(1, lower_blocks(a))


def _wide_ones(a: Matrix) -> list[tuple[int, ...]]:
    return list(square_blocks(a)) if a.rows != a.cols else []


class _Backward:
    """The launches of one group, whose results are float32, in order."""

    def __init__(
        self,
        grads: list[Tensor],
        results: list[Tensor],
        saved: list[list[Tensor]],
        scales: list[float],
        out: list[Tensor],
        fast: bool,
    ):
        self.smith, self.inverse = (FAST_SMITH, FAST_INVERSE) if fast else (SMITH, INVERSE)
        self.planes = {"PLANES": 1 if fast else 3}
        self.shapes: Group = group(grads)
        device = self.shapes.device
        self.layout: Layout = self.shapes.plan("polar backward", _layout)
        self.inputs = (grads, results, *saved)
        self.out = out
        self.table = self.shapes.table("polar backward", torch.int64, lambda: self.layout.rows)
        self.scales = self.shapes.numbers(scales)
        self.n = len(self.shapes.matrices)
        self.hi, self.lo = torch.empty((2, self.layout.size), dtype=torch.float16, device=device)
        self.units = torch.empty(2 * self.n, dtype=torch.float32, device=device)
        self.squares = torch.empty(self.layout.n_blocks, dtype=torch.float32, device=device)
        self.product: Tiling = tiling(device)
        self.built = self.product.constants | self.product.options

    def _pack(self) -> None:
        shapes = self.shapes
        places, aligned = shapes.places(*self.inputs)
        numbers = shapes.table(
            "entries", torch.int64, lambda: [(a.rows * a.cols,) for a in shapes.matrices]
        )
        maxima = torch.empty(self.layout.n_maxima, dtype=torch.int32, device=shapes.device)
        tiles = shapes.tiles("maxima", maxima_blocks)
        launch(
            planes.magnitudes, len(tiles),
            self.inputs[0][0], tiles, places, numbers, maxima,
            WIDTH=5, ALIGNED=aligned, BLOCK=planes.BLOCK, num_warps=planes.WARPS,
        )  # fmt: skip
        tiles = shapes.tiles("Gamma, U, H", _packed)
        launch(
            pack, len(tiles),
            *(tensors[0] for tensors in self.inputs), self.table, tiles, places, maxima,
            self.hi, self.lo, self.units, self.squares, self.n,
            WIDTH=5, ALIGNED=aligned, B=B, LANES=LANES, num_warps=planes.WARPS,
        )  # fmt: skip

    def _on(self, tiles: Tensor, kernel, *arguments: int, **constants: int) -> None:
        """A launch that needs the workspace alone."""
        if len(tiles):
            launch(
                kernel, len(tiles),
                self.table, tiles, self.hi, self.lo, *arguments, **constants, **self.built,
            )  # fmt: skip

    def _solve(self) -> None:
        shapes = self.shapes
        lower, whole = (
            shapes.tiles("lower blocks", lower_blocks),
            shapes.tiles("square blocks", square_blocks),
        )
        launch(
            gradient_along,
            len(whole),
            self.table,
            whole,
            self.hi,
            self.lo,
            self.squares,
            LANES=LANES,
            **self.built,
        )
        places, aligned = shapes.places(self.inputs[3])
        launch(
            start, len(lower),
            self.inputs[3][0], self.table, lower, places, self.hi, self.lo,
            WIDTH=1, ALIGNED=aligned, **self.built,
        )  # fmt: skip
        halves = shapes.tiles("N, E", _halves)
        for step in range(self.inverse):
            self._on(halves, invert, step)
        n_slot = _N.value + self.inverse % 2
        self._on(whole, first_half, n_slot)
        self._on(lower, second_half, n_slot)
        products = shapes.tiles("A V, A A", _whole_and_half)
        for step in range(self.smith):
            self._on(products, smith_products, step, **self.planes)
            self._on(lower, smith_sum, step, **self.planes)

    def _finish(self) -> None:
        shapes, v_slot = self.shapes, _V.value + self.smith % 2
        self._on(shapes.tiles("squares of wide ones", _wide_ones), subtract, v_slot)
        places, aligned = shapes.places(self.out, self.inputs[3], self.inputs[4])
        tiles = shapes.tiles("wide blocks", wide_blocks)
        limit = torch.finfo(self.out[0].dtype).max
        launch(
            finish, len(tiles),
            self.out[0], self.inputs[3][0], self.inputs[4][0], self.table, tiles, places,
            self.scales, self.hi, self.lo, self.units, self.squares, v_slot, limit, self.n,
            WIDTH=3, ALIGNED=aligned, LANES=LANES, **self.built | {"num_stages": FINISH_STAGES},
        )  # fmt: skip

    def run(self) -> None:
        self._pack()
        self._solve()
        self._finish()


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    saved: Sequence[Tensor],
    scales: Sequence[float],
    fast: bool = False,
) -> list[Tensor]:
    """As ``lipkernels::polar_factor_backward``, for weights that are not float64."""
    results, parts = list(results), [list(saved[i::SAVED_PER_WEIGHT]) for i in range(3)]
    rounded_ones = [i for i, result in enumerate(results) if result.dtype != torch.float32]
    if rounded_ones:
        # A rounded result is not accurate enough to differentiate with, and keeping a second copy
        # would cost memory: once more.
        again, others = forward(
            [weights[i] for i in rounded_ones], [1.0] * len(rounded_ones), torch.float32, fast
        )
        for k, i in enumerate(rounded_ones):
            results[i] = again[k]
            for part, tensor in zip(parts, others[SAVED_PER_WEIGHT * k :], strict=False):
                part[i] = tensor
    out = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
    for kind in dict.fromkeys(w.dtype for w in weights):
        members = [i for i, w in enumerate(weights) if w.dtype == kind]
        _Backward(
            [grads[i].float().contiguous() for i in members],
            [results[i] for i in members],
            [[part[i] for i in members] for part in parts],
            [scales[i] for i in members],
            [out[i] for i in members],
            fast,
        ).run()
    return out
