"""``python -m lipkernels.backends``: what can run here, what ``auto`` takes, and why not more."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lipkernels import backends
from lipkernels.kernels.implemented import IMPLEMENTED

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _where(name: str) -> Iterator[str]:
    """On which tensors the backend can run, or why on none."""
    reasons = {device: backends.why_not(name, device) for device in (CPU, CUDA)}
    emulated = " (emulated, where it is named)" if backends.is_emulated(name) else ""
    able = [f"{d.type} tensors" + emulated * (d == CPU) for d, why in reasons.items() if not why]
    if able:
        yield "runs on " + ", ".join(able)
    else:
        own = backends.missing(name) or reasons[CUDA]
        yield f"cannot run: {own}"
    if name in ("triton", "cuda") and not torch.cuda.is_available():
        yield "there is no CUDA device here"


def _table() -> Iterator[list[str]]:
    yield ["operation", *backends.BACKENDS, "auto, cpu", "auto, cuda"]
    for op, implemented in IMPLEMENTED.items():
        has = ["yes" if name in implemented else "-" for name in backends.BACKENDS]
        yield [op, *has, *(backends.resolve(op, implemented, d, "auto") for d in (CPU, CUDA))]


def report() -> str:
    """The whole text."""
    lines = []
    for name in backends.BACKENDS:
        lines += [f"{name:<10} {'; '.join(_where(name))}"]
    rows = list(_table())
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
