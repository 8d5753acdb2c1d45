"""Plain torch modules for what torch.nn has no class for.

A function of torch operations alone is traced into a :class:`torch.fx.GraphModule`: a module that
pickles, loads and runs where only torch is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, fx, nn


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def traced(function: Callable[[Tensor], Tensor], training: bool = True) -> nn.Module:
    """``function``, which may call torch alone, as a module that needs torch alone."""
    graph = fx.Tracer().trace(_Function(function))
    return fx.GraphModule(nn.Module(), graph, class_name="Plain").train(training)


def traced_with_tensor(
    function: Callable[[Tensor, Tensor], Tensor], tensor: Tensor, training: bool = True
) -> nn.Module:
    """``function(x, tensor)`` as such a module, with ``tensor`` as its parameter ``theta``."""

    class _WithTensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)

        def forward(self, x: Tensor) -> Tensor:
            return function(x, self.theta)

    root = _WithTensor()
    return fx.GraphModule(root, fx.Tracer().trace(root), class_name="Plain").train(training)


def scaled(module: nn.Module, k: float) -> nn.Module:
    """``k * module(x)``: the module itself for k = 1."""
    if k == 1.0:
        return module
    return nn.Sequential(module, traced(lambda x: x * k)).train(module.training)


_REFLECTION = {1: nn.ReflectionPad1d, 2: nn.ReflectionPad2d, 3: nn.ReflectionPad3d}
_PICK = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def _tripled(left: int, right: int) -> tuple[int, int]:
    # The first kept position is 1 - 3 left, the last 3 (size + right - 1) + 1, where the tripled
    # image spans 0 .. 3 size - 1. A negative width crops.
    return 3 * left - 1, 3 * right - 1


def symmetric_padding(pairs: Sequence[tuple[int, int]]) -> list[nn.Module]:
    """Symmetric padding by (left, right) of each dimension, from torch.nn's own modules.

    Repeat every pixel three times, reflect, keep every third: the middle pixel of each triple. The
    copy at distance j beyond an edge pixel's triple is then the pixel j - 1 before the edge.
    """
    n = len(pairs)
    widths = [w for left, right in reversed(pairs) for w in _tripled(left, right)]
    return [
        nn.Upsample(scale_factor=3, mode="nearest"),
        _REFLECTION[n](tuple(widths)),
        _PICK[n](1, stride=3),
    ]
