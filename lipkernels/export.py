"""Condense and export whole models, constrained layers anywhere inside them."""

from __future__ import annotations

from torch import nn

from lipkernels.nn.exporting import exported_module
from lipkernels.nn.module import LipschitzModule


def condense(model: nn.Module) -> None:
    """Write every constrained weight of ``model`` over its raw weight, in place.

    The model's output does not change. Shared layers are written once.

    >>> from lipkernels.nn import SpectralLinear
    >>> layer = SpectralLinear(3, 3)
    >>> condense(layer)
    """
    for module in model.modules():
        if isinstance(module, LipschitzModule) and not isinstance(module, nn.Sequential):
            module.condense()


def vanilla_export(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with each Lipschitz module replaced by plain torch ones.

    The result shares no storage with the original, which is left untouched, and loads where only
    torch is installed (given that the classes of ``model`` itself do). A layer used in two places
    stays one layer. Modules that are not Lipschitz modules are copied.

    >>> from lipkernels.nn import GroupSort2, SpectralLinear
    >>> plain = vanilla_export(nn.Sequential(SpectralLinear(3, 4), GroupSort2()))
    >>> type(plain[0])
    <class 'torch.nn.modules.linear.Linear'>
    """
    return exported_module(model, {})
