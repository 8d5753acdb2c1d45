"""The weights of whole models, as matrices: what one grouped call constrains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, int]
# Largest singular value, about, of the noise on an orthogonal weight: condition 1.6.
NOISE = 0.25

CIFAR_NET: tuple[Shape, ...] = (
    (64, 27),
    (64, 576),
    (128, 576),
    (128, 1152),
    (128, 1152),
    (256, 1152),
    (256, 2304),
    (256, 2304),
    (256, 2304),
    (512, 1024),
    (256, 512),
    (10, 256),
)


def resnet_50() -> tuple[Shape, ...]:
    """Its 53 convolutions and the classifier, each (out, in * kernel size)."""
    shapes: list[Shape] = [(64, 3 * 7 * 7)]
    n_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        n_out = 4 * width
        for block in range(blocks):
            shapes += [(width, n_in), (width, width * 9), (n_out, width)]
            if block == 0:
                shapes.append((n_out, n_in))
            n_in = n_out
    return (*shapes, (1000, n_in))


MODELS: dict[str, tuple[Shape, ...]] = {
    "12-layer CIFAR conv net": CIFAR_NET,
    "ResNet-50, 54 matrices": resnet_50(),
    "4 x 1024x1024": ((1024, 1024),) * 4,
    "16 x 32x288": ((32, 288),) * 16,
}
TINY_MODELS: dict[str, tuple[Shape, ...]] = {
    "ragged": ((4, 6), (8, 3), (5, 5)),
}


def _near_orthogonal(shape: Shape, generator: torch.Generator) -> Tensor:
    """As the kind of that name in :mod:`bench.cases`, without its singular value decomposition."""
    rows, cols = shape
    noise, other = (
        torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        for _ in range(2)
    )
    long = other if rows >= cols else other.T
    q = torch.linalg.qr(long)[0]
    orthonormal = q if rows >= cols else q.T
    return (orthonormal + NOISE / (rows**0.5 + cols**0.5) * noise).float()


def weights(
    shapes: Sequence[Shape], device: torch.device, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """``(weights, cotangents)``, float32: what a training run shows some steps after its start."""
    generator = torch.Generator(device).manual_seed(seed)
    chosen = [_near_orthogonal(shape, generator) for shape in shapes]
    cotangents = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    return chosen, cotangents


def another(weights: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Other weights with the same singular values: their columns in another order."""
    found = []
    for weight in weights:
        generator = torch.Generator(weight.device).manual_seed(seed)
        order = torch.randperm(weight.shape[-1], generator=generator, device=weight.device)
        found.append(weight[..., order].contiguous())
    return found
