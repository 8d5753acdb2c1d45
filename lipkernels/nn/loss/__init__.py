"""Losses for Lipschitz networks, under the names that deel-torchlip gave them."""

from .binary import HingeMarginLoss, HKRLoss, KRLoss, NegKRLoss
from .cross_entropy import MarginCrossEntropyLoss, TauBCEWithLogitsLoss, TauCrossEntropyLoss
from .multiclass import (
    CategoricalHingeLoss,
    HingeMulticlassLoss,
    HKRMulticlassLoss,
    KRMulticlassLoss,
)
from .soft import LseHKRMulticlassLoss, SoftHKRMulticlassLoss

__all__ = [
    "CategoricalHingeLoss",
    "HKRLoss",
    "HKRMulticlassLoss",
    "HingeMarginLoss",
    "HingeMulticlassLoss",
    "KRLoss",
    "KRMulticlassLoss",
    "LseHKRMulticlassLoss",
    "MarginCrossEntropyLoss",
    "NegKRLoss",
    "SoftHKRMulticlassLoss",
    "TauBCEWithLogitsLoss",
    "TauCrossEntropyLoss",
]
