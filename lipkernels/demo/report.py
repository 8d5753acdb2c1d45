"""The result in plain text: one table, and what was checked."""

from typing import Any

LABEL, CELL = 18, 8
ROWS = {"certified": "  certified", "pgd": "  under PGD", "autoattack": "  under AutoAttack"}


def _row(label: str, cells: list[str], tail: str = "") -> str:
    return (f"{label:<{LABEL}}" + "".join(f"{cell:>{CELL}}" for cell in cells) + tail).rstrip()


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _bound(value: float) -> str:
    return f"{value:.7f}" if value < 2 else f"{value:,.1f}"


def _verdict(broken: int) -> str:
    return "none broke" if broken == 0 else f"{broken} BROKE"


def _autoattack(found: dict[str, Any]) -> list[str]:
    own = found["own_radius"]
    return [
        f"          AutoAttack on the {found['claims']:,} right and certified to a radius above, "
        "at the largest such,",
        f"          and on {own['attacked']} at {_percent(own['reach'])}% of their own: "
        + _verdict(found["broken"]),
        f"          (at {own['control_factor']:g} times their own it breaks "
        f"{_percent(own['control'])}%)",
    ]


def format_table(result: dict[str, Any]) -> str:
    """Both networks of the JSON `result`: certified and attacked accuracy, bound, time per step."""
    radii = [f"{r:g}" for r in result["radii"]]
    tail = f"{'Lipschitz bound':>19}{'ms per step':>14}"
    head = _row("accuracy, %", ["clean", *radii], tail)
    title = "within an l2 radius of"
    lines = [" " * (LABEL + CELL) + f"{title:>{CELL * len(radii)}}", head]
    lines.append("-" * len(head))
    for key, name in (("lipschitz", "1-Lipschitz net"), ("twin", "ReLU twin")):
        net = result[key]
        tail = f"{_bound(net['bound']):>19}{net['ms_per_step']:>14.1f}"
        lines.append(_row(name, [_percent(net["clean"]), *[""] * len(radii)], tail))
        for field, label in ROWS.items():
            if field in net:
                lines.append(_row(label, ["", *(_percent(net[field][r]) for r in radii)]))
    return "\n".join(lines)


def format_checks(result: dict[str, Any]) -> str:
    """What the audit, the rounding of float32 and the reloaded file had to say."""
    audit, export, net = result["audit"], result["export"], result["lipschitz"]
    n, files, same = result["data"]["test"], result["files"], export["predictions_that_differ"]
    drift = export["largest_logit_difference"]
    reloaded = f"all {n:,} predictions the same" if same == 0 else f"{same} predictions DIFFER"
    lines = [
        f"Audit     {audit['attacked']:,} certified samples attacked in their radius: "
        + _verdict(audit["broken"]),
        "          (at {:g} times the radius the same attack breaks {}%)".format(
            audit["control_factor"], _percent(audit["control"])
        ),
        *(_autoattack(result["autoattack"]) if "autoattack" in result else ()),
        "Rounding  proved: logits within {:.1g} of the exact ones (measured: {:.0e})".format(
            net["rounding_error_proved"], net["rounding_error_measured"]
        ),
        f"Reloaded  {files['model']}: {reloaded}, logits within {drift:.1g}",
        f"Written   {files['plot']}, {files['result']}",
        f"Took      {result['seconds']:.0f} s",
    ]
    return "\n".join(lines)
