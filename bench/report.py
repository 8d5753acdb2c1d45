"""The tables as text, from what was measured: `python -m bench` reads the result files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import KINDS, SPEED_KINDS
from bench.timing import geometric_mean

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
BOTH = "both"  # kinds of weights that speed is claimed for


def geometric_means(rows: Sequence[Row], name: str) -> dict[str, float]:
    """Of ``name``'s time over ours: by kind of weight, and over the kinds of the speed claim."""
    groups = {kind: [r for r in rows if r["kind"] == kind] for kind in KINDS}
    groups[BOTH] = [r for r in rows if r["kind"] in SPEED_KINDS]
    return {
        group: geometric_mean(r["contenders"][name]["times_ours"]["median"] for r in members)
        for group, members in groups.items()
        if members and all(name in r["contenders"] for r in members)
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(ratio: dict[str, float]) -> str:
    quartiles = f"{ratio['low']:.2f}..{ratio['high']:.2f}"
    return f"{ratio['median']:>8.2f}{quartiles:>15}"


WEIGHT_HEAD = (
    f"{'weight':<28}{'condition':>10}  {'':<20}{'ms':>9}{'/ ours':>8}{'quartiles':>15}"
    f"{'|UU*-I|':>10}{'norm - 1':>10}{'|U-U*|':>10}{'grad. err.':>11}{'kept':>7}"
)


def format_weights(row: Row) -> str:
    """One line for each contender; kept: bytes until backward over the weight's bytes."""
    lines = []
    for name, c in row["contenders"].items():
        label = f"{row['case']:<28}{row['condition']:>10.3g}  " if not lines else " " * 40
        lines.append(
            f"{label}{name:<20}{c['ms']['median']:>9.3f}{_ratio(c['times_ours'])}"
            f"{c['orthogonality']:>10.1e}{c['norm'] - 1:>10.1e}{_number(c['polar'], '.1e'):>10}"
            f"{_number(c['gradient'], '.1e'):>11}{c['kept_over_weight']:>7.2f}"
        )
    return "\n".join(lines)


def format_means(rows: Sequence[Row]) -> str:
    """The geometric means at the end of the table of weights."""
    lines = []
    for name in dict.fromkeys(n for r in rows for n in r["contenders"]):
        means = geometric_means(rows, name)
        said = "".join(f"  {group} {mean:.2f}" for group, mean in means.items())
        lines.append(f"{name:<20}{said}")
    return "\n".join(["Geometric means of the time over ours:", *lines])


def format_reparametrization(rows: Sequence[Row]) -> str:
    """W -> W_bar and its backward, for every shape and kind of weight."""
    return "\n".join([WEIGHT_HEAD, *map(format_weights, rows), "", format_means(rows)])


def format_grouped(rows: Sequence[Row]) -> str:
    """Many small weights; "ours" is the grouped call."""
    return "\n".join([WEIGHT_HEAD, *map(format_weights, rows)])


def _constant(low: float, high: float) -> str:
    if high - low < 1e-4:
        return f"{high:.7f}"
    return f"{low:.2f} .. {high:.2f}"


def format_step(rows: Sequence[Row]) -> str:
    """A training step of each network."""
    head = (
        f"{'':<22}{'ms':>9}{'/ twin':>8}{'quartiles':>15}{'peak MB':>9}{'kept MB':>9}"
        f"{'Lipschitz constant':>22}{'steps':>7}"
    )
    lines = []
    for row in rows:
        title = f"{row['case']}: {row['shape']}, batch {row['batch']}, {row['optimizer']}"
        lines += ["", title, head]
        for name, c in row["contenders"].items():
            constant = _constant(c["lipschitz_at_least"], c["lipschitz_at_most"])
            lines.append(
                f"{name:<22}{c['ms']['median']:>9.2f}{_ratio(c['times_twin'])}"
                f"{c['peak_bytes'] / 1e6:>9.1f}{c['kept_bytes'] / 1e6:>9.1f}"
                f"{constant:>22}{c['steps']:>7}"
            )
    return "\n".join(lines[1:])


def format_missing(reasons: dict[str, str]) -> str:
    """Who did not take part, and why."""
    return "\n".join(f"MISSING {name}: {reason}" for name, reason in reasons.items())


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "reparametrization": format_reparametrization,
    "grouped": format_grouped,
    "step": format_step,
}


def format_result(result: dict[str, Any]) -> str:
    """One result file: where it was measured, the table, who was missing."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    head = f"{result['device_name']}, {result['threads']} threads; {versions}"
    parts = [f"== {result['table']} ==", head, TABLES[result["table"]](result["rows"])]
    if result["missing"]:
        parts.append(format_missing(result["missing"]))
    return "\n".join(parts)
