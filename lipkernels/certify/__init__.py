"""Upper bounds that can be trusted: float64, rounding included, no iteration believed.

This package imports torch alone: a certificate must not rest on what it certifies.
"""

from lipkernels.certify.matrix import spectral_norm_bound
from lipkernels.certify.modules import LAYER_FORWARDS, constant_without_weights, conv_padding
from lipkernels.certify.network import CHAIN_FORWARDS, LipschitzBound, lipschitz_bound
from lipkernels.certify.window import max_reads, operator_factor

__all__ = [
    "CHAIN_FORWARDS",
    "LAYER_FORWARDS",
    "LipschitzBound",
    "constant_without_weights",
    "conv_padding",
    "lipschitz_bound",
    "max_reads",
    "operator_factor",
    "spectral_norm_bound",
]
