"""summary.md out of the result files: what ran, what it found, what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.rows import faults

Content = dict[str, Any]
Row = dict[str, Any]

CORRECTNESS, SANITIZERS, RATES = "correctness", "sanitizers", "rates"
TABLES = ("ops", "models", "train_step")
LEGEND = """\
Times: medians (quartiles) in ms of one call, queued, inputs rotating past the cache (the other
libraries' do not); both: forward and backward. / first: over the table's first line, round by
round. / floor: over the least time for the bytes and products (an estimate: bench/gpu/floors.py).
launches: kernels (+ copies) of a call. norm - 1: of the worst weight; a bound holds where it is at
most 0. orthogonality: |U U^T - I|_2. value, gradient: worst relative errors against float64.
"""
_SHOWN = 40  # failures, reasons


def load(file: Path) -> Content:
    """A result file; {} if there is none."""
    return json.loads(file.read_text()) if file.is_file() else {}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _items(title: str, found: Sequence[str]) -> list[str]:
    more = [f"- and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return [title, "", *[f"- {item}" for item in found[:_SHOWN]], *more, ""] if found else []


# ------------------------------------------------------------------------------- correctness
def _correctness(content: Content) -> list[str]:
    if "not_possible" in content:
        return [f"Not run: {content['not_possible']}.", ""]
    if "collected" not in content:
        return ["No result: see the steps, and log.txt.", ""]
    keys = ("collected", "passed", "failed", "skipped", "not_run")
    names = [key.replace("_", " ") for key in keys]
    lines = [*_table(names, [[str(content[key]) for key in keys]]), ""]
    lines += _items("Failed:", [f"`{t}`: {why}" for t, why in content["failures"].items()])
    lines += _items("Not collected:", [f"`{t}`: {w}" for t, w in content["uncollected"].items()])
    lines += _items("Processes that did not come to their end:", content["unfinished"])
    return lines + _items("Skipped:", [f"{n}: {why}" for why, n in content["skips"].items()])


def _complete(content: Content) -> bool:
    """Whether every test was run to its end."""
    return (
        "collected" in content
        and content["collected"] > 0
        and (content["passed"] > 0 or content["dry_run"])
        and not (content["not_run"] or content["uncollected"] or content["unfinished"])
    )


def _sanitizers(content: Content) -> list[str]:
    lines = []
    if content.get("not_possible"):
        script = content.get("script")
        lines += [f"Not run: {content['not_possible']}. The script by itself: {script}.", ""]
    rows = [
        [tool, found["state"], found["summary"] or "-", f"{len(found['ops'])} ops"]
        for tool, found in content.get("tools", {}).items()
    ]
    lines += [*_table(["tool", "state", "summary", "called"], rows), ""] if rows else []
    for tool, found in content.get("tools", {}).items():
        lines += _items(f"{tool}:", [f"`{line}`" for line in found["said"]])
    return lines or ["No result: see the steps, and log.txt.", ""]


# ------------------------------------------------------------------------------------- times
def _rates(content: Content) -> list[str]:
    rows = []
    for row in content.get("rows", []):
        found = row.get("per_second") or row.get("seconds")
        if found is None:
            rows.append([row["case"], row["state"], row.get("reason") or "-", ""])
            continue
        quartiles = f"{found['low']:.4g} .. {found['high']:.4g}"
        rows.append([row["case"], f"{found['median']:.4g}", quartiles, row["unit"]])
    return [*_table(["rate", "median", "quartiles", "unit"], rows), ""]


def _launches(figures: Row, which: str) -> str:
    found = (figures.get("launches") or {}).get(which)
    if not found:
        return "-"
    return f"{found['kernels']}" + (f" + {found['copies']}" if found["copies"] else "")


def _line(row: Row, name: str) -> list[str]:
    figures = row["contenders"][name]
    cells = [name]
    for which in row["passes"]:
        found = figures[which]
        ms, ratio = found["ms"], found["times_first"]
        cells += [
            f"{ms['median']:.4g} ({ms['low']:.4g} .. {ms['high']:.4g})",
            "-" if ratio is None else f"{ratio['median']:.3g}",
            _number(found["times_floor"], ".3g"),
            _launches(figures, which),
        ]
    accuracy = figures.get("accuracy") or {}
    keys = ("norm_minus_1", "orthogonality", "value", "gradient")
    return cells + [_number(accuracy.get(key), ".1e") for key in keys]


def _row(row: Row) -> list[str]:
    title = f"**{row['case']}**"
    if row["state"] == "started":
        return [f"{title}: it was being measured when the step was ended.", ""]
    if row["state"] != "measured":
        return [f"{title}: {row['state']}, {row.get('reason')}", ""]
    floors = [
        f"floor of {which} {found['ms']:.4g} ms"
        for which, found in row["floor"].items()
        if found["ms"] is not None
    ]
    head = [""]
    for which in row["passes"]:
        head += [f"{which} ms", "/ first", "/ floor", "launches"]
    head += ["norm - 1", "orthogonality", "value", "gradient"]
    lines = [", ".join([title, *floors]), ""]
    lines += [*_table(head, [_line(row, name) for name in row["contenders"]]), ""]
    return lines + _items("Failed:", [f"{n}: {why}" for n, why in row["failed"].items()])


def _measured(content: Content) -> list[str]:
    lines = [line for row in content.get("rows", []) for line in _row(row)]
    lines += _items("Not measured, out of time:", content.get("not_measured", []))
    return lines + _items("Missing:", [f"{n}: {w}" for n, w in content.get("missing", {}).items()])


# ----------------------------------------------------------------------------------- the whole
def _lacks(content: Content) -> str:
    """What the step had no time for."""
    rows, tests = content.get("not_measured", []), content.get("not_run", 0)
    late = [t for t, found in content.get("tools", {}).items() if found["state"] == "out of time"]
    found = [f"{len(rows)} rows not measured"] if rows else []
    found += [f"{tests} tests not run"] if tests else []
    found += [f"{tool} out of time" for tool in late]
    return "".join(f", {what}" for what in found)


def _head(contents: Mapping[str, Content]) -> list[str]:
    content = next((c for c in contents.values() if "versions" in c), None)
    if content is None:
        return []
    versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items() if v)
    lines = [f"{content['device_name']} ({content['device']}); {versions}.", ""]
    if content["dry_run"]:
        lines += ["A dry run: tiny shapes on the CPU. No figure here means anything.", ""]
    return lines


def verdict(contents: Mapping[str, Content], ran: Sequence[Row]) -> tuple[list[str], int]:
    """What is wrong, and the exit status."""
    wrong, status = [], 0
    tests = contents.get(CORRECTNESS, {})
    wrong += [f"{tests['failed']} tests failed"] if tests.get("failed") else []
    for tool, found in contents.get(SANITIZERS, {}).get("tools", {}).items():
        wrong += [f"{tool} found errors"] if found["state"] == "found errors" else []
    script = contents.get(SANITIZERS, {}).get("script")
    wrong += [f"the sanitizers' script: {script}"] if script and "ran" not in script else []
    wrong += [f for t in TABLES for f in faults(contents.get(t, {}).get("rows", []))]
    wrong += [f"{row['step']} crashed" for row in ran if row["state"] == "crashed"]
    if wrong:
        status = 1
    elif any(row["step"] == CORRECTNESS for row in ran) and not _complete(tests):
        wrong.append("correctness is not shown: the tests did not all run")
        status = 2
    return wrong, status


def summary(out: Path, ran: Sequence[Row], notes: Sequence[str]) -> tuple[str, int]:
    """summary.md's text and the exit status, from the files in ``out`` of the steps that ran."""
    contents = {row["step"]: load(out / f"{row['step']}.json") for row in ran}
    wrong, status = verdict(contents, ran)
    lines = ["# GPU results", "", *_head(contents)]
    lines += _items("**Wrong:**", wrong) if wrong else ["Nothing wrong was found.", ""]
    lines += _items("Notes:", notes)
    steps = [
        [
            row["step"],
            row["state"] + _lacks(contents[row["step"]]),
            *(f"{row[key]:.1f}" for key in ("seconds", "limit")),
            str(row["starts"]),
        ]
        for row in ran
    ]
    lines += ["## Steps", "", *_table(["step", "state", "s", "limit s", "starts"], steps), ""]
    lines += [LEGEND] if set(TABLES) & set(contents) else []
    sections = {CORRECTNESS: _correctness, SANITIZERS: _sanitizers, RATES: _rates}
    for step, content in contents.items():
        lines += [f"## {step}", "", *sections.get(step, _measured)(content)]
    return "\n".join(lines).rstrip() + "\n", status
