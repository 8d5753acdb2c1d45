"""Every operation with the backends that implement it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lipkernels.kernels import (
    avg_pooling,
    bjorck,
    frobenius,
    polar,
    pooling,
    retract,
    sampling,
    sorting,
    spectral,
)

IMPLEMENTED: Mapping[str, Collection[str]] = {
    "polar_factor": polar.FORWARD,
    "bjorck": bjorck.FORWARD,
    "spectral_normalize": spectral.FORWARD,
    "power_iteration": spectral.POWER_ITERATION,
    "frobenius_normalize": frobenius.FORWARD,
    "retract": retract.RETRACT,
    "project_tangent": retract.PROJECT,
    "space_to_depth": sampling.SPACE_TO_DEPTH,
    "depth_to_space": sampling.DEPTH_TO_SPACE,
    "group_sort": sorting.FORWARD,
    "l2_norm_pool2d": pooling.FORWARD,
    "scaled_avg_pool2d": avg_pooling.FORWARD,
}
