"""Polar factors of ill-conditioned matrices by eigendecompositions, between calls of the library.

In float64, all of a list at once. Or, of large matrices with few small singular values, in float32,
which costs half, made as accurate by what is left beside the diagonal of V^T W W^T V: see
csrc/cpu/refine.h.
"""

from __future__ import annotations

import array

import torch
from torch import Tensor

from lipkernels.kernels.cpu.library import (
    DONE,
    FEW_SMALL,
    VERY_ILL_CONDITIONED,
    addresses,
    checked,
    library,
    n_threads,
)
from lipkernels.reference import polar as reference

# Singular values below this part of the largest one are computed in float64.
_SMALL = 1 / 8
_UNSET = -1


def decomposed(x: Tensor, code: int, scale: float, margin: float, into: list[Tensor]) -> None:
    """``into``: result and saved tensors of ill-conditioned matrices ``x`` (n, rows, cols).

    ``code`` is what the library said of them.
    """
    if code != FEW_SMALL:
        _directly(x, code == VERY_ILL_CONDITIONED, scale, margin, into)
        return
    for i in range(len(x)):
        parts = [t[i : i + 1] for t in into]
        if not _refined(x[i], scale, margin, parts):
            _directly(x[i : i + 1], True, scale, margin, parts)


def _gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The smaller Gram matrices, of which eigh reads the lower triangles: there is no other."""
    n, rows, cols = x.shape
    m = min(rows, cols)
    gram = x.new_empty((n, m, m), dtype=dtype)
    table = array.array("q")
    for pair in zip(addresses(x, n), addresses(gram, n), strict=True):
        table.extend((*pair, gram.element_size(), rows, cols))
    checked(library().lk_polar_gram(n, table.buffer_info()[0], n_threads()))
    return gram


def _refined(x: Tensor, scale: float, margin: float, into: list[Tensor]) -> bool:
    """As :func:`decomposed` for one matrix; False where it takes float64 from the start."""
    rows, cols = x.shape
    m, n = min(rows, cols), max(rows, cols)
    eigenvalues, vectors = torch.linalg.eigh(_gram(x[None], torch.float32)[0])
    small = int((eigenvalues < _SMALL**2 * eigenvalues[-1]).sum())
    if small == m:  # there is no largest one to compare with
        return False
    new, wide = x.new_empty, torch.float64
    rows_l, vt = new((m, n)), new((m, m))
    rows_s, vs = new((small, n), dtype=wide), new((small, m), dtype=wide)
    gram = new((small, small), dtype=wide)
    outputs = [t.data_ptr() for t in (rows_l, vt, rows_s, vs)]
    inputs = (x.data_ptr(), vectors.data_ptr(), *vectors.stride())
    table = array.array("q", (*inputs, *outputs, gram.data_ptr(), small, rows, cols))
    checked(library().lk_polar_split(1, table.buffer_info()[0], n_threads()))
    rotation = torch.linalg.eigh(gram)[1]
    rotated = (rotation.data_ptr(), *rotation.stride())
    results = [t.data_ptr() for t in into]
    table = array.array("q", (*outputs, *rotated, *results, small, rows, cols))
    numbers, status = array.array("d", (scale, margin)), array.array("i", [_UNSET])
    checked(
        library().lk_polar_refined(
            1,
            table.buffer_info()[0],
            numbers.buffer_info()[0],
            status.buffer_info()[0],
            n_threads(),
        )
    )
    return status[0] == DONE


def _eigenvectors(gram: Tensor, in_float64: bool) -> tuple[Tensor, Tensor]:
    """V and the floored p of P = V diag(p) V^T, in float64, from P^2 (its lower triangles)."""
    if not in_float64:
        eigenvalues, vectors = torch.linalg.eigh(gram.float())
        p = reference.floored_root(eigenvalues)
        if bool((p[..., -1] <= reference.MAX_CONDITION_FLOAT32 * p[..., 0]).all()):
            return vectors.double(), p.double()
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return vectors, reference.floored_root(eigenvalues)


def _directly(x: Tensor, in_float64: bool, scale: float, margin: float, into: list[Tensor]) -> None:
    """As :func:`decomposed`, with eigenvectors that are good as they are."""
    n, rows, cols = x.shape
    vectors, p = _eigenvectors(_gram(x, torch.float64), in_float64)
    table, numbers = array.array("q"), array.array("d", (scale, margin) * n)
    tensors = (x, vectors, p, *into)
    for each in zip(*(addresses(t, n) for t in tensors), strict=True):
        table.extend((*each[:3], *vectors.stride()[1:], *each[3:], rows, cols))
    checked(
        library().lk_polar_from_eigenvectors(
            n, table.buffer_info()[0], numbers.buffer_info()[0], n_threads()
        )
    )
