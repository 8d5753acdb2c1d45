"""One constrained weight, as each library makes it; what is not installed is said to be missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lipkernels.nn as lnn

OURS = "lipkernels"
# Where torch's parametrizations keep the free parameter.
_ORIGINAL = "parametrizations.weight.original"
# The module that has to be there for each contender.
MODULES = {
    OURS: "lipkernels",
    "deel-torchlip": "deel.torchlip",
    "orthogonium": "orthogonium.layers.linear",
    "torch orthogonal": "torch",
}


@dataclass(frozen=True)
class Held:
    """A layer in training mode, its free parameter, and whether its map is the polar factor."""

    layer: nn.Module
    raw: nn.Parameter
    is_polar: bool = True

    def weight(self) -> Tensor:
        return self.layer.weight  # pyright: ignore[reportReturnType]


def missing(modules: dict[str, str] = MODULES) -> dict[str, str]:
    """Contender -> why it cannot take part."""
    reasons = {}
    for name, module in modules.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            reasons[name] = f"{type(error).__name__}: {error}"
    return reasons


def _set(raw: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        raw.copy_(value)


def _lipkernels(weight: Tensor) -> Held:
    rows, cols = weight.shape
    layer = lnn.SpectralLinear(cols, rows, bias=False)
    _set(layer.raw_weight, weight)
    return Held(layer, layer.raw_weight)


def _deel_torchlip(weight: Tensor) -> Held:
    from deel.torchlip import SpectralLinear

    rows, cols = weight.shape
    layer = SpectralLinear(cols, rows, bias=False)
    raw = layer.get_parameter(_ORIGINAL)
    _set(raw, weight)
    return Held(layer, raw)


def _orthogonium(weight: Tensor) -> Held:
    from orthogonium.layers.linear import OrthoLinear

    rows, cols = weight.shape
    layer = OrthoLinear(cols, rows, bias=False)
    raw = layer.get_parameter(_ORIGINAL)
    _set(raw, weight)
    return Held(layer, raw)


def _torch_orthogonal(weight: Tensor) -> Held:
    """A chart of the orthogonal matrices around the weight's Q factor, and no polar factor.

    Its parameter starts at a special point (the exponential of zero). It is moved a little, as the
    first optimizer steps would: only the strict triangle that has a gradient.
    """
    rows, cols = weight.shape
    layer = nn.Linear(cols, rows, bias=False)
    _set(layer.weight, weight)
    parametrizations.orthogonal(layer)
    raw = layer.get_parameter(_ORIGINAL)
    generator = torch.Generator(raw.device).manual_seed(0)
    noise = 1e-2 * torch.randn(raw.shape, generator=generator, device=raw.device)
    _set(raw, raw + (noise.triu(1) if rows < cols else noise.tril(-1)))
    return Held(layer, raw, is_polar=False)


BUILDERS: dict[str, Callable[[Tensor], Held]] = {
    OURS: _lipkernels,
    "deel-torchlip": _deel_torchlip,
    "orthogonium": _orthogonium,
    "torch orthogonal": _torch_orthogonal,
}


def hold(name: str, weight: Tensor) -> Held:
    """A layer of library ``name`` in training mode, its free parameter set to ``weight``."""
    with torch.device(weight.device):
        held = BUILDERS[name](weight)
    held.layer.train()
    return held
