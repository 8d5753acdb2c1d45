"""All weights of a whole model in one call, forward and backward, by op.

Near-orthogonal weights, as a training run has them. The other libraries have a layer for each
weight; the strong baseline batches weights of one shape. Errors are those of the worst weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bench.gpu import accuracy, contenders, floors, rates
from bench.gpu.contenders import WEIGHT_OPS, exact, own
from bench.gpu.ops import TINY
from bench.gpu.queued import Work, copies
from bench.gpu.rows import Contender, measure
from bench.gpu.shapes import MODELS, TINY_MODELS, Shape, another, weights
from bench.gpu.table import Row, Table, options
from bench.timing import Budget

BUDGET = Budget(seconds=2.0, least=5, most=30)
OPS = ("polar_factor", "spectral_normalize", "frobenius_normalize")
ONE_STEP = "torch spectral_norm (one power step, no bound)"


def _spectral_norm(raw: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Work:
    """torch's own layers: an estimate of sigma, from below."""
    layers = []
    for weight in raw:
        rows, cols = weight.shape
        layer = nn.Linear(cols, rows, bias=False, device=weight.device)
        with torch.no_grad():
            layer.weight.copy_(weight)
        layers.append(parametrizations.spectral_norm(layer).train())
    free = [layer.parametrizations.weight.original for layer in layers]  # pyright: ignore
    return Work(lambda: [layer.weight for layer in layers], free, cotangents)


def measure_model(
    op: str,
    shapes: Sequence[Shape],
    budget: Budget,
    device: torch.device,
    known: Mapping[str, float],
    missing: dict[str, str],
) -> Row:
    """``op`` on weights of ``shapes``, all in one call; adds to ``missing`` who cannot run."""
    first, cotangents = weights(shapes, device)
    nbytes = sum(2 * x.nbytes for x in (*first, *cotangents))  # and results, and gradients
    problems = [(first, cotangents)]
    for i in range(1, copies(nbytes, device)):
        problems.append((another(first, seed=i), [g.clone() for g in cotangents]))
    function = WEIGHT_OPS[op]
    everyone, why = own(op, function, problems)
    missing |= {f"{op}, {name}": reason for name, reason in why.items()}
    if op == "polar_factor":
        others, why = contenders.others(problems)
        everyone |= others
        missing |= why
    if op == "spectral_normalize":
        everyone[ONE_STEP] = Contender(lambda: [_spectral_norm(*problems[0])])
    truth = exact(function, first, cotangents)

    def check(results: Sequence[Tensor], gradients: Sequence[Tensor]) -> accuracy.Figures:
        return accuracy.of_weights(results, gradients, truth, orthogonal=op == "polar_factor")

    row = measure(everyone, floors.of_weights(op, shapes), check, budget, device, known)
    about = {"op": op, "shapes": [list(s) for s in shapes], "weights": len(shapes)}
    return {**about, "dtype": "torch.float32", **row}


def main(argv: Sequence[str] | None = None) -> int:
    found = options("models", "All weights of a model in one call.", argv)
    models, budget = (TINY_MODELS, TINY) if found.dry_run else (MODELS, BUDGET)
    known, missing = rates.read(found.out), {}
    table = Table("models", found, missing)
    table.measure(
        {
            f"{model}, {op}": partial(
                measure_model, op, shapes, budget, found.device, known, missing
            )
            for op in OPS
            for model, shapes in models.items()
        }
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
