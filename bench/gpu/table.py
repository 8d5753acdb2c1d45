"""A result file that grows row by row: what was measured is there, however the process ends."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lipkernels
from bench import machine
from bench.gpu.attempts import attempt

Row = dict[str, Any]


def options(
    module: str,
    what: str,
    argv: Sequence[str] | None = None,
    more: Callable[[argparse.ArgumentParser], object] | None = None,
) -> argparse.Namespace:
    """The arguments that every step takes; ``more`` adds others."""
    p = argparse.ArgumentParser(prog=f"python -m bench.gpu.{module}", description=what)
    p.add_argument("--out", type=Path, required=True, help="folder of results")
    p.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    p.add_argument("--dry-run", action="store_true", help="tiny shapes: shows that it works")
    p.add_argument("--seconds", type=float, default=120.0, help="no row begins later than this")
    if more is not None:
        more(p)
    arguments = sys.argv[1:] if argv is None else list(argv)
    found = p.parse_args(arguments)
    found.command = shlex.join(["python", "-m", f"bench.gpu.{module}", *arguments])
    found.deadline = time.monotonic() + found.seconds
    gc.collect()
    gc.freeze()  # what is imported stays; timings collect garbage before they begin
    found.device = torch.device(found.device)
    if found.device.type == "cuda":
        if not torch.cuda.is_available():
            p.error("--device: expected a CUDA device to be there, got none; --device cpu")
        if found.device.index is None:
            found.device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(found.device)
    return found


def _triton_version() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def about(device: torch.device, command: str) -> dict[str, Any]:
    """The head of a result file."""
    head = machine.about(device, command)
    versions = {"triton": _triton_version(), "cuda": torch.version.cuda}
    head["versions"] |= {**versions, "lipkernels": lipkernels.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        head |= {
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "cache_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return head


def write_json(file: Path, content: Any) -> None:
    """In one step: a reader never finds half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, file)


class Table:
    """Rows by case. A process that takes the place of one that crashed goes on behind its rows.

    ``missing``: who cannot take part, and why; it may grow with the rows.
    """

    def __init__(self, name: str, found: argparse.Namespace, missing: Mapping[str, str]) -> None:
        self.file: Path = found.out / f"{name}.json"
        self.device: torch.device = found.device
        self.deadline: float = found.deadline
        rows: list[Row] = []
        if self.file.is_file():
            rows = json.loads(self.file.read_text())["rows"]
        for row in rows:
            if row["state"] == "started":
                row["state"] = "crashed"
        head = {"table": name, **about(self.device, found.command), "dry_run": found.dry_run}
        self.content = {**head, "missing": missing, "rows": rows, "not_measured": []}

    def measure(self, cases: Mapping[str, Callable[[], Row]]) -> None:
        """A row for each case, in order, until time is up; the rest are named."""
        rows = self.content["rows"]
        known = {row["case"] for row in rows}
        coming = [case for case in cases if case not in known]
        while coming and time.monotonic() <= self.deadline:
            # Written before the row is measured, which may be the process's end.
            case, *coming = coming
            make, start = cases[case], time.monotonic()
            self.content["not_measured"] = coming
            row: Row = {"case": case, "state": "started"}
            rows.append(row)
            self._write()
            failed: dict[str, str] = {}
            try:
                found = attempt(case, make, failed, self.device)
                row |= {"state": "failed"} if found is None else {"state": "measured", **found}
            finally:  # if the device is lost, this is the process's last row
                row |= {"reason": failed.get(case), "took_seconds": time.monotonic() - start}
                self._write()
        self.content["not_measured"] = coming
        self._write()

    def _write(self) -> None:
        write_json(self.file, self.content)
