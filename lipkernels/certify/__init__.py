"""Upper bounds that can be trusted: float64, rounding included, no iteration believed.

This package imports torch alone: a certificate must not rest on what it certifies.
"""

from lipkernels.certify.forward import ForwardError, forward_error
from lipkernels.certify.matrix import spectral_norm_bound
from lipkernels.certify.modules import (
    LAYER_FORWARDS,
    constant_without_weights,
    conv_padding,
    convolution_factor,
)
from lipkernels.certify.network import CHAIN_FORWARDS, LipschitzBound, lipschitz_bound
from lipkernels.certify.radius import certified_radius
from lipkernels.certify.strict import largest_norm, shrunk
from lipkernels.certify.weightless import EXACT, ROUNDINGS, SCALED, Roundings
from lipkernels.certify.window import max_reads, operator_factor

__all__ = [
    "CHAIN_FORWARDS",
    "EXACT",
    "LAYER_FORWARDS",
    "ROUNDINGS",
    "SCALED",
    "ForwardError",
    "LipschitzBound",
    "Roundings",
    "certified_radius",
    "constant_without_weights",
    "conv_padding",
    "convolution_factor",
    "forward_error",
    "largest_norm",
    "lipschitz_bound",
    "max_reads",
    "operator_factor",
    "shrunk",
    "spectral_norm_bound",
]
