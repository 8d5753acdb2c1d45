"""compute-sanitizer's four tools over :mod:`bench.gpu.sanitize`, at the same time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu import sanitize
from bench.gpu.attempts import attempt
from bench.gpu.correctness import ROOT
from bench.gpu.table import about, options, write_json

PROGRAM = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_FOUND = 77  # the exit status that says: the tool found something
_LINES = 12


def _start(tool: str, output: Path, device: str) -> subprocess.Popen[bytes]:
    command = [PROGRAM, "--tool", tool, "--error-exitcode", str(_FOUND)]
    script = [sys.executable, "-m", "bench.gpu.sanitize", "--device", device]
    # torch's allocator would hide what lies between two tensors.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with output.open("wb") as file:
        return subprocess.Popen(
            [*command, *script], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
        )


def verdict(status: int | None, text: str) -> dict[str, Any]:
    """What a tool's exit status (None: out of time) and output say."""
    lines = text.splitlines()
    ops = [line for line in lines if re.fullmatch(r"[a-z0-9_]+ (triton|cuda)", line)]
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    if status is None:
        state = "out of time"
    elif status == _FOUND:
        state = "found errors"
    elif status == 0 and summaries:
        state = "clean"
    else:
        state = f"did not run: status {status}"
    of_tool = [line for line in lines if line.startswith("=========")]
    said = of_tool[:_LINES] if state == "found errors" else lines[-_LINES:]
    return {
        "state": state,
        "summary": summaries[-1] if summaries else None,
        "ops": ops,
        "said": [] if state == "clean" else said,
    }


def _run(device: str, deadline: float, folder: Path) -> dict[str, dict[str, Any]]:
    outputs = {tool: folder / tool for tool in TOOLS}
    processes = {tool: _start(tool, output, device) for tool, output in outputs.items()}
    found = {}
    for tool, process in processes.items():
        try:
            status = process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
        found[tool] = verdict(status, outputs[tool].read_text(errors="replace"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    found = options("sanitizers", "compute-sanitizer over every op.", argv)
    device = str(found.device)
    content = {"table": "sanitizers", **about(found.device, found.command)}
    content |= {"dry_run": found.dry_run, "tools": {}, "script": None}
    if found.dry_run or shutil.which(PROGRAM) is None:
        failed: dict[str, str] = {}
        attempt("script", lambda: sanitize.main(["--device", device]), failed, found.device)
        content["script"] = failed.get("script", "ran, watched by no tool")
        why = "dry run" if found.dry_run else f"{PROGRAM} is not on PATH"
        content["not_possible"] = why
    else:
        with tempfile.TemporaryDirectory() as folder:
            content["tools"] = _run(device, found.deadline, Path(folder))
    write_json(found.out / "sanitizers.json", content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
