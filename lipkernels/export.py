"""Condense and export whole models, constrained layers anywhere inside them."""

from __future__ import annotations

from torch import nn

from lipkernels.nn.exporting import condense_module, exported_module
from lipkernels.nn.module import LipschitzModule


def condense(model: nn.Module, strict: bool = False) -> None:
    """Write every constrained weight of ``model`` over its raw weight, in place.

    The model's output does not change, beyond rounding. Shared layers are written once. ``strict``:
    each stored weight is scaled down, as little as is found to do, until its certified norm is at
    most the layer's constant over its operator factor: a checkpoint whose promise can be proved.

    >>> from lipkernels.nn import SpectralLinear
    >>> layer = SpectralLinear(3, 3)
    >>> condense(layer)
    """
    for module in model.modules():
        if isinstance(module, LipschitzModule) and not isinstance(module, nn.Sequential):
            condense_module(module, strict)


def vanilla_export(model: nn.Module, strict: bool = False) -> nn.Module:
    """A copy of ``model`` with each Lipschitz module replaced by plain torch ones.

    The result shares no storage with the original, which is left untouched, and loads where only
    torch is installed (given that the classes of ``model`` itself do). A layer used in two places
    stays one layer. Modules that are not Lipschitz modules are copied.

    A weight's norm is at most k as stored, and what :func:`lipkernels.certify.lipschitz_bound` can
    prove of it is usually 1e-7 more. ``strict``: each weight is scaled down, as little as is found
    to do, until ``lipschitz_bound(result).layers[name] <= k``, exactly, in float64.

    >>> from lipkernels.nn import GroupSort2, SpectralLinear
    >>> plain = vanilla_export(nn.Sequential(SpectralLinear(3, 4), GroupSort2()))
    >>> type(plain[0])
    <class 'torch.nn.modules.linear.Linear'>
    """
    return exported_module(model, {}, strict)
