"""The pictures of the README: how many times longer the others take, and what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from bench.cases import SPEED_KINDS
from bench.peers import OURS
from bench.report import BOTH, Row, geometric_means
from lipkernels.demo.plot import BLUE, EDGE, GREY, GRID, INK, VERMILLION

# Okabe and Ito's palette, as in the demo's picture; a marker each for those who see no colour.
LOOKS = {
    "deel-torchlip": (VERMILLION, "o"),
    "orthogonium": ("#009E73", "s"),
    "torch orthogonal": ("#CC79A7", "D"),
}
KIND_NAMES = {"gaussian": "Gaussian weights", "near_orthogonal": "Nearly orthogonal weights"}
_RATIO_TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_MS_TICKS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)


def _canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style(ax: Axes, low: float, high: float, ticks: Sequence[float], unit: str) -> None:
    """A logarithmic x axis from ``low`` to ``high``; rows, and no frame."""
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,g}{unit}")
    ax.grid(axis="x", color=GRID, linewidth=0.9)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(EDGE)
    ax.tick_params(length=0, labelsize=11.5, colors=GREY, pad=6)


def _title(figure: Figure, title: str, subtitle: str) -> None:
    height = figure.get_size_inches()[1]
    figure.text(0.03, 1 - 0.38 / height, title, fontsize=17, fontweight="bold", color=INK,
                va="center")  # fmt: skip
    size = min(11.5, 1430 / len(subtitle))  # the names of some devices are long
    figure.text(0.03, 1 - 0.74 / height, subtitle, fontsize=size, color=GREY, va="center")


def _where(result: dict[str, Any]) -> str:
    threads = result["threads"]
    plural = "" if threads == 1 else "s"
    return f"{result['device_name']}, {threads} thread{plural}, torch {result['versions']['torch']}"


def _ratios(ax: Axes, rows: list[Row], names: list[str], kind: str) -> None:
    """Each row's ratios with their quartiles, and the geometric means below."""
    members = [r for r in rows if r["kind"] == kind]
    bottom = len(members) + 0.45
    for i, name in enumerate(names):
        color, marker = LOOKS[name]
        for y, row in enumerate(members):
            ratio = row["contenders"][name]["times_ours"]
            ax.plot([ratio["low"], ratio["high"]], [y, y], color=color, linewidth=2, alpha=0.45)
            ax.plot(
                ratio["median"], y, marker, color=color, markersize=8,
                markeredgecolor="white", markeredgewidth=1,
            )  # fmt: skip
        mean = geometric_means(rows, name)[kind]
        ax.plot(mean, bottom, marker, color=color, markersize=10)
        # Neighbours may be close: their labels go below and above in turns.
        ax.annotate(
            f"{mean:.1f}x", (mean, bottom), (0, 16 if i % 2 else -16), textcoords="offset points",
            color=color, fontsize=11.5, fontweight="bold", ha="center", va="center",
        )  # fmt: skip
    ax.axvline(1.0, color=BLUE, linewidth=2.4)
    labels = [f"{r['shape'][0]} x {r['shape'][1]}" for r in members]
    ax.set_yticks([*range(len(members)), bottom], [*labels, "geometric mean"])
    ax.set_ylim(bottom + 0.85, -0.6)
    ax.set_title(KIND_NAMES[kind], fontsize=13, color=INK, loc="left", pad=8)


def draw_reparametrization(path: Path, result: dict[str, Any]) -> None:
    """How many times our time the others take, by shape, one panel for each kind of weights."""
    rows: list[Row] = [r for r in result["rows"] if r["kind"] in SPEED_KINDS]
    names = [n for n in LOOKS if all(n in r["contenders"] for r in rows)]
    kinds = [k for k in SPEED_KINDS if any(r["kind"] == k for r in rows)]
    ratios = [r["contenders"][n]["times_ours"] for r in rows for n in names]
    ends = [1.0, *(ratio[end] for ratio in ratios for end in ("low", "high"))]
    figure = _canvas(11.0, 6.4)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.155, right=0.975, top=0.75, bottom=0.075, wspace=0.07)
    for ax, kind in zip(axes, kinds, strict=True):
        _ratios(ax, rows, names, kind)
        _style(ax, 0.85 * min(ends), 1.15 * max(ends), _RATIO_TICKS, "x")
    means = [f"{n} takes {geometric_means(rows, n)[BOTH]:.1f} times as long" for n in names[:2]]
    title = ", ".join(means) or "No other library was there"
    _title(figure, title, f"Forward and backward of a constrained weight. {_where(result)}")
    for i, name in enumerate([OURS, *names]):
        color, marker = LOOKS.get(name, (BLUE, "|"))
        x, y = 0.163 + 0.2 * i, 0.842
        figure.add_artist(
            Line2D([x], [y], color=color, marker=marker, markersize=9, markeredgewidth=2)
        )
        figure.text(
            x + 0.013, y, name, fontsize=12, color=color, va="center", fontweight="bold"
        )  # fmt: skip
    figure.savefig(path)


def said_constant(low: float, high: float) -> str:
    """The bracket of a Lipschitz constant in few characters; never closer to 1 than it is."""
    if abs(high - 1) < 1e-3:
        return f"at most 1 {'+' if high > 1 else '-'} {abs(high - 1):.0e}"
    if high < 1:
        return f"at most {high:#.3g}"
    return f"{low:.1f} to {high:.1f}"


def _steps(ax: Axes, row: Row) -> None:
    for y, (name, c) in enumerate(row["contenders"].items()):
        ours = name.startswith(OURS)
        color = BLUE if ours else GREY if name.startswith("unconstrained") else VERMILLION
        ms, ratio = c["ms"], c["times_twin"]["median"]
        ax.plot([ms["low"], ms["high"]], [y, y], color=color, linewidth=2, alpha=0.45)
        ax.plot(ms["median"], y, "o", color=color, markersize=9, markeredgecolor="white")
        ax.annotate(
            f"{ms['median']:,.1f} ms  {ratio:.1f}x", (ms["high"], y), (8, 0),
            textcoords="offset points", color=color, fontsize=11, va="center",
            fontweight="bold" if ours else "normal",
        )  # fmt: skip
        constant = said_constant(c["lipschitz_at_least"], c["lipschitz_at_most"])
        ax.text(
            1.02, y, constant, transform=ax.get_yaxis_transform(), fontsize=11, color=color,
            va="center",
        )  # fmt: skip
    ax.set_yticks(range(len(row["contenders"])), list(row["contenders"]))
    ax.set_ylim(len(row["contenders"]) - 0.4, -0.9)
    ax.set_title(
        f"{row['shape']}, batch {row['batch']}", fontsize=12.5, color=INK, loc="left", pad=8
    )


def draw_step(path: Path, result: dict[str, Any]) -> None:
    """Milliseconds for a training step of each network, with the Lipschitz constant it leaves."""
    rows = result["rows"]
    figure = _canvas(11.0, 1.7 + 3.2 * len(rows))
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    top = 1 - 1.5 / figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.19, right=0.82, top=top, bottom=0.07, hspace=0.32)
    for ax, row in zip(axes, rows, strict=True):
        _steps(ax, row)
        times = [c["ms"][end] for c in row["contenders"].values() for end in ("low", "high")]
        # Room on the right for the label of the slowest.
        span = max(times) / min(times)
        _style(ax, 0.7 * min(times), max(times) * span**0.35, _MS_TICKS, " ms")
        ax.text(
            1.02, -0.8, "Lipschitz constant", transform=ax.get_yaxis_transform(), fontsize=11,
            color=GREY, va="center",
        )  # fmt: skip
    _title(
        figure, "What a constraint costs in a training step",
        f"Forward, backward and optimizer; x: times the unconstrained net's. {_where(result)}",
    )  # fmt: skip
    figure.savefig(path)


PLOTS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "reparametrization": draw_reparametrization,
    "step": draw_step,
}
