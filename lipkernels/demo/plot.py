"""The robustness curves as a picture."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lipkernels.demo.example import Example

# Okabe and Ito's blue and vermillion: told apart by every kind of colour vision.
BLUE, VERMILLION = "#0072B2", "#D55E00"
INK, GREY, GRID, EDGE = "#1a1a1a", "#5f6368", "#e4e6ea", "#c4c8ce"
LEFT, WIDTH = 0.16, 0.77  # of the axes, in the figure's width


def certified_curve(
    radius: Tensor, correct: Tensor, limit: float
) -> tuple[list[float], list[float]]:
    """Percent of samples that are correct and certified at least to r, for r in [0, limit]."""
    grid = torch.linspace(0, limit, 401)
    reach = torch.where(correct, radius, -1.0).cpu()
    return grid.tolist(), [100 * (reach >= r).float().mean().item() for r in grid]


def _attacked(net: dict[str, Any]) -> tuple[list[float], list[float]]:
    radii = [0.0, *(float(r) for r in net["pgd"])]
    return radii, [100 * share for share in (net["clean"], *net["pgd"].values())]


def _label(
    ax: Axes, at: tuple[float, float], color: str, name: str, detail: str, right: bool
) -> None:
    """A bold name with a line of explanation, right above the curve or left below it."""
    x, ha = (14, "left") if right else (-14, "right")
    common: dict[str, Any] = {
        "textcoords": "offset points",
        "color": color,
        "ha": ha,
        "va": "center",
    }
    y = 32 if right else -12
    ax.annotate(name, at, (x, y), fontsize=14, fontweight="bold", **common)
    ax.annotate(detail, at, (x, y - 17), fontsize=11.5, **common)


def _curves(ax: Axes, result: dict[str, Any], curve: tuple[list[float], list[float]]) -> None:
    x, y = curve
    limit = x[-1]
    edge = {"markeredgecolor": "white", "markeredgewidth": 1.4, "clip_on": False}
    ax.fill_between(x, y, color=BLUE, alpha=0.09, linewidth=0)
    ax.plot(x, y, color=BLUE, linewidth=2.6, solid_capstyle="round")
    held = _attacked(result["lipschitz"])
    ax.plot(*held, "o", color=BLUE, markersize=8, zorder=4, **edge)
    fallen = _attacked(result["twin"])
    ax.plot(*fallen, "-s", color=VERMILLION, linewidth=2.2, markersize=6.5, zorder=3, **edge)
    ax.set_xlim(-0.02 * limit, 1.02 * limit)
    ax.set_ylim(0, 102)

    # Beside the dot nearest to 85%: from there on all dots and the line lie lower.
    anchor = min(zip(*held, strict=True), key=lambda point: abs(point[1] - 85))
    _label(ax, anchor, BLUE, "1-Lipschitz network", "line: proven    dots: attacked", right=True)
    middle = min(zip(*fallen, strict=True), key=lambda point: abs(point[1] - 40))
    _label(ax, middle, VERMILLION, "its ReLU twin", "under attack, not proven", right=False)


def _style(ax: Axes, limit: float) -> None:
    ax.grid(color=GRID, linewidth=0.9)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(EDGE)
    ax.tick_params(length=0, labelsize=12, colors=GREY, pad=7)
    ax.set_xticks([limit * i / 8 for i in range(9)])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    ax.set_xlabel(
        r"size of the perturbation: its $\ell_2$ norm, pixels in [0, 1]", fontsize=12, color=GREY
    )
    ax.set_ylabel("digits classified correctly", fontsize=12, color=GREY, labelpad=8)


def _strip(figure: Figure, ax: Axes, example: Example) -> None:
    """One digit, attacked, below the axis: each image under its own radius."""
    low, high = ax.get_xlim()
    width, height = figure.get_size_inches()
    side = 0.1  # of the figure's width
    figure.text(
        LEFT - 0.035, 0.262, "One of them, changed that much to fool the twin",
        fontsize=12, color=GREY, va="center",
    )  # fmt: skip
    for k, r in enumerate(example.radii):
        centre = LEFT + WIDTH * (r - low) / (high - low)
        cell = figure.add_axes((centre - side / 2, 0.107, side, side * width / height))
        cell.imshow(
            example.images[k].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest"
        )
        cell.set_xticks([])
        cell.set_yticks([])
        for spine in cell.spines.values():
            spine.set_color(EDGE)
        ours = f"{example.lipschitz[k]}" + (", proven" if example.proven[k] else "")
        for y, color, said in ((0.08, BLUE, ours), (0.045, VERMILLION, f"{example.twin[k]}")):
            figure.text(
                centre, y, said, color=color, fontsize=12.5, ha="center", va="center",
                fontweight="bold",
            )  # fmt: skip
    for y, color, name in ((0.08, BLUE, "1-Lipschitz:"), (0.045, VERMILLION, "twin:")):
        figure.text(
            LEFT - 0.048, y, name, color=color, fontsize=11.5, ha="right", va="center"
        )  # fmt: skip


def _title(figure: Figure, result: dict[str, Any]) -> None:
    key = f"{result['headline_radius']:g}"
    proven = 100 * result["lipschitz"]["certified"][key]
    left = 100 * result["twin"]["pgd"][key]
    data = result["data"]
    figure.text(
        0.035, 0.95, f"Up to size {key}, {proven:.0f}% are provably right; "
        f"the twin keeps {left:.0f}%.",
        fontsize=18, fontweight="bold", color=INK, va="center",
    )  # fmt: skip
    figure.text(
        0.035, 0.905, f"{data['name']}, {data['test']:,} {data['part']}. "
        f"{result['shape']}. PGD, {result['attack']['steps']} steps.",
        fontsize=12, color=GREY, va="center",
    )  # fmt: skip


def draw(
    path: Path, result: dict[str, Any], radius: Tensor, correct: Tensor, example: Example | None
) -> None:
    """Write the picture: certified curve, both networks under attack, one digit as an example.

    `radius` and `correct`, (n,), are the 1-Lipschitz network's.
    """
    limit = max(float(r) for r in result["lipschitz"]["pgd"])
    figure = Figure(figsize=(9.6, 8.0), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    bottom = 0.37 if example else 0.1
    ax = figure.add_axes((LEFT, bottom, WIDTH, 0.855 - bottom))
    _curves(ax, result, certified_curve(radius, correct, limit))
    _style(ax, limit)
    _title(figure, result)
    if example:
        _strip(figure, ax, example)
    figure.savefig(path)
