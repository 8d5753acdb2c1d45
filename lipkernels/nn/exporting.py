"""Replace the Lipschitz modules of a module tree by plain torch ones, in a copy."""

from __future__ import annotations

import copy

from torch import nn

from lipkernels.nn.module import LipschitzModule


def exported_module(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The plain counterpart of ``module``; ``done`` keeps a layer used twice one layer."""
    if module in done:
        return done[module]
    if isinstance(module, LipschitzModule):
        plain = module.vanilla_export()
    else:
        # deepcopy with the children declared copied: they are exported in their turn.
        plain = copy.deepcopy(module, {id(child): child for child in module.children()})
        for name, child in module._modules.items():
            if child is not None:
                plain._modules[name] = exported_module(child, done)
    done[module] = plain
    return plain
