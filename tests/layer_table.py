"""One table of layers: every class and every keyword that changes what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lipkernels.nn as lnn


@dataclass(frozen=True)
class Layer:
    """How to make a layer and what to feed it."""

    name: str
    cls: Callable[..., nn.Module]
    shape: tuple[int, ...]
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def constrained(self) -> bool:
        return self.name.startswith(("Spectral", "Frobenius"))

    @property
    def takes_dtype(self) -> bool:
        return self.constrained or self.cls in (lnn.HouseHolder, lnn.LPReLU)

    @property
    def is_projection(self) -> bool:
        """Whether constraining the constrained weight again changes nothing."""
        return not {"maxiter_bjorck", "beta_bjorck"} & dict(self.keywords).keys()

    def make(self, **others: Any) -> nn.Module:
        """With torch's own initialization, as a user makes it."""
        return self.cls(*self.arguments, **{**dict(self.keywords), **others})

    def trained(self, seed: int = 0, **others: Any) -> nn.Module:
        """With parameters far from where they started."""
        layer = self.make(**others)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(1.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        return layer

    def input(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)


def _sequential(*, k_coef_lip: float = 1.0) -> lnn.Sequential:
    return lnn.Sequential(
        lnn.SpectralConv2d(2, 4, 3, padding=1),
        lnn.GroupSort2(),
        nn.Flatten(),
        lnn.SpectralLinear(64, 3, k_coef_lip=2.0),
        k_coef_lip=k_coef_lip,
    )


def _nested(*, k_coef_lip: float = 1.0) -> lnn.Sequential:
    inner = lnn.Sequential(lnn.SpectralLinear(5, 6), lnn.HouseHolder(6), k_coef_lip=3.0)
    outer = nn.Sequential(lnn.SpectralLinear(6, 4), nn.ReLU())
    return lnn.Sequential(inner, outer, k_coef_lip=k_coef_lip)


def _layer(name, cls, shape, *arguments, **keywords) -> Layer:
    return Layer(name, cls, shape, arguments, tuple(keywords.items()))


_LINEAR = (2, 5)
_IMAGE = (2, 4, 6, 7)
LAYERS = [
    _layer("SpectralLinear", lnn.SpectralLinear, _LINEAR, 5, 3),
    _layer("SpectralLinear-tall", lnn.SpectralLinear, _LINEAR, 5, 9, k_coef_lip=0.5),
    _layer("SpectralLinear-square", lnn.SpectralLinear, _LINEAR, 5, 5, bias=False),
    _layer("SpectralLinear-normalized", lnn.SpectralLinear, _LINEAR, 5, 3, eps_bjorck=None),
    _layer("SpectralLinear-bjorck", lnn.SpectralLinear, _LINEAR, 5, 3, maxiter_bjorck=3),
    _layer("SpectralLinear-beta", lnn.SpectralLinear, _LINEAR, 5, 3, beta_bjorck=0.25),
    _layer("FrobeniusLinear", lnn.FrobeniusLinear, _LINEAR, 5, 3),
    _layer("FrobeniusLinear-whole", lnn.FrobeniusLinear, _LINEAR, 5, 3, disjoint_neurons=False),
    _layer("SpectralConv1d", lnn.SpectralConv1d, (2, 4, 9), 4, 6, 3),
    _layer("SpectralConv1d-stride", lnn.SpectralConv1d, (2, 4, 9), 4, 6, 5, 2, 2, bias=False),
    _layer("SpectralConv2d", lnn.SpectralConv2d, _IMAGE, 4, 6, 3),
    _layer("SpectralConv2d-padding", lnn.SpectralConv2d, _IMAGE, 4, 2, (3, 5), 1, (1, 2)),
    _layer("SpectralConv2d-dilation", lnn.SpectralConv2d, _IMAGE, 4, 6, 2, 2, 1, 2),
    _layer("SpectralConv2d-groups", lnn.SpectralConv2d, _IMAGE, 4, 6, 3, groups=2),
    _layer("SpectralConv2d-depthwise", lnn.SpectralConv2d, _IMAGE, 4, 4, 3, groups=4),
    _layer("SpectralConv2d-same", lnn.SpectralConv2d, _IMAGE, 4, 6, (2, 3), padding="same"),
    _layer("SpectralConv2d-valid", lnn.SpectralConv2d, _IMAGE, 4, 6, 3, padding="valid"),
    *[
        _layer(
            f"SpectralConv2d-{mode}",
            lnn.SpectralConv2d,
            _IMAGE,
            4,
            6,
            3,
            padding=(1, 2),
            padding_mode=mode,
        )
        for mode in ("reflect", "replicate", "circular", "symmetric")
    ],
    _layer("SpectralConv2d-sized", lnn.SpectralConv2d, _IMAGE, 4, 6, 3, input_size=(6, 7)),
    _layer("SpectralConv2d-normalized", lnn.SpectralConv2d, _IMAGE, 4, 6, 3, eps_bjorck=None),
    _layer("SpectralConv2d-bjorck", lnn.SpectralConv2d, _IMAGE, 4, 6, 3, maxiter_bjorck=2),
    _layer("SpectralConv3d", lnn.SpectralConv3d, (1, 2, 3, 4, 5), 2, 3, 2),
    _layer(
        "SpectralConv3d-symmetric",
        lnn.SpectralConv3d,
        (1, 2, 3, 4, 5),
        2,
        3,
        2,
        padding=(0, 1, 2),
        padding_mode="symmetric",
    ),
    _layer("FrobeniusConv1d", lnn.FrobeniusConv1d, (2, 4, 9), 4, 6, 3, padding=1),
    _layer("FrobeniusConv2d", lnn.FrobeniusConv2d, _IMAGE, 4, 6, 3, groups=2, bias=False),
    _layer(
        "FrobeniusConv2d-symmetric",
        lnn.FrobeniusConv2d,
        _IMAGE,
        4,
        6,
        3,
        padding=1,
        padding_mode="symmetric",
    ),
    _layer("FrobeniusConv3d", lnn.FrobeniusConv3d, (1, 2, 3, 4, 5), 2, 3, 2),
    _layer("SpectralConvTranspose1d", lnn.SpectralConvTranspose1d, (2, 4, 5), 4, 6, 3, 2),
    _layer("SpectralConvTranspose2d", lnn.SpectralConvTranspose2d, _IMAGE, 4, 6, 2, 2),
    _layer(
        "SpectralConvTranspose2d-groups",
        lnn.SpectralConvTranspose2d,
        _IMAGE,
        4,
        6,
        3,
        2,
        1,
        1,
        groups=2,
        bias=False,
        eps_bjorck=None,
    ),
    _layer("SpectralConvTranspose3d", lnn.SpectralConvTranspose3d, (1, 2, 2, 3, 2), 2, 3, 2),
    _layer("ScaledAvgPool2d", lnn.ScaledAvgPool2d, (2, 3, 4, 6), 2),
    _layer("ScaledAvgPool2d-overlap", lnn.ScaledAvgPool2d, _IMAGE, 3, 2, 1, True),
    _layer("ScaledL2NormPool2d", lnn.ScaledL2NormPool2d, (2, 3, 4, 6), (2, 3)),
    _layer("ScaledL2NormPool2d-overlap", lnn.ScaledL2NormPool2d, _IMAGE, 3, 2, 1, True),
    _layer("ScaledAdaptiveAvgPool2d", lnn.ScaledAdaptiveAvgPool2d, _IMAGE, 1),
    _layer("ScaledAdaptiveL2NormPool2d", lnn.ScaledAdaptiveL2NormPool2d, _IMAGE),
    *[
        _layer(
            f"{cls.__name__}-{mode}-{data_format}-{str(block).replace(' ', '')}",
            cls,
            (2, 12, 6, 12),
            block,
            mode=mode,
            data_format=data_format,
        )
        for cls in (lnn.InvertibleDownSampling, lnn.InvertibleUpSampling)
        for mode in ("CRD", "DCR")
        for data_format in ("channels_first", "channels_last")
        for block in (2, (1, 3))
    ],
    _layer("GroupSort", lnn.GroupSort, _IMAGE, 2),
    _layer("GroupSort-last", lnn.GroupSort, (2, 3, 6), 3, dim=-1),
    _layer("GroupSort2", lnn.GroupSort2, (2, 6)),
    _layer("FullSort", lnn.FullSort, (2, 5)),
    _layer("FullSort-last", lnn.FullSort, (2, 3, 5), dim=-1),
    _layer("MaxMin", lnn.MaxMin, _IMAGE),
    _layer("MaxMin-last", lnn.MaxMin, _IMAGE, -1),
    _layer("Abs", lnn.Abs, _IMAGE),
    _layer("HouseHolder", lnn.HouseHolder, _IMAGE, 4),
    _layer("HouseHolder-last", lnn.HouseHolder, (2, 3, 6), 6, dim=-1),
    _layer("LPReLU", lnn.LPReLU, _IMAGE),
    _layer("LPReLU-channels", lnn.LPReLU, _IMAGE, 4, 0.5),
    _layer("Sequential", _sequential, (2, 2, 4, 4)),
    _layer("Sequential-nested", _nested, _LINEAR),
]
CONSTRAINED = [layer for layer in LAYERS if layer.constrained]

# The torch.nn class of which each layer takes the arguments and the checkpoints.
TWINS = {
    lnn.SpectralLinear: nn.Linear,
    lnn.FrobeniusLinear: nn.Linear,
    lnn.SpectralConv1d: nn.Conv1d,
    lnn.SpectralConv2d: nn.Conv2d,
    lnn.SpectralConv3d: nn.Conv3d,
    lnn.FrobeniusConv1d: nn.Conv1d,
    lnn.FrobeniusConv2d: nn.Conv2d,
    lnn.FrobeniusConv3d: nn.Conv3d,
    lnn.SpectralConvTranspose1d: nn.ConvTranspose1d,
    lnn.SpectralConvTranspose2d: nn.ConvTranspose2d,
    lnn.SpectralConvTranspose3d: nn.ConvTranspose3d,
    lnn.ScaledAvgPool2d: nn.AvgPool2d,
    lnn.ScaledAdaptiveAvgPool2d: nn.AdaptiveAvgPool2d,
    lnn.LPReLU: nn.PReLU,
}
