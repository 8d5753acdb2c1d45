"""The constrained layers of the soundness tests: every constraint, every number format."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lipkernels.nn as lnn

# Keywords of the spectral layers, by name. Named Bjorck iterations of few and of many steps.
SPECTRAL = {
    "polar": {},
    "spectral": {"eps_bjorck": None},
    "spectral_one_step": {"eps_bjorck": None, "maxiter_spectral": 1, "eps_spectral": 1.0},
    "bjorck": {"beta_bjorck": 0.5},
    "bjorck_1_step": {"maxiter_bjorck": 1},
    "bjorck_beta_025": {"beta_bjorck": 0.25, "maxiter_bjorck": 3},
    "bjorck_beta_01": {"beta_bjorck": 0.1, "maxiter_bjorck": 40, "eps_bjorck": 1e-12},
    "bjorck_60_steps": {"maxiter_bjorck": 60, "eps_bjorck": 1e-12},
    "bjorck_150_steps": {"maxiter_bjorck": 150, "eps_bjorck": 1e-12},
}
FROBENIUS = {
    "frobenius": {"disjoint_neurons": False},
    "frobenius_rows": {"disjoint_neurons": True},
}
CONSTRAINTS = (*SPECTRAL, *FROBENIUS)


@dataclass(frozen=True)
class Format:
    """The parameter's dtype, and autocast's if it is on."""

    weight: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def stored(self) -> torch.dtype:
        """The dtype that forward computes in. Autocast leaves float64 alone."""
        if self.autocast is None or self.weight == torch.float64:
            return self.weight
        return self.autocast

    def __str__(self) -> str:
        name = str(self.weight).removeprefix("torch.")
        under = "" if self.autocast is None else f"_in_{self.autocast}".replace("torch.", "")
        return name + under

    def context(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=self.autocast)


FORMATS = (
    Format(torch.float32),
    Format(torch.float64),
    Format(torch.bfloat16),
    Format(torch.float16),
    Format(torch.float32, torch.bfloat16),
    Format(torch.float32, torch.float16),
    Format(torch.float64, torch.bfloat16),
    Format(torch.bfloat16, torch.float16),
)


def linear(constraint: str, rows: int, cols: int, *, bias: bool = False, **others) -> nn.Module:
    """A linear layer (cols -> rows) with the constraint of that name."""
    if constraint in SPECTRAL:
        return lnn.SpectralLinear(cols, rows, bias, **SPECTRAL[constraint], **others)
    return lnn.FrobeniusLinear(cols, rows, bias, **FROBENIUS[constraint], **others)


def set_raw(layer: nn.Module, values: Tensor) -> None:
    """Write ``values`` into the raw weight, outside autograd's sight."""
    layer.raw_weight.data.copy_(values)


def weight_in(layer: nn.Module, fmt: Format) -> Tensor:
    """The weight that forward uses in that format."""
    with fmt.context(), torch.no_grad():
        weight = layer.weight
    assert weight.dtype == fmt.stored
    return weight
