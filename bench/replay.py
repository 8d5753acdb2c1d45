"""Interleaved samples as pytest-benchmark's own.

pytest-benchmark times one function after the other, minutes apart; we time all contenders in turns
(:mod:`bench.timing`) and hand it the samples: the benchmarked function moves a clock forward by one
sample per round, and pytest-benchmark reads that clock. Its medians, its table and its JSON are
then those of the interleaved run.
"""

from __future__ import annotations

from collections.abc import Sequence

from pytest_benchmark.fixture import BenchmarkFixture


class ReplayClock:
    """Shows the sum of the samples played so far, in seconds."""

    __name__ = "replay_clock"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


# For the marker: `pytest.mark.benchmark(timer=CLOCK)`.
CLOCK = ReplayClock()


def replay(benchmark: BenchmarkFixture, samples: Sequence[float]) -> None:
    """One round of ``benchmark`` for each of ``samples`` (seconds)."""
    left = iter(samples)
    benchmark.pedantic(lambda: CLOCK.advance(next(left)), rounds=len(samples))
