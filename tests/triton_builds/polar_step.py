"""Of `lipkernels.kernels.triton.polar_step`: every kernel, in both precisions."""

from lipkernels.kernels.triton import polar_step
from lipkernels.kernels.triton.workspace import LANES
from triton_builds.polar_start import COMMON, PLANES, SUMS, TABLES, on_every_architecture

_STATES = {"state": "*i32", "following": "*i32"}
_NORMS = {"norms": "*fp32", "n_matrices": "i32"}
_POLYNOMIAL = {**TABLES, "coefficients": "*fp32", **PLANES, **_STATES, "last": "i32", **SUMS}


def _builds():
    for fast in (False, True):
        for kernel in (polar_step.gram, polar_step.square):
            yield from on_every_architecture(
                kernel, {**COMMON, "state": "*i32", **SUMS}, {"FAST": fast}
            )
        for first in (True, False):
            constants = {"FIRST": first, "FAST": fast}
            yield from on_every_architecture(
                polar_step.polynomial, _POLYNOMIAL, {**constants, "LANES": LANES}
            )
            yield from on_every_architecture(
                polar_step.apply, {**COMMON, **_STATES, **_NORMS}, constants
            )


BUILDS = list(_builds())
