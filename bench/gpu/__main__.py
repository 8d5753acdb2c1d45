"""`make gpu`: every step in a process and a share of the time of its own, then summary.md.

Exit status: 0; 1 where a test failed, a sanitizer found something or our own kernels failed in a
benchmark; 2 where correctness was not shown, since the tests did not or not all run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu import (
    correctness,
    isolated,
    library,
    models,
    ops,
    rates,
    report,
    sanitizers,
    train_step,
)
from bench.gpu.budget import Budget

SECONDS = 500.0  # of less than 9 minutes, imports and the ending of processes not counted


@dataclass(frozen=True)
class Step:
    """``weight``: of the time. ``main(argv)`` writes the step's own result file."""

    main: Callable[[Sequence[str]], int]
    weight: float
    grows: bool = True  # row by row: a crash costs one row, and the step goes on


STEPS = {
    "correctness": Step(correctness.main, 180, grows=False),
    "sanitizers": Step(sanitizers.main, 75, grows=False),
    "rates": Step(rates.main, 15),
    "ops": Step(ops.main, 100),
    "models": Step(models.main, 90),
    "train_step": Step(train_step.main, 60),
}
# Of a step's share, what is left for ending the row that is being measured.
_MARGIN = 0.15
_MOST_STARTS = 4
DRY_TESTS = correctness.ROOT / "tests" / "test_gpu.py"

Row = dict[str, Any]


def _rows(file: Path) -> int:
    return len(report.load(file).get("rows", [])) if file.is_file() else 0


def run_step(name: str, step: Step, seconds: float, out: Path, arguments: list[str]) -> Row:
    """Runs until the step is done or its time is up; starts it again behind a row that crashed."""
    start, log, file = time.monotonic(), out / "log.txt", out / f"{name}.json"
    state, starts = "crashed", 0
    while state == "crashed" and starts < (_MOST_STARTS if step.grows else 1):
        left = seconds - (time.monotonic() - start)
        known = _rows(file)
        argv = ["--out", str(out), "--seconds", f"{left * (1 - _MARGIN):.1f}", *arguments]
        with log.open("a") as text:
            text.write(f"\n== {name} ==\n")
        status = isolated.run(step.main, argv, log, left)
        starts += 1
        state = {0: "done", None: "out of time"}.get(status, "crashed")
        if state == "crashed" and starts > 1 and _rows(file) == known:
            break  # it does not get on
    return {
        "step": name,
        "state": state,
        "seconds": time.monotonic() - start,
        "limit": seconds,
        "starts": starts,
    }


def _install(wheels: Path, site: Path) -> str | None:
    """The wheels of a folder into ``site``, from nowhere else; why that failed, or None."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        return f"no wheels in {wheels}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", str(site), *files], capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else done.stderr.strip()[-500:]


def _has_device(argv: Sequence[str]) -> int:
    return 0 if torch.cuda.is_available() else 1


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    p.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of results")
    p.add_argument("--seconds", type=float, default=SECONDS, help="for all steps (default: 500)")
    p.add_argument("--spent", type=float, default=0.0, help="seconds of those that are gone")
    p.add_argument("--note", action="append", default=[], help="a line for the summary")
    p.add_argument("--device", default="cuda", help="cuda or cuda:N (default: cuda)")
    p.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    p.add_argument("--wheels", type=Path, help="folder of wheels to use besides what is installed")
    p.add_argument("--tests", type=Path, nargs="+", help="files of tests (default: all marked gpu)")
    p.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = _parser().parse_args(argv)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in options.steps:  # an old result would be taken for this run's
        (out / f"{name}.json").unlink(missing_ok=True)
    (out / "log.txt").write_text("")
    budget = Budget(
        options.seconds - options.spent, {name: STEPS[name].weight for name in options.steps}
    )
    device = "cpu" if options.dry_run else options.device
    arguments = ["--device", device, *(["--dry-run"] if options.dry_run else [])]
    if not options.dry_run and isolated.run(_has_device, [], out / "log.txt", 60.0) != 0:
        print("python -m bench.gpu: expected a CUDA device, got none; --dry-run", file=sys.stderr)
        return 2
    # On a CPU all of them are skipped: one file shows that they are collected.
    tests = options.tests or ([DRY_TESTS] if options.dry_run else [])
    text, status, notes, ran = "", 0, list(options.note), []
    with tempfile.TemporaryDirectory() as site:
        if options.wheels:
            reason = _install(options.wheels, Path(site))
            notes += [f"--wheels: {reason}"] if reason else []
            sys.path.insert(0, site)
            path = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = os.pathsep.join([site, *([path] if path else [])])
        for name in options.steps:
            own = ["--tests", *map(str, tests)] if name == "correctness" and tests else []
            step, share = STEPS[name], budget.share(name)
            row = run_step(name, step, share, out, [*arguments, *own])
            ran.append(row)
            print(f"{name:<12} {row['state']:<12} {row['seconds']:6.1f} s", flush=True)
            # After each step: whatever ends this process, a summary is there.
            text, status = report.summary(out, ran, notes)
            (out / "summary.md").write_text(text)
    print(text)
    return status


if __name__ == "__main__":
    arguments = sys.argv[1:]
    raise SystemExit(library.with_library(main, arguments, _parser().parse_args(arguments).out))
