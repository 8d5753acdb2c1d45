"""Accuracy of the two ways to hold a constraint: `python -m bench.holds --seeds 5`.

The demo's net, recipe and seeds, on the part of the training images that the demo's settings were
chosen on; mean and standard deviation over the seeds, and the seconds of a training run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch

import lipkernels.nn as lnn
from lipkernels.demo import data, measure, nets
from lipkernels.demo.preset import ADAM, FULL
from lipkernels.demo.train import Recipe, fit


def run(hold: str, seed: int, digits: data.Digits, epochs: int) -> list[float]:
    """Percent correct, then certified at each radius of the table; seconds of training."""
    peak, beta2 = ADAM[hold]
    recipe = Recipe(epochs, peak, FULL.batch, shift=FULL.shift, beta2=beta2)
    loss = lnn.MarginCrossEntropyLoss(temperature=FULL.temperature, offset=FULL.offset)
    torch.manual_seed(seed)
    net = nets.lipschitz_net("mlp", digits.shape)
    timing = fit(net, loss, digits, recipe, seed, hold, title=f"{hold}, seed {seed}")
    images, labels = digits.test_images, digits.test_labels
    correct = measure.correct(net, images, labels)
    radius = measure.certify_images(net, images)
    shares = [correct, *(correct & (radius > r) for r in FULL.table_radii)]
    return [100 * share.double().mean().item() for share in shares] + [timing.seconds]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each way."""
    p = argparse.ArgumentParser(prog="python -m bench.holds", description=__doc__)
    p.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    p.add_argument("--hold", choices=tuple(ADAM), help="one way only")
    p.add_argument("--epochs", type=int, help="default: the demo's, for each way its own")
    options = p.parse_args(argv)
    digits = data.load(validate=True)
    names = ["clean", *(f"at {r:g}" for r in FULL.table_radii), "seconds"]
    print(f"{'':14}" + "".join(f"{name:>16}" for name in names))
    for hold in [options.hold] if options.hold else ADAM:
        epochs = options.epochs or FULL.epochs[hold]
        rows = [run(hold, seed, digits, epochs) for seed in range(options.seeds)]
        cells = [
            f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
            if len(values) > 1
            else f"{values[0]:.2f}"
            for values in zip(*rows, strict=True)
        ]
        print(f"{hold:14}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
