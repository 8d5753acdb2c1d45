"""The least time that an op could take: bytes over the copy's rate, products over the matrix rate.

Bytes: each input read once, each output written once. Products: those of the cheapest algorithm
that we know for weights of condition 4, in three passes of halves each (what float32 accuracy
costs on tensor cores), symmetric ones at half price. Where another algorithm needs fewer, the floor
is too high: it is an estimate of what is possible, and not a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.gpu.queued import BOTH, FORWARD

_SPLIT = 3  # products of halves for one of float32
# Of m x m matrices, symmetric: an odd polynomial of degree 9 on singular values in [0.225, 1].
_POLAR_PRODUCTS = 7
# Of m x m matrices: conjugate gradients for the Sylvester equation of the backward.
_SYLVESTER_PRODUCTS = 7
_FLOAT = 4


@dataclass(frozen=True)
class Floor:
    """``nbytes`` moved and ``flops`` of float16 products."""

    nbytes: float
    flops: float = 0.0

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.nbytes + other.nbytes, self.flops + other.flops)

    def seconds(self, rates: Mapping[str, float]) -> float | None:
        """None where a rate that it needs was not measured."""
        needed = [(self.nbytes, "copy"), *([(self.flops, "float16")] if self.flops else [])]
        if any(name not in rates for _, name in needed):
            return None
        return max(amount / rates[name] for amount, name in needed)


Floors = dict[str, Floor]


def moved(forward: float, backward: float | None = None) -> Floors:
    """Of an op that only moves so many bytes each way; None: it has no backward."""
    if backward is None:
        return {FORWARD: Floor(forward)}
    return {FORWARD: Floor(forward), BOTH: Floor(forward + backward)}


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    return min(shape), max(shape)


def _size(shape: Sequence[int]) -> int:
    return _FLOAT * shape[0] * shape[1]


def _polar(shape: Sequence[int]) -> Floors:
    m, n = _sides(shape)
    gram, square, apply = m * m * n, m**3, 2 * m * m * n
    forward = Floor(2 * _size(shape), _SPLIT * (gram + _POLAR_PRODUCTS * square + apply))
    # Read W's factor, U and the gradient; T = Gamma U^T, the equation, Q Gamma + (Y - Q T) U.
    flops = _SPLIT * (3 * apply + 2 * square * (_SYLVESTER_PRODUCTS + 1))
    backward = Floor(3 * _size(shape) + _FLOAT * m * m, flops)
    return {FORWARD: forward, BOTH: forward + backward}


def _bjorck(shape: Sequence[int], steps: int = 15) -> Floors:
    m, n = _sides(shape)
    gram, square, apply = m * m * n, m**3, 2 * m * m * n
    # In Gram space a step is R = Z Y, Y <- Y z and Z <- z Z; its backward twice that.
    forward = Floor(2 * _size(shape), _SPLIT * (gram + 3 * steps * square + apply))
    backward = Floor(3 * _size(shape), _SPLIT * (2 * gram + 6 * steps * square + 2 * apply))
    return {FORWARD: forward, BOTH: forward + backward}


def _normalized(shape: Sequence[int]) -> Floors:
    return moved(2 * _size(shape), 3 * _size(shape))


def _retract(shape: Sequence[int]) -> Floors:
    m, n = _sides(shape)
    return {FORWARD: Floor(2 * _size(shape), _SPLIT * 3 * m * m * n)}


def _project(shape: Sequence[int]) -> Floors:
    m, n = _sides(shape)
    return {FORWARD: Floor(3 * _size(shape), _SPLIT * 4 * m * m * n)}


_OF_ONE = {
    "polar_factor": _polar,
    "bjorck": _bjorck,
    "spectral_normalize": _normalized,
    "frobenius_normalize": _normalized,
    "power_iteration": lambda shape: moved(_size(shape)),
    "retract": _retract,
    "project_tangent": _project,
}


def of_weights(op: str, shapes: Sequence[Sequence[int]]) -> Floors:
    """Of one call of ``op`` on float32 matrices (rows, cols), by pass.

    >>> of_weights("frobenius_normalize", [(2, 3), (4, 4)])["forward"]
    Floor(nbytes=176, flops=0.0)
    """
    floors = [_OF_ONE[op](shape) for shape in shapes]
    return {which: sum((f[which] for f in floors), Floor(0)) for which in floors[0]}
