"""Times on a device: calls are queued between two CUDA events, and waited for once, at the end.

Inputs rotate: so many copies of a contender's work that the second-level cache holds none of them
when its turn comes again. A CUDA graph holds all copies one after the other, and is replayed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.timing import Budget, interleaved

# Seconds of a sample, one of each contender's in a round.
_SAMPLE = 5e-3
# Of a small weight, so many copies do not fill the cache, but take a while to make.
_MOST_COPIES = 64
FORWARD, BOTH = "forward", "both"
PASSES = (FORWARD, BOTH)


@dataclass(frozen=True)
class Work:
    """One copy of what a contender computes: differentiable ``results()`` of ``inputs``."""

    results: Callable[[], Sequence[Tensor]]
    inputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]

    def forward(self) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.results()

    def both(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """``(results, gradients)``."""
        results = self.results()
        return results, torch.autograd.grad(results, self.inputs, self.cotangents)

    def run(self, which: str) -> object:
        return self.forward() if which == FORWARD else self.both()


class Rotating:
    """Each call works on the next copy."""

    works_per_call = 1

    def __init__(self, works: Sequence[Work], which: str) -> None:
        self.works, self.which, self._next = works, which, 0

    def __call__(self) -> None:
        self.works[self._next].run(self.which)
        self._next = (self._next + 1) % len(self.works)


class Graphed:
    """Each call replays a CUDA graph that works on every copy once."""

    def __init__(self, works: Sequence[Work], which: str) -> None:
        self.works_per_call = len(works)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is set up at a first call is not captured
            for work in works:
                work.run(which)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            # Kept: a result that was freed would be the next copy's memory, and stay in the cache.
            self._kept = [work.run(which) for work in works]

    def __call__(self) -> None:
        self._graph.replay()

    def first(self) -> object:
        """What the last replay made of the first copy."""
        return self._kept[0]


def copies(nbytes: int, device: torch.device) -> int:
    """How many copies of ``nbytes`` are twice the cache, at least 2 and at most 64."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(_MOST_COPIES, math.ceil(2 * cache / nbytes)))


def stopwatch(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """Measures the seconds that the device needs for what a function queues."""

    def by_events(queue: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        queue()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def by_clock(queue: Callable[[], None]) -> float:
        start = time.perf_counter()
        queue()
        return time.perf_counter() - start

    return by_events if device.type == "cuda" else by_clock


@contextlib.contextmanager
def tf32():
    """Matrix products of float32 tensors on tensor cores, in the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def timed(
    contenders: Mapping[str, Rotating | Graphed], budget: Budget, device: torch.device
) -> dict[str, list[float]]:
    """Seconds for one copy's work, a sample of each contender per round: see `bench.timing`."""
    watch = stopwatch(device)
    sample = _SAMPLE if budget.seconds else 0.0  # without a budget, a call shows that it works
    samples = interleaved(contenders, budget, device, stopwatch=watch, sample=sample)
    return {
        name: [seconds / contenders[name].works_per_call for seconds in values]
        for name, values in samples.items()
    }
