"""Layers, activations, pools, containers and losses with known Lipschitz constants."""

from lipkernels.nn.activation import (
    Abs,
    FullSort,
    GroupSort,
    GroupSort2,
    HouseHolder,
    LPReLU,
    MaxMin,
)
from lipkernels.nn.container import Sequential
from lipkernels.nn.conv import (
    FrobeniusConv1d,
    FrobeniusConv2d,
    FrobeniusConv3d,
    SpectralConv1d,
    SpectralConv2d,
    SpectralConv3d,
)
from lipkernels.nn.conv_transpose import (
    SpectralConvTranspose1d,
    SpectralConvTranspose2d,
    SpectralConvTranspose3d,
)
from lipkernels.nn.linear import FrobeniusLinear, SpectralLinear
from lipkernels.nn.loss import (
    CategoricalHingeLoss,
    HingeMarginLoss,
    HingeMulticlassLoss,
    HKRLoss,
    HKRMulticlassLoss,
    KRLoss,
    KRMulticlassLoss,
    LseHKRMulticlassLoss,
    MarginCrossEntropyLoss,
    NegKRLoss,
    SoftHKRMulticlassLoss,
    TauBCEWithLogitsLoss,
    TauCrossEntropyLoss,
)
from lipkernels.nn.module import LipschitzModule
from lipkernels.nn.pooling import (
    ScaledAdaptativeL2NormPool2d,
    ScaledAdaptiveAvgPool2d,
    ScaledAdaptiveL2NormPool2d,
    ScaledAvgPool2d,
    ScaledL2NormPool2d,
)
from lipkernels.nn.sampling import InvertibleDownSampling, InvertibleUpSampling

__all__ = [
    "Abs",
    "CategoricalHingeLoss",
    "FrobeniusConv1d",
    "FrobeniusConv2d",
    "FrobeniusConv3d",
    "FrobeniusLinear",
    "FullSort",
    "GroupSort",
    "GroupSort2",
    "HKRLoss",
    "HKRMulticlassLoss",
    "HingeMarginLoss",
    "HingeMulticlassLoss",
    "HouseHolder",
    "InvertibleDownSampling",
    "InvertibleUpSampling",
    "KRLoss",
    "KRMulticlassLoss",
    "LPReLU",
    "LipschitzModule",
    "LseHKRMulticlassLoss",
    "MarginCrossEntropyLoss",
    "MaxMin",
    "NegKRLoss",
    "ScaledAdaptativeL2NormPool2d",
    "ScaledAdaptiveAvgPool2d",
    "ScaledAdaptiveL2NormPool2d",
    "ScaledAvgPool2d",
    "ScaledL2NormPool2d",
    "Sequential",
    "SoftHKRMulticlassLoss",
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralConv3d",
    "SpectralConvTranspose1d",
    "SpectralConvTranspose2d",
    "SpectralConvTranspose3d",
    "SpectralLinear",
    "TauBCEWithLogitsLoss",
    "TauCrossEntropyLoss",
]
