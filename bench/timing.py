"""Times that can be compared: all contenders in one process, in turns.

A machine that is shared, or that changes its clock, is slower in some seconds than in others. A
*round* runs every contender once, in random order, so that a slow second hits them all; what is
compared is the ratio within a round. Medians of the times, median and quartiles of the ratios.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

# A sample is the mean of as many calls as the fastest contender makes in this time, in seconds.
_SAMPLE = 2e-3
_MOST_CALLS = 50
_MOST_QUEUED = 1000
# Who takes longer than this for the first call has warmed up in it.
_WARM_ENOUGH = 1.0


@dataclass(frozen=True)
class Budget:
    """Rounds until ``seconds`` are spent, but at least ``least`` and at most ``most`` of them.

    A contender that has used up its share of the seconds sits out after ``least`` rounds.
    """

    seconds: float
    least: int = 5
    most: int = 200


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Of two contenders' samples, over the rounds that both took part in (the first ones)."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=False)])


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm of positive numbers.

    >>> geometric_mean([1.0, 4.0])
    2.0
    """
    logs = [math.log(v) for v in values]
    return math.exp(math.fsum(logs) / len(logs))


def _wait(device: torch.device) -> None:
    """Work that was queued on a GPU counts as done when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _calls(warm: Mapping[str, float], one_call: bool, sample: float | None) -> dict[str, int]:
    """How many calls make a sample of each contender, which took ``warm`` seconds for one."""
    if one_call:
        return dict.fromkeys(warm, 1)
    if sample is None:
        fastest = max(min(warm.values()), 1e-9)
        return dict.fromkeys(warm, max(1, min(_MOST_CALLS, math.ceil(_SAMPLE / fastest))))
    return {
        name: max(1, min(_MOST_QUEUED, math.ceil(sample / max(seconds, 1e-9))))
        for name, seconds in warm.items()
    }


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    budget: Budget,
    device: torch.device | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    one_call: bool = False,
    stopwatch: Callable[[Callable[[], None]], float] | None = None,
    sample: float | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, a sample per round; the i-th ones belong together.

    Each contender is called before anything counts. The garbage collector is off inside.
    ``clock``: seconds; :func:`time.process_time` with one thread shuts out what else is running.
    ``one_call``: a sample is a single call, however short. ``stopwatch``: instead of ``clock``, the
    seconds that a function takes. ``sample``: seconds of a sample, to which each contender makes
    as many calls as it needs (default: all make as many as the fastest).
    """
    if not contenders:
        raise ValueError("contenders: expected at least one, got none")
    device = device or torch.device("cpu")

    def by_clock(work: Callable[[], None]) -> float:
        _wait(device)
        start = clock()
        work()
        _wait(device)
        return clock() - start

    watch = stopwatch or by_clock

    def seconds(name: str, times: int) -> float:
        def work() -> None:
            for _ in range(times):
                contenders[name]()

        return watch(work) / times

    order = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        first = {name: seconds(name, 1) for name in contenders}
        warm = {n: seconds(n, 1) if s < _WARM_ENOUGH else s for n, s in first.items()}
        calls = _calls(warm, one_call, sample)
        spent = dict.fromkeys(contenders, 0.0)
        for done in range(budget.most):
            total = sum(spent.values())
            if done >= budget.least and total >= budget.seconds:
                break
            share = math.inf if done < budget.least else budget.seconds / len(contenders)
            taking_part = [name for name in contenders if spent[name] < share]
            order.shuffle(taking_part)
            for name in taking_part:
                samples[name].append(seconds(name, calls[name]))
                spent[name] += samples[name][-1] * calls[name]
    finally:
        if enabled:
            gc.enable()
    return samples
