"""The Lipschitz bound of a network: the product of its layers' bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules import module as torch_module

from lipkernels.certify.graph import NoRuleError, graph_constant
from lipkernels.certify.modules import (
    constant_with_weights,
    constant_without_weights,
    finite_parameters,
    has_own_forward,
)

# Forward functions that apply the children in order and do nothing else.
CHAIN_FORWARDS: set[Callable[..., object]] = {nn.Sequential.forward}


@dataclass(frozen=True)
class LipschitzBound:
    """``value``: upper bound of the network's l2 constant. ``layers``: of each layer, by its name.

    ``float(bound)`` is ``value``. A layer with NaN or infinity in its parameters has bound inf.
    """

    value: float
    layers: dict[str, float] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        width = max((len(name) for name in self.layers), default=0)
        rows = [f"{name:<{width}}  {bound:.9g}" for name, bound in self.layers.items()]
        return "\n".join([*rows, f"{'network':<{width}}  {self.value:.9g}"])


def lipschitz_bound(model: nn.Module) -> LipschitzBound:
    r"""A rigorous upper bound of the l2 Lipschitz constant of ``model``, in real arithmetic.

    The weights are taken as stored (or, in a constrained layer, as forward uses them now) and
    bounded in float64 by :func:`spectral_norm_bound`; nothing is believed that a file or an
    iterative kernel says. What the forward pass itself rounds is not part of it: see
    :func:`lipkernels.certify.certified_radius`, which counts it.

    ``model``: a layer, or (nested) ``Sequential`` containers of layers, constrained or plain. A
    module that defines ``certified_lipschitz_constant()`` (a float) is taken at its word: for your
    own modules. Raises TypeError naming the module that has no rule, forward hooks, or a forward
    that was replaced on the instance.

    >>> import torch
    >>> layer = nn.Linear(4, 4)
    >>> bound = lipschitz_bound(nn.Sequential(layer, nn.ReLU()))
    >>> bound.value >= torch.linalg.matrix_norm(layer.weight.double(), 2).item()
    True
    """
    layers: dict[str, float] = {}
    value = _walk(model, "", layers)
    return LipschitzBound(value, layers)


def _walk(module: nn.Module, name: str, layers: dict[str, float]) -> float:
    value = 1.0
    for leaf_name, leaf in leaves(module, name):
        bound = layers[leaf_name or type(leaf).__name__] = layer_bound(leaf, leaf_name)
        value = value * bound if leaf is module else math.nextafter(value * bound, math.inf)
    return math.inf if math.isnan(value) else value


def leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) in the order of forward, a layer used twice twice; TypeError for hooks."""
    _refuse_tampering(module, name)
    if type(module).forward not in CHAIN_FORWARDS:
        yield name, module
        return
    # Not named_children(): it passes over the second use of a layer.
    for child_name, child in module._modules.items():
        if child is not None:
            yield from leaves(child, f"{name}.{child_name}" if name else child_name)


def _refuse_tampering(module: nn.Module, name: str) -> None:
    if has_own_forward(module):
        raise TypeError(_no_rule(module, name, "its forward was replaced on the instance"))
    hooks = (
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
    )
    if not all(getattr(hook, "keeps_output", False) for hook in hooks):
        raise TypeError(_no_rule(module, name, "it has forward hooks, which may change its output"))


def layer_bound(module: nn.Module, name: str) -> float:
    """Upper bound of a layer's constant: inf for NaN or infinity; TypeError without a rule."""
    if not finite_parameters(module):
        return math.inf
    try:
        bound = _rule(module)
    except NoRuleError as error:
        raise TypeError(_no_rule(module, name, str(error))) from error
    if bound is None:
        raise TypeError(_no_rule(module, name, "its class has no rule"))
    return math.inf if math.isnan(bound) else bound


def _rule(module: nn.Module) -> float | None:
    declared = getattr(module, "certified_lipschitz_constant", None)
    if declared is not None:
        constant = float(declared())
        if constant < 0:
            raise NoRuleError(f"its certified_lipschitz_constant() is negative, {constant!r}")
        return constant
    if isinstance(module, fx.GraphModule):
        return graph_constant(module)
    without = constant_without_weights(module)
    return constant_with_weights(module) if without is None else without


def _no_rule(module: nn.Module, name: str, why: str) -> str:
    where = f"module {name!r}" if name else "the model"
    return (
        f"lipschitz_bound: expected (nested) Sequential containers of layers with a known bound;"
        f" {where} ({type(module).__name__}) cannot be bounded: {why}. Define"
        f" certified_lipschitz_constant() on it, or certify its parts"
    )
