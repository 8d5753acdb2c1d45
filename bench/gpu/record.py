"""A pytest plugin: writes each test's outcome as it comes, and takes one share of the tests.

``pytest -p bench.gpu.record --record FILE --shard 0/4``. A test function's cases stay together,
since they share compiled kernels. What ran before a crash or a time limit is in the file.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

_LONGEST = 400


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="file of one JSON object a line")
    parser.addoption("--shard", default="0/1", help="i/n: take the i-th of n shares of the tests")


class _Recorder:
    def __init__(self, file: Path, shard: str) -> None:
        self.file = file
        self.mine, self.shares = map(int, shard.split("/"))

    def write(self, **said: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(said) + "\n")

    @pytest.hookimpl(trylast=True)  # after -m has deselected
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        others = [item for item in items if not self._is_mine(item.nodeid)]
        items[:] = [item for item in items if self._is_mine(item.nodeid)]
        config.hook.pytest_deselected(items=others)
        self.write(collected=len(items))

    def _is_mine(self, test: str) -> bool:
        return zlib.crc32(test.partition("[")[0].encode()) % self.shares == self.mine

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(uncollected=report.nodeid, why=_end_of(report.longreprtext))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = None
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                why = report.longrepr[2]
            elif report.outcome == "failed":
                why = _end_of(report.longreprtext)
            self.write(test=report.nodeid, outcome=report.outcome, why=why)


def _end_of(text: str) -> str:
    """The lines that say what went wrong, or the last ones."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("E ")]
    return " / ".join(lines or text.splitlines()[-3:])[:_LONGEST]


def pytest_configure(config: pytest.Config) -> None:
    options: Any = config.option
    if options.record is not None:
        config.pluginmanager.register(_Recorder(options.record, options.shard), "gpu-recorder")
