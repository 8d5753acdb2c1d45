"""The demo's command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

PROG = "python -m lipkernels.demo"

DESCRIPTION = """\
Train a 1-Lipschitz classifier of handwritten digits beside an unconstrained twin, certify it,
attack both, audit the certificate, draw the curves, export the plain torch model and reload it.
"""

EPILOG = """\
Writes robustness.png, result.json and model.pt into --out.
Exit status: 0; 1 if a certified sample broke, or the reloaded model predicts something else;
2 for a wrong option, a missing package or a device that is not there.
"""


def _at_least(low: int):
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return number


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"not a torch device: {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"{text!r}: this torch sees no CUDA device here")
        if (device.index or 0) >= torch.cuda.device_count():
            raise argparse.ArgumentTypeError(
                f"{text!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
            )
    return device


def parser() -> argparse.ArgumentParser:
    """The options, each with its default in --help."""
    p = argparse.ArgumentParser(
        prog=PROG,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--model", choices=("mlp", "conv"), default="mlp",
        help="a net of linear layers, or a small convolutional one (default: mlp)",
    )  # fmt: skip
    p.add_argument(
        "--quick", action="store_true",
        help="scikit-learn's 8x8 digits and a tiny net: seconds instead of a minute",
    )  # fmt: skip
    p.add_argument(
        "--hold", choices=("retract", "reparametrize"), default="retract",
        help="keep the constraint after each step of the optimizer, or inside autograd"
        " (default: retract, the faster one)",
    )  # fmt: skip
    p.add_argument("--epochs", type=_at_least(1), help="passes over the training images")
    p.add_argument(
        "--seed", type=_at_least(0), default=0,
        help="initial weights, batches, attacks (default: 0); the split of the data is fixed",
    )  # fmt: skip
    p.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    p.add_argument(
        "--threads", type=_at_least(1), help="CPU threads that torch uses (default: torch's choice)"
    )
    p.add_argument(
        "--validate", action="store_true",
        help="report on a fifth of the training images, held out for tuning, instead of the test",
    )  # fmt: skip
    p.add_argument(
        "--audit", action="store_true",
        help="attack both with AutoAttack too: minutes; needs the package pyautoattack",
    )  # fmt: skip
    p.add_argument(
        "--out", type=Path, default=Path("demo_output"), metavar="DIR",
        help="where to write (default: demo_output)",
    )  # fmt: skip
    p.add_argument(
        "--json", action="store_true",
        help="print the result as JSON on stdout instead of the table; progress goes to stderr",
    )  # fmt: skip
    return p


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of `argv` (default: the command line). Exits with status 2 and a message if wrong."""
    p = parser()
    options = p.parse_args(argv)
    if options.out.exists() and not options.out.is_dir():
        p.error(f"argument --out: {str(options.out)!r} exists and is not a directory")
    return options
