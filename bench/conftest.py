"""What the benchmarks share: a device, a budget, and the tables that are measured once."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import grouped, machine, nets, peers, reparametrization, step
from bench.cases import SPEED_KINDS, Case, all_cases
from bench.report import RESULTS, TABLES, format_missing
from bench.timing import Budget

Row = dict[str, Any]

# Rows of a whole table: a part of one must not take the place of a committed result.
WHOLE = {"reparametrization": len(all_cases()), "grouped": len(SPEED_KINDS), "step": 2}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--bench-device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    group.addoption(
        "--bench-seconds", type=float, default=1.0, help="scale of the time spent on each case"
    )
    group.addoption(
        "--bench-out",
        type=Path,
        help="folder of results (default: bench/results, for tables that were measured whole)",
    )


class Tables:
    """Measures a row when it is first asked for; every contender's test reads the same row."""

    def __init__(self, config: pytest.Config) -> None:
        options: Any = config.option
        self.device = torch.device(options.bench_device)
        self.out: Path | None = options.bench_out
        self.enabled = bool(options.benchmark_enable)
        self.scale: float = options.bench_seconds
        arguments = config.invocation_params.args
        command = shlex.join(["python", "-m", "pytest", *map(str, arguments)])
        self.missing = {"weights": peers.missing(), "nets": nets.missing()}
        # Now, while the load is still that of others.
        self.about = machine.about(self.device, command)
        self.rows: dict[str, dict[str, Row]] = {}

    def budget(self, full: Budget) -> Budget:
        if not self.enabled:  # a run without --benchmark-enable only shows that all of it works
            return Budget(seconds=0.0, least=1)
        return Budget(full.seconds * self.scale, full.least, full.most)

    def names(self, kind: str, all_names: Iterable[str]) -> list[str]:
        return [name for name in all_names if name not in self.missing[kind]]

    def row(self, table: str, key: str, measure: Callable[[], Row]) -> Row:
        rows = self.rows.setdefault(table, {})
        if key not in rows:
            rows[key] = measure()
        return rows[key]

    def reparametrization(self, case: Case) -> Row:
        budget = self.budget(reparametrization.BUDGET)
        names = self.names("weights", reparametrization.contenders(case))
        return self.row(
            "reparametrization",
            case.name,
            lambda: reparametrization.measure(case, names, budget, device=self.device),
        )

    def grouped(self, kind: str) -> Row:
        budget = self.budget(grouped.BUDGET)
        names = self.names("weights", peers.BUILDERS)
        return self.row(
            "grouped", kind, lambda: grouped.measure(kind, names, budget, device=self.device)
        )

    def step(self, model: str) -> Row:
        budget = self.budget(step.BUDGET)
        names = self.names("nets", nets.LIBRARIES)
        return self.row("step", model, lambda: step.measure(model, names, budget, self.device))

    def write(self) -> list[str]:
        """One JSON file for each table that was measured; says what was written, or why not."""
        said = []
        for table, rows in self.rows.items():
            if self.out is None and len(rows) < WHOLE[table]:
                said.append(
                    f"not written: {table}, {len(rows)} of {WHOLE[table]} rows; --bench-out"
                )
                continue
            folder = (self.out or RESULTS) / machine.folder_name(self.device)
            folder.mkdir(parents=True, exist_ok=True)
            content = {
                "table": table,
                **self.about,
                "missing": self.missing["nets" if table == "step" else "weights"],
                # The samples are pytest-benchmark's to keep (--benchmark-json).
                "rows": [{k: v for k, v in r.items() if k != "samples"} for r in rows.values()],
            }
            file = folder / f"{table}.json"
            file.write_text(json.dumps(content, indent=1) + "\n")
            said.append(f"written: {file}")
        return said


_TABLES = pytest.StashKey[Tables]()


@pytest.fixture(scope="session")
def tables(pytestconfig: pytest.Config) -> Tables:
    pytestconfig.stash[_TABLES] = Tables(pytestconfig)
    return pytestconfig.stash[_TABLES]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    measured = config.stash.get(_TABLES, None)
    if measured is None:
        return
    for name, rows in measured.rows.items():
        terminalreporter.section(name)
        terminalreporter.write_line(TABLES[name](list(rows.values())))
    for reasons in measured.missing.values():
        if reasons:
            terminalreporter.write_line(format_missing(reasons))
    if measured.enabled:
        for line in measured.write():
            terminalreporter.write_line(line)
