"""A ragged list of weights, as kernels see it: tables of numbers on the device.

A grouped kernel is one launch over all matrices of all weights. Program ``t`` looks itself up:

    tiles[t] = (p, ...)      which matrix it works on, and which block of it      int32
    table[p] = (n, m, ...)   what is the same on every call: sides, offsets       int64
    places[p] = (w, ...)     where it is, from the first tensor of a list on      int64

Tables of shapes are built once for a set of shapes (:func:`group` is cached) and uploaded once.
Places and scales change: they are uploaded when a call is the first to have them, from pinned
memory, without waiting for the device; in training, where an allocator hands out the same memory
step after step, that is hardly ever. Workspaces are single tensors that tables have offsets into.

The compiler loads 16 bytes at a time only from what it knows to be aligned: a pointer argument plus
a multiple of 16 bytes. It forgets that of an address that comes out of a table. So tables have
offsets in units of 16 bytes or of :data:`ALIGNMENT` elements, and kernels multiply them back.

Note [CUDA graphs]
A table made while a graph is captured belongs to the graph: its upload is replayed, from the same
pinned memory, so neither may ever be freed, and nothing outside may use it before the first replay.
A table that existed before the capture is read by the graph, and must live as long. Both are kept
for good (some hundred bytes for each weight and captured call).

Note [Streams]
An upload is ordered on the stream that it was made on alone, so each stream has its own tables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 8  # elements; 16 bytes of the narrowest format
_SETS_OF_SHAPES = 256  # groups that stay cached
_UPLOADS = 1024  # tables of places and numbers that stay cached

Rows = Sequence[Sequence[float]]

_captured: list[Any] = []  # see Note [CUDA graphs]


@dataclass(frozen=True)
class Matrix:
    """One matrix of a group: ``index``-th of the batch of weight ``weight``."""

    weight: int
    index: int
    rows: int
    cols: int

    @property
    def tall(self) -> bool:
        return self.rows > self.cols

    @property
    def small(self) -> int:
        return min(self.rows, self.cols)

    @property
    def large(self) -> int:
        return max(self.rows, self.cols)


def padded(n: int) -> int:
    """``n`` rounded up to a whole number of :data:`ALIGNMENT`."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of these sizes begin in one workspace, each aligned, and the size of it all."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += padded(size)
    return starts, end


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _upload(rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=dtype, device="cpu")  # whatever the default device is
    if device.type == "cpu":
        return table  # Triton's interpreter
    host = table.pin_memory()
    table = host.to(device, non_blocking=True)
    if _capturing(device):
        _captured.append((host, table))
    return table


@functools.lru_cache(maxsize=_UPLOADS)
def _cached_upload(rows: Any, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    return _upload(rows, dtype, device)


def uploaded(rows: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device):
    """``rows`` as a tensor on ``device``: the one of the last call with equal rows, if any."""
    if _capturing(device):
        return _upload(rows, dtype, device)
    return _cached_upload(rows, dtype, device, _stream(device))


class Group:
    """All matrices of weights of these shapes (..., rows, cols) on one device, in order.

    ``matrices`` is the flat list of them; kernels know a matrix by its position there.
    """

    def __init__(self, shapes: tuple[tuple[int, ...], ...], device: torch.device):
        self.shapes = shapes
        self.device = device
        self.batches = tuple(math.prod(shape[:-2]) for shape in shapes)
        self.matrices = tuple(
            Matrix(i, j, *shape[-2:])
            for i, (shape, n) in enumerate(zip(shapes, self.batches, strict=True))
            for j in range(n)
        )
        self._plans: dict[Any, Any] = {}
        self._tables: dict[Any, Tensor] = {}

    def plan(self, key: Any, build: Callable[[tuple[Matrix, ...]], Any]) -> Any:
        """``build(self.matrices)``, once for each ``key``: whatever follows from the shapes."""
        if key not in self._plans:
            self._plans[key] = build(self.matrices)
        return self._plans[key]

    def table(self, key: Any, dtype: torch.dtype, rows: Callable[[], Rows]) -> Tensor:
        """``rows()`` on the device, built and uploaded once for each ``key``."""
        if _capturing(self.device):
            known = self._tables.get((key, dtype, _stream(self.device)))
            if known is None:
                return _upload(rows(), dtype, self.device)
            _captured.append(known)
            return known
        place = (key, dtype, _stream(self.device))
        if place not in self._tables:
            self._tables[place] = _upload(rows(), dtype, self.device)
        return self._tables[place]

    def tiles(self, key: Any, blocks: Callable[[Matrix], Sequence[tuple[int, ...]]]) -> Tensor:
        """The tile table (int32): (p, \\*block) for every block of every matrix p, in order."""

        def rows() -> Rows:
            return [(p, *block) for p, m in enumerate(self.matrices) for block in blocks(m)]

        return self.table(("tiles", key), torch.int32, rows)

    def places(self, *lists: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """``(table, aligned)``: where every matrix's part of each list's tensors is (int64).

        Each list has a contiguous tensor for every weight, of one format, the parts of its batch
        one after the other. Places are counted from the list's first tensor, which the kernel gets
        as a pointer: in steps of 16 bytes if ``aligned``, otherwise of one element.
        """
        found = [self._addresses_of(tensors) for tensors in lists]
        aligned = all(address % 16 == 0 for addresses in found for address in addresses)
        columns = []
        for tensors, addresses in zip(lists, found, strict=True):
            step = 16 if aligned else tensors[0].element_size()
            columns.append([(address - addresses[0]) // step for address in addresses])
        return uploaded(tuple(zip(*columns, strict=True)), torch.int64, self.device), aligned

    def _addresses_of(self, tensors: Sequence[Tensor]) -> list[int]:
        found = []
        for tensor, n in zip(tensors, self.batches, strict=True):
            start, size = tensor.data_ptr(), tensor.element_size() * (tensor.numel() // n)
            found.extend(range(start, start + size * n, size) if n > 1 else (start,))
        return found

    def numbers(self, *lists: Sequence[float]) -> Tensor:
        """One row (float64) for every matrix: each list's number for its weight."""
        rows = tuple(tuple(values[m.weight] for values in lists) for m in self.matrices)
        return uploaded(rows, torch.float64, self.device)


@functools.lru_cache(maxsize=_SETS_OF_SHAPES)
def _group(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> Group:
    return Group(shapes, device)


def group(weights: Sequence[Tensor]) -> Group:
    """The :class:`Group` of these weights' shapes, none of them empty; the same one every time.

    >>> [one, *others] = group([torch.zeros(2, 3, 5), torch.zeros(7, 4)]).matrices
    >>> one
    Matrix(weight=0, index=0, rows=3, cols=5)
    >>> [(m.weight, m.small, m.large, m.tall) for m in others]
    [(0, 3, 5, False), (1, 4, 7, True)]
    """
    return _group(tuple(tuple(w.shape) for w in weights), weights[0].device)
