"""Differentiable functions: arguments are validated once here, then the backend's op is called."""

from lipkernels.functional.activation import group_sort, householder, lprelu, max_min
from lipkernels.functional.fingerprint import fingerprint
from lipkernels.functional.padding import symmetric_pad
from lipkernels.functional.pooling import l2_norm_pool2d, scaled_avg_pool2d
from lipkernels.functional.retract import project_tangent, retract, retract_
from lipkernels.functional.sampling import depth_to_space, space_to_depth
from lipkernels.functional.weights import (
    bjorck,
    frobenius_normalize,
    initial_vector,
    polar_factor,
    power_iteration,
    spectral_normalize,
)

__all__ = [
    "bjorck",
    "depth_to_space",
    "fingerprint",
    "frobenius_normalize",
    "group_sort",
    "householder",
    "initial_vector",
    "l2_norm_pool2d",
    "lprelu",
    "max_min",
    "polar_factor",
    "power_iteration",
    "project_tangent",
    "retract",
    "retract_",
    "scaled_avg_pool2d",
    "space_to_depth",
    "spectral_normalize",
    "symmetric_pad",
]
