"""One architecture, built twice: with 1-Lipschitz layers, and with torch's own (its twin)."""

from itertools import pairwise

from torch import nn

import lipkernels.nn as lnn

CLASSES = 10


def _mlp(shape: tuple[int, ...], linear: type, activation: type) -> list[nn.Module]:
    channels, height, width = shape
    widths = [
        channels * height * width,
        *((256, 256, 256) if height >= 28 else (128, 128)),
        CLASSES,
    ]
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(widths):
        layers += [linear(n_in, n_out), activation()]
    return layers[:-1]


def _conv(shape: tuple[int, ...], conv: type, linear: type, activation: type) -> list[nn.Module]:
    # A kernel with as many output channels as inputs per patch (16 = 1 * 4 * 4) can be an isometry:
    # it keeps distances, so that the layers behind it have margin left to use.
    channels, height, width = shape
    layers: list[nn.Module] = [
        conv(channels, 16, 4, stride=2, padding=1),
        activation(),
        conv(16, 32, 4, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        linear(32 * (height // 4) * (width // 4), 256),
        activation(),
        linear(256, 256),
        activation(),
        linear(256, CLASSES),
    ]
    return layers


def lipschitz_net(model: str, shape: tuple[int, ...]) -> nn.Module:
    """A network f with |f(x) - f(y)|_2 <= |x - y|_2, for images of `shape` (c, h, w)."""
    if model == "conv":
        layers = _conv(shape, lnn.SpectralConv2d, lnn.SpectralLinear, lnn.GroupSort2)
    else:
        layers = _mlp(shape, lnn.SpectralLinear, lnn.GroupSort2)
    return lnn.Sequential(*layers)


def plain_twin(model: str, shape: tuple[int, ...]) -> nn.Module:
    """The same shapes with nothing constrained, and ReLU."""
    if model == "conv":
        return nn.Sequential(*_conv(shape, nn.Conv2d, nn.Linear, nn.ReLU))
    return nn.Sequential(*_mlp(shape, nn.Linear, nn.ReLU))


def describe(net: nn.Module) -> str:
    """The shapes of the layers that have weights: "784-256-256-256-10", "conv 1-16-64, ..."."""
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    dense = "-".join(str(n) for n in [linears[0].in_features, *(m.out_features for m in linears)])
    if not convs:
        return dense
    kernels = "-".join(str(n) for n in [convs[0].in_channels, *(m.out_channels for m in convs)])
    return f"conv {kernels}, linear {dense}"
