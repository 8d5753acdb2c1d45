"""Time of a constrained weight, forward and backward: `python -m bench.reparametrization --quick`.

W -> W_bar, then W_bar's backward for a given cotangent, as a layer's user runs it; no product with
data. Beside each time: the errors and the kept bytes of the same objects.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import peers
from bench.accuracy import errors, truth
from bench.cases import KINDS, SHAPES, SPEED_KINDS, Case, all_cases
from bench.memory import kept_bytes
from bench.peers import OURS, Held
from bench.report import WEIGHT_HEAD, format_means, format_weights
from bench.timing import Budget, interleaved, paired_ratio, spread

BUDGET = Budget(seconds=3.0, least=5)
QUICK = Budget(seconds=0.7, least=3)


def contenders(case: Case) -> list[str]:
    """Who is measured on ``case``.

    torch's `orthogonal` starts from the weight's Q factor, of condition 1 whatever the weight was:
    on the weights of condition 100 it would only repeat itself.
    """
    left_out = "torch orthogonal" if case.kind == "condition_100" else None
    return [name for name in peers.BUILDERS if name != left_out]


def _step(held: Held, cotangent: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        held.raw.grad = None
        held.weight().backward(cotangent)

    return step


def measure(
    case: Case,
    names: Sequence[str],
    budget: Budget,
    clock: Callable[[], float] = time.perf_counter,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """All ``names`` on one case; ``names`` has to contain lipkernels, which ratios refer to."""
    device = device or torch.device("cpu")
    weight, cotangent = case.tensors(device)
    exact = truth(weight, cotangent)
    held = {name: peers.hold(name, weight) for name in names}
    steps = {name: _step(h, cotangent) for name, h in held.items()}
    samples = interleaved(steps, budget, device, clock=clock)
    figures = {}
    for name, h in held.items():
        _step(h, cotangent)()
        gradient = h.raw.grad
        assert gradient is not None
        figures[name] = {
            "ms": asdict(spread([1e3 * s for s in samples[name]])),
            "times_ours": asdict(paired_ratio(samples[name], samples[OURS])),
            "kept_over_weight": kept_bytes(lambda h=h: [h.weight()], [h.raw]) / weight.nbytes,
            **asdict(errors(h.weight(), gradient, exact, h.is_polar)),
        }
    return {
        "case": case.name,
        "shape": [case.rows, case.cols],
        "kind": case.kind,
        "condition": exact.condition,
        "rounds": len(samples[OURS]),
        "contenders": figures,
        "samples": samples,
    }


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.reparametrization", description=__doc__)
    p.add_argument("--quick", action="store_true", help="the two speed kinds, a few rounds each")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    p.add_argument(
        "--cpu-time", action="store_true",
        help="one thread, and its CPU time: to compare two versions on a busy machine",
    )  # fmt: skip
    p.add_argument("--shape", help="one shape only, such as 256x1024")
    p.add_argument("--kind", choices=KINDS, help="one kind of weights only")
    p.add_argument("--torch", action="store_true", help="torch's own orthogonal as well")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table while it is measured."""
    options = _parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    reasons = peers.missing()
    for name, reason in reasons.items():
        print(f"MISSING {name}: {reason}")
    left_out = {*reasons, *(() if options.torch else ("torch orthogonal",))}
    kinds = (options.kind,) if options.kind else SPEED_KINDS if options.quick else KINDS
    cases = all_cases(kinds)
    if options.shape:
        known = ["x".join(map(str, s)) for s in SHAPES]
        cases = [c for c in cases if f"{c.rows}x{c.cols}" == options.shape]
        if not cases:
            raise SystemExit(f"--shape: expected one of {known}, got {options.shape!r}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n{WEIGHT_HEAD}")
    rows = []
    for case in cases:
        names = [name for name in contenders(case) if name not in left_out]
        rows.append(measure(case, names, QUICK if options.quick else BUDGET, clock))
        print(format_weights(rows[-1]), flush=True)
    print(format_means(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
