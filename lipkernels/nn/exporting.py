"""Replace the Lipschitz modules of a module tree by plain torch ones, in a copy."""

from __future__ import annotations

import copy

from torch import nn

from lipkernels.nn.module import LipschitzModule


def _drop_own_hooks(module: nn.Module) -> None:
    """Hooks of this package (``group_weights``) have nothing to do in an export."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__module__", "").partition(".")[0] == __name__.partition(".")[0]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def condense_module(module: LipschitzModule, strict: bool) -> None:
    """``module.condense()``, in the strict mode of those that have one."""
    if strict and module.has_strict_mode:
        module.condense(strict=True)  # pyright: ignore[reportCallIssue]
    else:
        module.condense()


def exported_module(
    module: nn.Module, done: dict[nn.Module, nn.Module], strict: bool = False
) -> nn.Module:
    """The plain counterpart of ``module``; ``done`` keeps a layer used twice one layer."""
    if module in done:
        return done[module]
    if isinstance(module, LipschitzModule):
        if strict and module.has_strict_mode:
            plain = module.vanilla_export(strict=True)  # pyright: ignore[reportCallIssue]
        else:
            plain = module.vanilla_export()
    else:
        # deepcopy with the children declared copied: they are exported in their turn.
        plain = copy.deepcopy(module, {id(child): child for child in module.children()})
        for name, child in module._modules.items():
            if child is not None:
                plain._modules[name] = exported_module(child, done, strict)
        _drop_own_hooks(plain)
    done[module] = plain
    return plain
