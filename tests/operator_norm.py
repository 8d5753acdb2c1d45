"""Exact operator norms: the oracle of every promise of a bound.

A layer's matrix is built in float64 from the weight as it is stored, straight from the definition
of the operation: no torch convolution, no code of the library. Its largest singular value is
LAPACK's; the table in tolerances.py pays for that alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from tolerances import SVD
from torch import Tensor

_NUMPY_MODE = {
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
    "symmetric": "symmetric",
}


# ------------------------------------------------------------------------------------- norms
def singular_values(matrix: Tensor) -> Tensor:
    """Of a float64 copy of ``matrix``, largest first."""
    return torch.linalg.svdvals(matrix.detach().double())


def operator_norm(matrix: Tensor) -> float:
    """Largest singular value (0 for an empty matrix, NaN where an entry is not finite)."""
    if matrix.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(matrix).all()):
        return math.nan
    return float(singular_values(matrix)[..., 0].max())


def excess(matrix: Tensor, k: float) -> float:
    """sigma_max / k - 1 if that is more than the SVD's own error, else 0. NaN counts as infinite.

    Both are multiplied by one power of two first: a k of 1e-44 is no reason for underflow.
    """
    shift = -math.frexp(k)[1]
    half = shift // 2
    scaled = matrix.detach().double() * 2.0**half * 2.0 ** (shift - half)
    relative = operator_norm(scaled) / math.ldexp(k, shift) - 1
    if math.isnan(relative):
        return math.inf
    return relative if relative > SVD else 0.0


def assert_within(matrix: Tensor, k: float, what: object = "") -> None:
    """sigma_max(matrix) <= k."""
    over = excess(matrix, k)
    assert over == 0.0, f"norm exceeds {k!r} by {over:.3e} of it: {what}"


# ------------------------------------------------------------- norms, in rational arithmetic
def _integer_gram(matrix: Tensor) -> tuple[list[list[int]], int]:
    """(G, d) with X X^T = G / d^2 exactly, for the smaller side of X."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    rows = [[x.as_integer_ratio() for x in row] for row in wide.detach().double().tolist()]
    denominator = max((q for row in rows for _, q in row), default=1)  # powers of two
    whole = [[p * (denominator // q) for p, q in row] for row in rows]
    gram = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in whole] for p in whole]
    return gram, denominator


def is_upper_bound(matrix: Tensor, bound: float) -> bool:
    """Whether sigma_max(matrix) <= bound, decided exactly: b^2 I - X X^T is semidefinite.

    Symmetric elimination in whole numbers (Bareiss 1968: every division is exact, every pivot has
    the sign of the rational one); a zero pivot allows no other entry in its row.
    """
    if bound == math.inf:
        return True
    gram, denominator = _integer_gram(matrix)
    p, q = float(bound).as_integer_ratio()
    square = (p * denominator) ** 2
    n = len(gram)
    rest = [[(square if i == j else 0) - q * q * gram[i][j] for j in range(n)] for i in range(n)]
    previous = 1
    for i in range(n):
        row, pivot = rest[i], rest[i][i]
        if pivot < 0 or (pivot == 0 and any(row[j] != 0 for j in range(i + 1, n))):
            return False
        if pivot == 0:
            continue
        for a in range(i + 1, n):
            for b in range(a, n):
                rest[a][b] = (rest[a][b] * pivot - row[a] * row[b]) // previous
        previous = pivot
    return True


def is_above_a_gain(matrix: Tensor, bound: float) -> bool:
    """Whether |X v| <= bound |v|, exactly, for the v that the SVD takes for the top vector.

    A necessary condition for a bound, tight to the square of the SVD's error, for matrices that are
    too large for :func:`is_upper_bound`.
    """
    if bound == math.inf:
        return True
    x = matrix.detach().double()
    largest = float(x.abs().max())
    unit = x / largest if largest > 1e-300 else x * 2.0**600  # LAPACK refuses the extremes
    top = torch.linalg.svd(unit, full_matrices=False)[2][0].tolist()
    v = [Fraction(t) for t in top]
    image = [
        sum((Fraction(a) * b for a, b in zip(row, v, strict=True)), Fraction(0))
        for row in x.tolist()
    ]
    return sum(a * a for a in image) <= Fraction(bound) ** 2 * sum(a * a for a in v)


# ---------------------------------------------------------------- matrices of affine functions
def matrix_of(function: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
    """The float64 matrix of an affine function of tensors of ``shape``, minus its constant.

    ``function`` takes and returns a batch.
    """
    n = math.prod(shape)
    basis = torch.eye(n, dtype=torch.float64).reshape(n, *shape)
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        columns = function(basis) - function(zero)
    return columns.reshape(n, -1).T


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d function(x) / dx as a matrix, for one sample ``x`` (with its batch dimension of one)."""
    full = torch.autograd.functional.jacobian(function, x)
    return full.reshape(-1, x.numel())


# -------------------------------------------------------------------- convolutions, by definition
def padded_sources(size: int, left: int, right: int, mode: str) -> np.ndarray:
    """For each padded position the input element that it copies; -1 is a zero."""
    index = np.arange(size)
    if mode == "zeros":
        return np.pad(index, (left, right), constant_values=-1)
    return np.pad(index, (left, right), mode=_NUMPY_MODE[mode])


def taps(
    kernel: int, stride: int, left: int, right: int, dilation: int, mode: str, size: int
) -> Tensor:
    """S[t, o, i] = 1 where tap t of output o reads input i: one dimension of a convolution."""
    sources = padded_sources(size, left, right, mode)
    n_outputs = (len(sources) - dilation * (kernel - 1) - 1) // stride + 1
    selection = np.zeros((kernel, n_outputs, size))
    for t in range(kernel):
        for o in range(n_outputs):
            source = sources[o * stride + t * dilation]
            if source >= 0:
                selection[t, o, source] += 1.0
    return torch.from_numpy(selection)


def convolution_matrix(
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    mode: str = "zeros",
) -> Tensor:
    """The matrix (c_out * outputs, c_in * inputs) of the convolution with ``weight``."""
    kernel = weight.shape[2:]
    selection = torch.ones(1, 1, 1, dtype=torch.float64)  # (all taps, all outputs, all inputs)
    for k, s, (left, right), d, n in zip(kernel, stride, padding, dilation, size, strict=True):
        one = taps(k, s, left, right, d, mode, n)
        product = torch.einsum("aoi,bpj->abopij", selection, one)
        selection = product.flatten(4, 5).flatten(2, 3).flatten(0, 1)
    c_out, c_in = weight.shape[0], weight.shape[1] * groups
    full = torch.zeros(c_out, c_in, math.prod(kernel), dtype=torch.float64)
    rows, cols = c_out // groups, weight.shape[1]
    values = weight.detach().double().flatten(2)
    for g in range(groups):
        out = slice(g * rows, (g + 1) * rows)
        full[out, g * cols : (g + 1) * cols] = values[out]
    blocks = torch.einsum("pct,toi->poci", full, selection)
    return blocks.reshape(c_out * selection.shape[1], c_in * selection.shape[2])


def transposed_convolution_matrix(
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """The matrix of the transposed convolution: the adjoint of the convolution from its output.

    The adjoint's output is what a convolution with zero padding would read; what padding crops on
    the left and right is left out, what ``output_padding`` adds beyond the last tap is zero.
    """
    outputs = [
        (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
        for n, s, p, k, extra, d in zip(
            size, stride, padding, weight.shape[2:], output_padding, dilation, strict=True
        )
    ]
    # Enough right padding for exactly `size` windows of the convolution on an image of `outputs`.
    pads = [
        (p, (n - 1) * s + d * (k - 1) + 1 - out - p)
        for p, n, s, k, out, d in zip(
            padding, size, stride, weight.shape[2:], outputs, dilation, strict=True
        )
    ]
    widened = [max(0, -right) for _, right in pads]
    matrix = convolution_matrix(
        weight,
        outputs,
        stride,
        [(left, max(0, right)) for left, right in pads],
        dilation,
        groups,
    )
    if any(widened):
        # The convolution would fit more windows: keep the first `size` of each dimension.
        counts = [
            (out + left + max(0, right) - d * (k - 1) - 1) // s + 1
            for out, (left, right), s, k, d in zip(
                outputs, pads, stride, weight.shape[2:], dilation, strict=True
            )
        ]
        kept = matrix.reshape(weight.shape[0], *counts, -1)
        for dim, n in enumerate(size, start=1):
            kept = kept.narrow(dim, 0, n)
        matrix = kept.reshape(-1, matrix.shape[1])
    return matrix.T
