"""Which backends can run an op on a device, and why the others cannot."""

from __future__ import annotations

import torch

from lipkernels import backends
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

IMPLEMENTED = {
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
REFERENCE = "reference"


def of(op: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """``(backends that can run op, {backend: why it cannot})``, the reference last."""
    able, reasons = [], {}
    for name in backends.BACKENDS[::-1]:
        try:
            able.append(backends.resolve(op, IMPLEMENTED[op], device, name))
        except backends.BackendUnavailableError as error:
            reasons[name] = str(error)
    return able, reasons
