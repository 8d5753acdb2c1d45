"""What the device can do at most: the denominators of every floor.

A copy between two buffers far larger than the cache, counting bytes read and written; products of
8192 x 8192 random matrices in float16 (accumulated in float32), TF32 and float32; and what a
launch costs where nothing else does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu.queued import stopwatch, tf32
from bench.gpu.table import Row, Table, options
from bench.timing import spread

_WARM_UP, _SAMPLES, _CALLS = 3, 15, 5


def _seconds(call: Callable[[], object], device: torch.device, calls: int = _CALLS) -> list[float]:
    def queue() -> None:
        for _ in range(calls):
            call()

    watch = stopwatch(device)
    for _ in range(_WARM_UP):
        watch(queue)
    return [watch(queue) / calls for _ in range(_SAMPLES)]


def _rate(amount: float, seconds: list[float], **said: Any) -> Row:
    return {"per_second": asdict(spread([amount / s for s in seconds])), **said}


def copy(nbytes: int, device: torch.device) -> Row:
    """Bytes per second, read and written."""
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), device)
    return _rate(2 * nbytes, seconds, shape=[nbytes], unit="B/s")


def product(n: int, dtype: torch.dtype, device: torch.device) -> Row:
    """Floating-point operations per second of an n x n by n x n product."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _seconds(lambda: torch.mm(a, b, out=out), device)
    return _rate(2.0 * n**3, seconds, shape=[n, n, n], dtype=str(dtype), unit="flop/s")


def product_tf32(n: int, device: torch.device) -> Row:
    with tf32():
        return product(n, torch.float32, device)


def launch(device: torch.device) -> Row:
    """Seconds of a kernel that does nothing, one of many queued by torch."""
    x = torch.zeros(1, device=device)
    seconds = _seconds(lambda: x.add_(1.0), device, calls=200)
    return {"seconds": asdict(spread(seconds)), "shape": [1], "unit": "s"}


def read(out: Path) -> dict[str, float]:
    """``{"copy", "float16"}`` per second, as far as they were measured."""
    file = out / "rates.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    return {
        row["case"]: row["per_second"]["median"]
        for row in rows
        if row["state"] == "measured" and "per_second" in row
    }


def main(argv: Sequence[str] | None = None) -> int:
    found = options("rates", "The device's copy bandwidth and matrix rates.", argv)
    device, tiny = found.device, found.dry_run
    n, nbytes = (64, 1 << 16) if tiny else (8192, 1 << 30)
    table = Table("rates", found, {})
    table.measure(
        {
            "copy": lambda: copy(nbytes, device),
            "float16": lambda: product(n, torch.float16, device),
            "bfloat16": lambda: product(n, torch.bfloat16, device),
            "tf32": lambda: product_tf32(n, device),
            "float32": lambda: product(n, torch.float32, device),
            "launch": lambda: launch(device),
        }
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
