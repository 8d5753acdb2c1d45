"""The demo's two networks, as each library's user would write them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lipkernels
import lipkernels.nn as lnn
from lipkernels.demo.nets import plain_twin

IMAGE = (1, 28, 28)
TWIN = "unconstrained"
MODULES = {
    TWIN: "torch",
    "unconstrained, ReLU": "torch",
    "lipkernels": "lipkernels",
    "lipkernels retract": "lipkernels",
    "deel-torchlip": "deel.torchlip",
    "orthogonium": "orthogonium.layers",
    "torch orthogonal": "torch",
    "torch spectral_norm": "torch",
}


class KernelOrthogonal(nn.Module):
    """A convolution whose kernel, as a matrix, torch's `orthogonal` constrains.

    On a Conv2d itself it would make every k x k slice orthogonal, which bounds nothing. An input
    pixel is read by ceil(k / stride)^2 outputs, and so the kernel is divided by ceil(k / stride).
    """

    def __init__(self, n_in: int, n_out: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.shape = (n_out, n_in, kernel_size, kernel_size)
        self.kernel = nn.Linear(n_in * kernel_size**2, n_out)
        parametrizations.orthogonal(self.kernel)
        self.reads = -(-kernel_size // stride)

    @property
    def weight(self) -> Tensor:
        return self.kernel.weight.reshape(self.shape) / self.reads

    @property
    def bias(self) -> Tensor:
        return self.kernel.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)


@dataclass(frozen=True)
class Library:
    """Makers of layers: ``linear(n_in, n_out)``, ``conv(n_in, n_out, kernel, stride, padding)``."""

    linear: Callable[[int, int], nn.Module]
    conv: Callable[[int, int, int, int, int], nn.Module]
    activation: Callable[[], nn.Module]

    def replace(self, module: nn.Module) -> nn.Module:
        """This library's layer for one of the twin's."""
        if isinstance(module, nn.Linear):
            return self.linear(module.in_features, module.out_features)
        if isinstance(module, nn.Conv2d):
            channels = module.in_channels, module.out_channels
            return self.conv(
                *channels, module.kernel_size[0], module.stride[0], int(module.padding[0])
            )
        return self.activation() if isinstance(module, nn.ReLU) else module


def _lipkernels() -> Library:
    return Library(lnn.SpectralLinear, lnn.SpectralConv2d, lnn.GroupSort2)


def _deel_torchlip() -> Library:
    library: Any = importlib.import_module("deel.torchlip")  # its defaults contradict its types
    return Library(library.SpectralLinear, library.SpectralConv2d, library.GroupSort2)


def _orthogonium() -> Library:
    from orthogonium.layers import AdaptiveOrthoConv2d, MaxMin, OrthoLinear

    # The twin's padding; the default would be circular.
    return Library(OrthoLinear, partial(AdaptiveOrthoConv2d, padding_mode="zeros"), MaxMin)


def _torch_spectral_norm() -> Library:
    return Library(
        lambda *sizes: parametrizations.spectral_norm(nn.Linear(*sizes)),
        lambda *sizes: parametrizations.spectral_norm(nn.Conv2d(*sizes)),
        lnn.GroupSort2,
    )


def _torch_orthogonal() -> Library:
    return Library(
        lambda *sizes: parametrizations.orthogonal(nn.Linear(*sizes)),
        KernelOrthogonal,
        lnn.GroupSort2,
    )


LIBRARIES: dict[str, Callable[[], Library]] = {
    TWIN: lambda: Library(nn.Linear, nn.Conv2d, lnn.GroupSort2),
    "unconstrained, ReLU": lambda: Library(nn.Linear, nn.Conv2d, nn.ReLU),
    "lipkernels": _lipkernels,
    "lipkernels retract": _lipkernels,
    "deel-torchlip": _deel_torchlip,
    "orthogonium": _orthogonium,
    "torch orthogonal": _torch_orthogonal,
    "torch spectral_norm": _torch_spectral_norm,
}


def missing() -> dict[str, str]:
    """Contender -> why it cannot take part."""
    from bench import peers

    reasons = peers.missing(MODULES)
    if not hasattr(lipkernels, "Retractor"):
        reasons["lipkernels retract"] = "this version of lipkernels has no Retractor"
    return reasons


def build(name: str, model: str, image: tuple[int, ...] = IMAGE) -> nn.Sequential:
    """The demo's ``model`` ("mlp" or "conv") made of ``name``'s layers, in training mode."""
    library = LIBRARIES[name]()
    layers = [library.replace(module) for module in plain_twin(model, image).children()]
    ours = name.startswith("lipkernels")
    net = lnn.Sequential(*layers) if ours else nn.Sequential(*layers)
    return net.train()


def _plain(module: Any) -> nn.Module:
    """One layer with the weight that it would evaluate with, in torch modules and float64."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return module
    rows, cols, *kernel = weight.shape
    with torch.device(weight.device):
        if kernel:
            plain = nn.Conv2d(cols, rows, kernel[0], module.stride, module.padding)
        else:
            plain = nn.Linear(cols, rows)
    plain.double().requires_grad_(False)
    with torch.no_grad():
        for mine, value in zip(plain.parameters(), (weight, module.bias), strict=True):
            mine.copy_(value)
    return plain


def plain_float64(net: nn.Module) -> nn.Sequential:
    """``net`` as it would be deployed, in torch modules and float64."""
    was_training = net.training
    net.eval()
    plain = nn.Sequential(*map(_plain, net.children()))
    net.train(was_training)
    return plain


def matrix(layer: nn.Conv2d, shape: torch.Size) -> Tensor:
    """The dense float64 matrix of ``layer`` on one input of ``shape``."""
    n = shape.numel()
    basis = torch.eye(n, dtype=torch.float64, device=layer.weight.device).reshape(n, *shape)
    with torch.no_grad():
        return (layer(basis) - layer(torch.zeros_like(basis[:1]))).reshape(n, -1).T
