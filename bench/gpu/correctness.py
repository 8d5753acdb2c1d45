"""The tests marked ``gpu``, in several processes at once: most of their time is compilation."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.table import about, options, write_json

ROOT = Path(__file__).parents[2]
_MENTIONS = re.compile(r"\bgpu\b|on_(gpu_)?backends|cuda_kernels")
_MOST_WORKERS = 6


def test_files() -> list[Path]:
    """The files under tests/ that may have tests with the mark."""
    return [
        f for f in sorted((ROOT / "tests").glob("test_*.py")) if _MENTIONS.search(f.read_text())
    ]


def _arguments(files: Sequence[Path], record: Path, shard: str) -> list[str]:
    # What pyproject.toml adds needs plugins that may be missing; so do the conftests.
    lacking = importlib.util.find_spec("hypothesis") is None
    own = ["--noconftest"] if lacking else []
    return [
        *(sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts=", "-q", "--tb=short"),
        *("-p", "no:cacheprovider", "-p", "bench.gpu.record", "--continue-on-collection-errors"),
        *(*own, "--record", str(record), "--shard", shard, *map(str, files)),
    ]


def _read(record: Path) -> list[dict[str, Any]]:
    # A line that was being written when the process ended is no line.
    lines = record.read_text().split("\n")[:-1] if record.is_file() else []
    return [json.loads(line) for line in lines]


def _run(files: Sequence[Path], workers: int, deadline: float, folder: Path) -> list[list[dict]]:
    """What each worker recorded; those that are not done by the deadline are ended."""
    records = [folder / f"{i}.jsonl" for i in range(workers)]
    processes = [
        subprocess.Popen(
            _arguments(files, record, f"{i}/{workers}"),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for i, record in enumerate(records)
    ]
    endings = []
    for process in processes:
        try:
            endings.append(process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            endings.append("out of time")
    return [[*_read(r), {"ending": e}] for r, e in zip(records, endings, strict=True)]


def summarize(workers: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Counts, failures with reasons, reasons of skips, and what did not come to its end."""
    said = [line for worker in workers for line in worker]
    tests = [line for line in said if "test" in line]
    outcomes = Counter(t["outcome"] for t in tests)
    endings = [line["ending"] for line in said if "ending" in line]
    # pytest's 0: passed; 1: some failed; 5: this share is empty.
    unfinished = [str(e) for e in endings if e not in (0, 1, 5)]
    collected = sum(line.get("collected", 0) for line in said)
    errors = {line["uncollected"]: line["why"] for line in said if "uncollected" in line}
    return {
        "collected": collected,
        "passed": outcomes["passed"],
        "failed": outcomes["failed"],
        "skipped": outcomes["skipped"],
        "not_run": collected - len({t["test"] for t in tests}),
        "failures": {t["test"]: t["why"] for t in tests if t["outcome"] == "failed"},
        "skips": dict(Counter(t["why"] for t in tests if t["outcome"] == "skipped").most_common()),
        "uncollected": errors,
        "unfinished": unfinished,
    }


def _more(p: argparse.ArgumentParser) -> None:
    p.add_argument("--tests", type=Path, nargs="+", help="files (default: all with the mark)")


def main(argv: Sequence[str] | None = None) -> int:
    found = options("correctness", "The tests marked gpu.", argv, _more)
    content = {"table": "correctness", **about(found.device, found.command)}
    content["dry_run"] = found.dry_run
    file = found.out / "correctness.json"
    if importlib.util.find_spec("pytest") is None:
        reason = "pytest is not installed (WHEELS=folder with its wheels)"
        write_json(file, {**content, "not_possible": reason})
        return 0
    files = found.tests or test_files()
    workers = 1 if found.dry_run else max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) // 2))
    with tempfile.TemporaryDirectory() as folder:
        recorded = _run(files, workers, found.deadline, Path(folder))
    names = [str(f.relative_to(ROOT)) if f.is_relative_to(ROOT) else str(f) for f in files]
    write_json(file, {**content, "files": names, "workers": workers, **summarize(recorded)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
