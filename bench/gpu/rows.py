"""One row of a table: every contender's time by pass, its launches and its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu import launches
from bench.gpu.accuracy import Figures
from bench.gpu.attempts import attempt
from bench.gpu.floors import Floors
from bench.gpu.queued import BOTH, Graphed, Rotating, Work, timed
from bench.timing import Budget, paired_ratio, spread

OURS = "lipkernels"  # what the names of our contenders begin with
GRAPH = ", CUDA graph"
# What the float64 eigenvalues that measure a norm are off by.
_MEASURED = 1e-12
Check = Callable[[Sequence[Tensor], Sequence[Tensor]], Figures]


def _same(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(tensors)


@dataclass(frozen=True)
class Contender:
    """``make()``: its copies of the work. ``graph``: how it takes part, eagerly or in a CUDA graph.

    ``order``: its results or gradients as the list that the check expects; None: no accuracy.
    """

    make: Callable[[], Sequence[Work]]
    eager: bool = True
    graph: bool = False
    order: Callable[[Sequence[Tensor]], list[Tensor]] | None = _same


def _outputs(work: Work, passes: Sequence[str]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return work.both() if BOTH in passes else (work.forward(), ())


class _Entry:
    """A contender under one name: a caller for each pass, and what it made of the first copy."""

    def __init__(
        self, works: Sequence[Work], passes: Sequence[str], graph: bool, contender: Contender
    ) -> None:
        self.order, self.graph, self.works, self.passes = contender.order, graph, works, passes
        kind = Graphed if graph else Rotating
        self.calls = {which: kind(works, which) for which in passes}
        for call in self.calls.values():
            call()

    def outputs(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        last = self.calls[self.passes[-1]]
        if not isinstance(last, Graphed):
            return _outputs(self.works[0], self.passes)
        found: Any = last.first()
        return found if BOTH in self.passes else (found, ())

    def count(self, device: torch.device) -> dict[str, dict[str, int] | None] | None:
        if self.graph:
            return None
        return {w: launches.count(call, device) for w, call in self.calls.items()}


def _entries(
    contenders: Mapping[str, Contender],
    passes: Sequence[str],
    device: torch.device,
    failed: dict[str, str],
) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for name, contender in contenders.items():
        works = attempt(name, contender.make, failed, device)
        if works is None:
            continue
        # There is no CUDA graph on a CPU; who takes part in nothing else does so eagerly.
        wanted = {"": False} if contender.eager or device.type != "cuda" else {}
        if contender.graph and device.type == "cuda":
            wanted[GRAPH] = True
        for suffix, graph in wanted.items():
            entry = attempt(
                name + suffix,
                lambda works=works, graph=graph, c=contender: _Entry(works, passes, graph, c),
                failed,
                device,
            )
            if entry is not None:
                found[name + suffix] = entry
    return found


def _check(entry: _Entry, check: Check) -> Figures:
    assert entry.order is not None
    results, gradients = entry.outputs()
    ordered = entry.order(gradients) if gradients else []
    return check(entry.order(results), ordered)


def measure(
    contenders: Mapping[str, Contender],
    floors: Floors,
    check: Check,
    budget: Budget,
    device: torch.device,
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """The passes are those of ``floors``. Ratios refer to the first contender that runs."""
    passes, failed = list(floors), {}
    entries = _entries(contenders, passes, device, failed)
    if not entries:
        raise RuntimeError(f"expected a contender that runs, got {failed}")
    first = next(iter(entries))
    figures: dict[str, dict[str, Any]] = {name: {} for name in entries}
    said_floors = {}
    for which in passes:
        seconds = floors[which].seconds(rates)
        said_floors[which] = {**asdict(floors[which]), "ms": seconds and 1e3 * seconds}
        samples = timed({n: e.calls[which] for n, e in entries.items()}, budget, device)
        for name, values in samples.items():
            ms = asdict(spread([1e3 * s for s in values]))
            figures[name][which] = {
                "ms": ms,
                "times_first": asdict(paired_ratio(values, samples[first])),
                "times_floor": ms["median"] / (1e3 * seconds) if seconds else None,
                "rounds": len(values),
            }
    for name, entry in entries.items():
        if entry.order is not None:
            errors = attempt(name, lambda e=entry: _check(e, check), failed, device)
            figures[name]["accuracy"] = errors
        figures[name]["launches"] = attempt(
            f"{name}, launches", lambda e=entry: e.count(device), failed, device
        )
    return {
        "passes": passes,
        "first": first,
        "floor": said_floors,
        "copies": max(len(e.works) for e in entries.values()),
        "contenders": figures,
        "failed": failed,
    }


def faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What of ours failed or broke its bound: no matter of speed."""
    found = []
    for row in rows:
        if row["state"] in ("failed", "crashed"):
            found.append(f"{row['case']}: {row['state']}, {row.get('reason')}")
        for name, why in row.get("failed", {}).items():
            if name.startswith(OURS) and not name.endswith(", launches"):
                found.append(f"{row['case']}, {name}: {why}")
        for name, figures in row.get("contenders", {}).items():
            accuracy = figures.get("accuracy") or {}
            excess = accuracy.get("norm_minus_1")
            if name.startswith(OURS) and excess is not None and not excess <= _MEASURED:
                found.append(f"{row['case']}, {name}: a norm of 1 + {excess:.1e}")
            if name.startswith(OURS) and any(v is not None and v != v for v in accuracy.values()):
                found.append(f"{row['case']}, {name}: NaN")
    return found
