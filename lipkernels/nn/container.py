"""Sequential with a Lipschitz constant for the network as a whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipkernels.certify import CHAIN_FORWARDS, constant_without_weights
from lipkernels.nn.constrained import ConstrainedWeight
from lipkernels.nn.exporting import condense_module, exported_module
from lipkernels.nn.module import LipschitzModule

_SLACK = 1e-9  # float64 rounding of a product of constants


def _leaves(container: nn.Sequential, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The layers in order, repeated ones repeated; a nested Sequential is its layers."""
    leaves: list[tuple[str, nn.Module]] = []
    for name, child in container._modules.items():
        if child is None:
            continue
        if isinstance(child, nn.Sequential) and type(child).forward in CHAIN_FORWARDS:
            leaves += _leaves(child, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", child))
    return leaves


def _nested(container: nn.Sequential) -> list[Sequential]:
    """The Lipschitz containers whose layers are among the leaves of ``container``."""
    nested: list[Sequential] = []
    for child in container._modules.values():
        if isinstance(child, nn.Sequential) and type(child).forward in CHAIN_FORWARDS:
            nested += [child] if isinstance(child, Sequential) else []
            nested += _nested(child)
    return nested


def _promised_constant(name: str, module: nn.Module) -> float:
    if isinstance(module, LipschitzModule):
        return module.lipschitz_constant
    constant = constant_without_weights(module)
    if constant is None:
        raise ValueError(
            "Sequential: expected layers with a known Lipschitz constant; layer"
            f" {name!r} is a {type(module).__name__}, which has none"
        )
    return constant


class Sequential(LipschitzModule, nn.Sequential):
    r"""A chain of layers whose l2 Lipschitz constant, as a whole, is ``k_coef_lip``.

    The constants of the layers multiply to the network's. They are rescaled by one common factor,
    on construction and by :meth:`set_klip_factor`, so that the product is k: layers with weights
    share it, and their ratios are kept (if none has weights, all Lipschitz modules share it). Plain
    torch modules with a known constant (ReLU, Flatten, MaxPool, ..) are counted; one without raises
    ValueError naming it. A nested container counts as its layers, and its own constant becomes what
    they multiply to.

    A later change of the layers (``append``, a layer's own ``set_klip_factor``) that lifts the
    product above k makes the next forward raise ValueError; ``set_klip_factor`` shares k out again.
    Slicing returns a container of the same layers, with their constants as they are; putting layers
    of one Sequential into another one rescales them for both.

    >>> from lipkernels.nn import SpectralLinear
    >>> net = Sequential(SpectralLinear(4, 4, k_coef_lip=5.0), SpectralLinear(4, 2), k_coef_lip=1.0)
    >>> round(net[0].k_coef_lip * net[1].k_coef_lip, 9)
    1.0
    """

    has_strict_mode = True

    def __init__(self, *args: Any, k_coef_lip: float = 1.0) -> None:
        nn.Sequential.__init__(self, *args)
        self.k_coef_lip = k_coef_lip

    def layers_constant(self) -> float:
        """The product of the layers' constants as they are now."""
        product = 1.0  # a loop, which torch.compile can trace
        for name, layer in _leaves(self):
            product *= _promised_constant(name, layer)
        return product

    @property
    def lipschitz_constant(self) -> float:
        """What the layers multiply to now; ``k_coef_lip`` unless they were changed since."""
        return self.layers_constant()

    def _klip_factor_changed(self) -> None:
        leaves = list(_leaves(self))
        product = self.layers_constant()
        adjustable = [layer for _, layer in leaves if isinstance(layer, LipschitzModule)]
        weighted = [
            layer
            for layer in adjustable
            if any(isinstance(m, ConstrainedWeight) for m in layer.modules())
        ]
        shared = weighted or adjustable
        if not shared:
            self._check_product()
            return
        ratio = (self.k_coef_lip / product) ** (1 / len(shared))
        if ratio != 1.0:
            for layer in dict.fromkeys(shared):  # one that occurs twice has its share twice
                layer.set_klip_factor(layer.k_coef_lip * ratio)
        for container in _nested(self):
            container._k_coef_lip = container.layers_constant()

    def _check_product(self) -> None:
        product = self.layers_constant()
        if product > self.k_coef_lip * (1 + _SLACK):
            raise ValueError(
                f"Sequential: expected layers whose constants multiply to at most k_coef_lip ="
                f" {self.k_coef_lip:g}, got {product:g}; set_klip_factor(k) shares k out again"
            )

    def forward(self, input: Tensor) -> Tensor:
        self._check_product()
        return super().forward(input)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        part = Sequential()
        for name, layer in list(self._modules.items())[index]:
            part.add_module(name, layer)
        # The layers are shared with this container: their constants stay as they are.
        part._k_coef_lip = part.layers_constant()
        return part

    def condense(self, strict: bool = False) -> None:
        """Condense every layer, in place; ``strict`` as in the layers."""
        for layer in dict.fromkeys(layer for _, layer in _leaves(self)):
            if isinstance(layer, LipschitzModule):
                condense_module(layer, strict)

    def vanilla_export(self, strict: bool = False) -> nn.Sequential:
        """A plain :class:`torch.nn.Sequential` of the layers' exports, ``strict`` or not."""
        exported: dict[nn.Module, nn.Module] = {}
        plain = nn.Sequential().train(self.training)
        for name, child in self._modules.items():
            plain.add_module(
                name, None if child is None else exported_module(child, exported, strict)
            )
        return plain

    def extra_repr(self) -> str:
        return f"k_coef_lip={self.k_coef_lip:g}"


CHAIN_FORWARDS.add(Sequential.forward)
