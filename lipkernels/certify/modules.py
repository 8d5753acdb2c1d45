"""Lipschitz constants of torch.nn's own modules: by formula, or from the weights as stored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lipkernels.certify.matrix import spectral_norm_bound
from lipkernels.certify.window import operator_factor

# l2 constants of modules without settings that matter.
_ONE_LIPSCHITZ = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Tanh,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Softshrink,
    nn.Tanhshrink,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
AVG_POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Forward functions (and the `_conv_forward` that some of them call) that are known to apply
# ``weight`` as the class that they come from does. A subclass with one of its own has no rule.
LAYER_FORWARDS: set[Any] = {
    cls.forward for cls in (nn.Linear, nn.PReLU, *CONV, *CONV_TRANSPOSE, *BATCH_NORM)
} | {cls._conv_forward for cls in CONV}
# These accept inputs of any size, whatever an attribute ``input_size`` says.
_CONV_OF_ANY_SIZE = {cls._conv_forward for cls in CONV}

# softplus turns into x beyond its threshold; from here on the step is below float32's resolution.
_SMOOTH_SOFTPLUS = 20.0


def has_own_forward(module: nn.Module) -> bool:
    """Whether ``forward`` was replaced on the instance, so that its class says nothing about it."""
    return "forward" in vars(module)


def constant_without_weights(module: Any) -> float | None:
    """l2 Lipschitz constant of a torch.nn module that has no trained weights; None if unknown."""
    kind = type(module)  # a subclass may compute anything
    if has_own_forward(module):
        return None
    if kind in _ONE_LIPSCHITZ:
        return 1.0
    if kind is nn.LeakyReLU:
        return _at_least_one(module.negative_slope)
    if kind is nn.ELU:
        return _at_least_one(module.alpha)
    if kind is nn.Sigmoid:
        return 0.25
    if kind is nn.Softplus:
        return 1.0 if module.threshold >= _SMOOTH_SOFTPLUS else None
    if kind in DROPOUT:
        # Survivors are multiplied by 1 / (1 - p) in training.
        return 1.0 if not module.training else _inverse(1.0 - module.p)
    if kind in AVG_POOL:
        return _average_pool(module)
    if kind in MAX_POOL:
        return _max_pool(module)
    return None


def _inverse(x: float) -> float:
    return math.inf if x <= 0 else math.nextafter(1.0 / x, math.inf)


def _at_least_one(slope: float) -> float:
    return math.inf if math.isnan(slope) else max(1.0, abs(slope))


def as_tuple(value: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    """One setting for each of ``n`` dimensions."""
    return (value,) * n if isinstance(value, int) else tuple(value)


def pool_dimensions(pool: nn.Module) -> int:
    """Of the windows of an average or max pool: 1, 2 or 3."""
    classes = zip((1, 2, 3), AVG_POOL, MAX_POOL, strict=True)
    return next(n for n, average, largest in classes if isinstance(pool, (average, largest)))


def _average_pool(module: Any) -> float | None:
    n = pool_dimensions(module)
    kernel, stride = as_tuple(module.kernel_size, n), as_tuple(module.stride, n)
    padding = as_tuple(module.padding, n)
    window = math.prod(kernel)
    override = getattr(module, "divisor_override", None)
    # Border windows have a divisor of their own, as small as one.
    own_divisor = module.ceil_mode or (any(padding) and not module.count_include_pad)
    divisor = abs(override or (1 if own_divisor else window))
    pads = [(p, p) for p in padding]
    overlap = operator_factor(kernel, stride, pads, (1,) * n, "zeros")
    return math.sqrt(window) / divisor * overlap * (1 + 2.0**-50)


def _max_pool(module: Any) -> float | None:
    # |max x - max y| <= max over the window of |x - y|: each window picks one pixel's change.
    n = pool_dimensions(module)
    kernel, stride = as_tuple(module.kernel_size, n), as_tuple(module.stride, n)
    dilation = as_tuple(module.dilation, n)
    return operator_factor(kernel, stride, [(0, 0)] * n, dilation, "zeros")


def weight_matrices(weight: Tensor, groups: int) -> list[Tensor]:
    """(rows, cols) of each group."""
    return list(weight.detach().reshape(groups, weight.shape[0] // groups, -1))


def constant_with_weights(module: Any) -> float | None:
    """Upper bound of the constant of a torch.nn layer with weights; None if it has no rule.

    ``module.weight`` is read once, as the attribute that forward uses, and bounded as stored; in an
    autocast region as autocast rounds it.
    """
    if has_own_forward(module) or type(module).forward not in LAYER_FORWARDS:
        return None
    if isinstance(module, nn.Linear):
        return spectral_norm_bound(as_forward_casts(module.weight))
    if isinstance(module, (*CONV, *CONV_TRANSPOSE)):
        return _convolution(module)
    if isinstance(module, nn.PReLU):
        return max(1.0, float(module.weight.detach().abs().max()))
    if isinstance(module, BATCH_NORM) and not module.training:
        return _batch_norm(module)
    return None


def as_forward_casts(weight: Tensor) -> Tensor:
    """``weight`` in the format that forward multiplies by: autocast's, or its own."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return weight
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


def _convolution(module: Any) -> float | None:
    weight = as_forward_casts(module.weight)
    factor = convolution_factor(module, tuple(weight.shape[2:]))
    if factor is None:
        return None
    norm = max(
        (spectral_norm_bound(k) for k in weight_matrices(weight, module.groups)), default=0.0
    )
    return norm * factor * (1 + 2.0**-52)


def convolution_factor(module: Any, kernel: tuple[int, ...]) -> float | None:
    """How much larger than its matrix's norm a convolution's can be; None if it has no rule.

    ``kernel`` is that of the weight, which counts in forward; ``kernel_size`` is a record of it.
    Raises TypeError for a module that is no convolution, ValueError for a kernel that has not one
    size for each of its dimensions.
    """
    if not isinstance(module, (*CONV, *CONV_TRANSPOSE)):
        raise TypeError(f"module: expected a torch.nn convolution, got {type(module).__name__}")
    n = len(kernel)
    if n != len(module.kernel_size):
        raise ValueError(
            f"kernel: expected {len(module.kernel_size)} sizes for {type(module).__name__}, got"
            f" {tuple(kernel)}"
        )
    stride, dilation = as_tuple(module.stride, n), as_tuple(module.dilation, n)
    if isinstance(module, CONV):
        conv_forward = type(module)._conv_forward
        if conv_forward not in LAYER_FORWARDS or "_conv_forward" in vars(module):
            return None
        pads, mode = conv_padding(module), module.padding_mode
        size: Any = None if conv_forward in _CONV_OF_ANY_SIZE else module.input_size
    else:
        pads, mode, size = ((0, 0),) * n, "zeros", None
    return operator_factor(kernel, stride, pads, dilation, mode, size)


def conv_padding(module: Any) -> tuple[tuple[int, int], ...]:
    """(left, right) of each dimension, as the forward of a torch.nn convolution pads."""
    if module.padding_mode != "zeros":
        widths = module._reversed_padding_repeated_twice  # last dimension first, left then right
        return tuple((widths[i], widths[i + 1]) for i in range(len(widths) - 2, -1, -2))
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in as_tuple(module.padding, len(module.kernel_size)))


def _batch_norm(module: Any) -> float | None:
    if module.running_var is None:
        return None
    gain = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        gain = gain * module.weight.detach().double()
    bound = float(gain.abs().max()) * (1 + 2.0**-48)
    return bound if math.isfinite(bound) else math.inf


def finite_parameters(module: nn.Module) -> bool:
    """Whether every parameter and buffer of the module itself is free of NaN and infinity."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return all(bool(torch.isfinite(t).all()) for t in own if t.is_floating_point())
