"""What the demo does, in order, from the digits to the exported model."""

import json
import platform
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lipkernels
import lipkernels.nn as lnn
from lipkernels import certify, export
from lipkernels.demo import attack, audit, autoattack, data, measure, nets, plot
from lipkernels.demo.example import find_example
from lipkernels.demo.preset import ADAM, FULL, QUICK, Preset
from lipkernels.demo.train import Recipe, fit


def _train(
    opts: Namespace, preset: Preset, digits: data.Digits, say: Callable[[str], None]
) -> tuple[nn.Module, nn.Module, dict[str, Any], dict[str, Any]]:
    """Both networks, trained on the same images, and what is to be said of each training."""
    epochs = opts.epochs or preset.epochs[opts.hold]
    peak, beta2 = ADAM[opts.hold]
    ours_recipe = Recipe(epochs, peak, preset.batch, shift=preset.shift, beta2=beta2)
    twin_epochs = opts.epochs or preset.twin_epochs
    twin_recipe = Recipe(twin_epochs, preset.twin_peak, preset.batch, shift=preset.shift)
    margin = lnn.MarginCrossEntropyLoss(temperature=preset.temperature, offset=preset.offset)

    torch.manual_seed(opts.seed)
    ours = nets.lipschitz_net(opts.model, digits.shape).to(opts.device)
    twin = nets.plain_twin(opts.model, digits.shape).to(opts.device)
    timing = fit(ours, margin, digits, ours_recipe, opts.seed, opts.hold, "1-Lipschitz")
    say(f"  1-Lipschitz net: {timing.steps} steps in {timing.seconds:.1f} s")
    other = fit(twin, nn.CrossEntropyLoss(), digits, twin_recipe, opts.seed, title="ReLU twin")
    say(f"  ReLU twin:       {other.steps} steps in {other.seconds:.1f} s")

    margin_said = (
        f"MarginCrossEntropyLoss(temperature={preset.temperature}, offset={preset.offset})"
    )
    ours_said = {
        **vars(timing),
        "hold": opts.hold,
        "recipe": vars(ours_recipe),
        "loss": margin_said,
    }
    twin_said = {**vars(other), "recipe": vars(twin_recipe), "loss": "CrossEntropyLoss()"}
    return ours, twin, ours_said, twin_said


@torch.no_grad()
def _export(
    net: nn.Module, images: Tensor, path: Path, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """Save the plain torch model, load the file, and compare it with the trained network."""
    torch.save(export.vanilla_export(net).cpu(), path)
    # weights_only=False: the file holds a whole module, and it is the one just written.
    plain = torch.load(path, weights_only=False).to(device).eval()
    before, after = net(images), plain(images)
    return plain, {
        "bytes": path.stat().st_size,
        "predictions_that_differ": int((before.argmax(1) != after.argmax(1)).sum()),
        "largest_logit_difference": (before - after).abs().max().item(),
    }


def _figures(
    net: nn.Module, digits: data.Digits, radii: Sequence[float], seed: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Clean, certified and attacked accuracy; then the certified radii (n,), and what is right."""
    x, y = digits.test_images, digits.test_labels
    bound = float(certify.lipschitz_bound(net))
    radius = measure.certify_images(net, x)
    right = measure.correct(net, x, y)
    attacked = measure.accuracy_under_attack(net, x, y, radii, seed)
    figures = {
        "bound": bound,
        "parameters": sum(p.numel() for p in net.parameters()),
        "clean": right.float().mean().item(),
        "certified": {f"{r:g}": (right & (radius >= r)).float().mean().item() for r in radii},
        "pgd": {f"{r:g}": attacked[r] for r in radii},
        "rounding_error_measured": measure.rounding_error(net, x),
        "rounding_error_proved": measure.rounding_allowance(net, x, max(radii)),
    }
    return figures, radius, right


def _about(
    opts: Namespace, argv: Sequence[str], preset: Preset, digits: data.Digits
) -> dict[str, Any]:
    """Where, on what and how the figures were made."""
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if opts.device.type == "cuda":
        name = torch.cuda.get_device_name(opts.device)
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lipkernels": lipkernels.__version__,
    }
    return {
        "command": shlex.join(["python", "-m", "lipkernels.demo", *argv]),
        "seed": opts.seed,
        "device": str(opts.device),
        "device_name": name,
        "versions": versions,
        "data": {
            "name": digits.name,
            "part": digits.part,
            "train": len(digits.train_images),
            "test": len(digits.test_images),
            "image": list(digits.shape),
        },
        "model": opts.model,
        "radii": list(preset.table_radii),
        "headline_radius": preset.headline_radius,
        "attack": {"steps": attack.STEPS, "restarts": attack.RESTARTS, "clipped_to_0_1": False},
    }


def run(opts: Namespace, argv: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """The whole demo: files into `opts.out`, progress to `say`; returns what --json prints."""
    start = time.perf_counter()
    preset = QUICK if opts.quick else FULL
    if opts.audit:
        autoattack.package()  # now, not after the training
    digits = data.load(opts.quick, opts.validate)
    result = _about(opts, argv, preset, digits)
    opts.out.mkdir(parents=True, exist_ok=True)
    files = {
        "plot": opts.out / "robustness.png",
        "result": opts.out / "result.json",
        "model": opts.out / "model.pt",
    }
    result["files"] = {name: str(path) for name, path in files.items()}
    say(
        f"Digits: {digits.name}, {len(digits.train_images):,} to train, "
        f"{len(digits.test_images):,} {digits.part}"
    )
    digits = digits.to(opts.device)

    say("Training")
    ours, twin, ours_said, twin_said = _train(opts, preset, digits, say)
    # From here on everything is said of the plain torch model in the file: what one would deploy.
    plain, result["export"] = _export(ours, digits.test_images, files["model"], opts.device)
    result["shape"] = nets.describe(plain)

    radii = sorted({*preset.table_radii, *preset.plot_radii})
    say(f"Certifying both, and attacking both at {len(radii)} radii")
    figures, radius, right = _figures(plain, digits, radii, opts.seed)
    result["lipschitz"] = {**figures, **ours_said}
    result["twin"] = {**_figures(twin, digits, radii, opts.seed)[0], **twin_said}

    say("Attacking every certified sample inside its own radius")
    result["audit"] = vars(measure.audit(plain, digits.test_images, radius, opts.seed))
    if opts.audit:
        found = audit.autoattack_audit(plain, twin, digits, radius, preset, opts.seed, say)
        result["autoattack"] = found[0]
        result["lipschitz"]["autoattack"], result["twin"]["autoattack"] = found[1:]

    images, labels = digits.test_images, digits.test_labels
    example = find_example(plain, twin, images, labels, radius, preset.example_radii, opts.seed)
    plot.draw(files["plot"], result, radius, right, example)
    result["seconds"] = time.perf_counter() - start
    files["result"].write_text(json.dumps(result, indent=2) + "\n")
    return result
