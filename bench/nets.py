"""The demo's two networks, as each library's user would write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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

    def __init__(self, like: nn.Conv2d) -> None:
        super().__init__()
        self.stride, self.padding = like.stride, like.padding
        self.shape = like.weight.shape
        self.kernel = parametrizations.orthogonal(
            nn.Linear(like.weight[0].numel(), like.out_channels)
        )
        self.reads = -(-like.kernel_size[0] // like.stride[0])

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
    """What stands in for a Linear, a Conv2d and an activation of the twin."""

    linear: Callable[[nn.Linear], nn.Module]
    conv: Callable[[nn.Conv2d], nn.Module]
    activation: Callable[[], nn.Module]

    def replace(self, module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Linear):
            return self.linear(module)
        if isinstance(module, nn.Conv2d):
            return self.conv(module)
        return self.activation() if isinstance(module, nn.ReLU) else module


def _same(module: nn.Module) -> nn.Module:
    return module


def _conv_arguments(like: nn.Conv2d) -> dict[str, int]:
    return {
        "in_channels": like.in_channels,
        "out_channels": like.out_channels,
        "kernel_size": like.kernel_size[0],
        "stride": like.stride[0],
        "padding": int(like.padding[0]),
    }


def _lipkernels() -> Library:
    return Library(
        lambda m: lnn.SpectralLinear(m.in_features, m.out_features),
        lambda m: lnn.SpectralConv2d(**_conv_arguments(m)),
        lnn.GroupSort2,
    )


def _deel_torchlip() -> Library:
    from deel import torchlip

    return Library(
        lambda m: torchlip.SpectralLinear(m.in_features, m.out_features),
        lambda m: torchlip.SpectralConv2d(**_conv_arguments(m)),
        torchlip.GroupSort2,
    )


def _orthogonium() -> Library:
    from orthogonium.layers import AdaptiveOrthoConv2d, MaxMin, OrthoLinear

    return Library(
        lambda m: OrthoLinear(m.in_features, m.out_features),
        lambda m: AdaptiveOrthoConv2d(**_conv_arguments(m), padding_mode="zeros"),
        MaxMin,
    )


LIBRARIES: dict[str, Callable[[], Library]] = {
    TWIN: lambda: Library(_same, _same, lnn.GroupSort2),
    "unconstrained, ReLU": lambda: Library(_same, _same, nn.ReLU),
    "lipkernels": _lipkernels,
    "lipkernels retract": _lipkernels,
    "deel-torchlip": _deel_torchlip,
    "orthogonium": _orthogonium,
    "torch orthogonal": lambda: Library(
        parametrizations.orthogonal, KernelOrthogonal, lnn.GroupSort2
    ),
    "torch spectral_norm": lambda: Library(
        parametrizations.spectral_norm, parametrizations.spectral_norm, lnn.GroupSort2
    ),
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


def plain_layers(net: nn.Module) -> Iterator[nn.Module]:
    """The layers as float64 torch modules with the weights that ``net`` would evaluate with."""
    net.eval()
    for module in net.children():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            yield module
            continue
        weight, bias = weight.detach().double(), module.bias.detach().double()
        if weight.dim() == 2:
            plain = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        else:
            plain = nn.Conv2d(
                weight.shape[1], weight.shape[0], weight.shape[2:], module.stride, module.padding
            )
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = nn.Parameter(bias, requires_grad=False)
        yield plain


def plain_float64(net: nn.Module) -> nn.Sequential:
    """``net`` as it would be deployed, in torch modules and float64."""
    was_training = net.training
    plain = nn.Sequential(*plain_layers(net))
    net.train(was_training)
    return plain


def matrix(layer: nn.Module, shape: torch.Size) -> Tensor:
    """The dense float64 matrix of an affine ``layer`` on one input of ``shape``."""
    n = shape.numel()
    device = layer.weight.device
    basis = torch.eye(n, dtype=torch.float64, device=device).reshape(n, *shape)
    with torch.no_grad():
        return (layer(basis) - layer(torch.zeros_like(basis[:1]))).reshape(n, -1).T
