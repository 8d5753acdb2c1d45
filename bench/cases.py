"""The weights that are constrained: one table of shapes, and three kinds of matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = (
    (64, 64),
    (64, 576),
    (128, 1152),
    (256, 1024),
    (256, 2304),
    (512, 512),
    (1024, 1024),
    (10, 512),
)
# What is claimed about speed is claimed about the first two, the geometric mean over both.
SPEED_KINDS = ("gaussian", "near_orthogonal")
KINDS = (*SPEED_KINDS, "condition_100")

# Largest singular value of the noise on an orthogonal weight: condition numbers of 1.4 to 1.6, what
# a training run shows some steps after an orthogonal initialization.
_NOISE = 0.25


def orthonormal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """float64 (rows, cols) with orthonormal rows, or columns if those are fewer."""
    long, short = max(rows, cols), min(rows, cols)
    q = torch.linalg.qr(torch.randn(long, short, generator=generator, dtype=torch.float64))[0]
    return q if rows >= cols else q.T


@dataclass(frozen=True)
class Case:
    """A weight to constrain, and the cotangent that its backward starts from."""

    rows: int
    cols: int
    kind: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.cols}-{self.kind}"

    def tensors(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """``(weight, cotangent)``, float32, both (rows, cols): always the same ones."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.cols)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.kind == "gaussian":
            weight = noise
        elif self.kind == "near_orthogonal":
            largest = torch.linalg.matrix_norm(noise, 2)
            weight = orthonormal(*shape, generator) + _NOISE * noise / largest
        elif self.kind == "condition_100":
            m = min(shape)
            left = orthonormal(self.rows, m, generator)
            right = orthonormal(m, self.cols, generator)
            weight = left * torch.logspace(0, -2, m, dtype=torch.float64) @ right
        else:
            raise ValueError(f"kind: expected one of {KINDS}, got {self.kind!r}")
        cotangent = torch.randn(shape, generator=generator, dtype=torch.float64)
        return weight.float().to(device), cotangent.float().to(device)


def all_cases(kinds: tuple[str, ...] = KINDS) -> list[Case]:
    """Every shape with every kind, small shapes first."""
    return [Case(*shape, kind) for shape in SHAPES for kind in kinds]
