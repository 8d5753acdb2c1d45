"""A network of residual blocks for small images, as each library's user would write it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.nets import LIBRARIES, Library

CLASSES = 10


@dataclass(frozen=True)
class Size:
    """``blocks`` residual blocks in each stage, the first one ``width`` channels wide."""

    width: int = 64
    stages: int = 4
    blocks: int = 2
    image: int = 32


class Block(nn.Module):
    """(x + f(x)) / 2: with f, at most 1-Lipschitz."""

    def __init__(self, library: Library, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            library.conv(width, width, 3, 1, 1),
            library.activation(),
            library.conv(width, width, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.branch(x), 0.5)


def build(name: str, size: Size) -> nn.Sequential:
    """``size`` made of the layers of ``name`` (of :mod:`bench.nets`), in training mode."""
    library = LIBRARIES[name]()
    width = size.width
    layers: list[nn.Module] = [library.conv(3, width, 3, 1, 1), library.activation()]
    for stage in range(size.stages):
        if stage > 0:
            layers += [library.conv(width, 2 * width, 2, 2, 0), library.activation()]
            width *= 2
        for _ in range(size.blocks):
            layers += [Block(library, width), library.activation()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), library.linear(width, CLASSES)]
    return nn.Sequential(*layers).train()
