"""Of `lipkernels.kernels.triton.polar_finish`: every kernel, in both precisions."""

from lipkernels.kernels.triton import polar_finish
from lipkernels.kernels.triton.workspace import LANES
from triton_builds.polar_start import COMMON, PLANES, SUMS, TABLES, on_every_architecture

_PRODUCTS = {**SUMS, "products": "*fp32", "n_products": "i32"}
_OUTPUTS = dict.fromkeys(("results", "factors", "spectra", "scalars"), "*fp32")


def _builds():
    for fast in (False, True):
        constants = {"FAST": fast, "LANES": LANES}
        states = {"state": "*i32", "following": "*i32"}
        yield from on_every_architecture(
            polar_finish.polish, {**COMMON, **states, **_PRODUCTS}, constants
        )
        constants = {"WIDTH": 4, "ALIGNED": True, **constants}
        yield from on_every_architecture(
            polar_finish.last_gram,
            {
                "factors": "*fp32",
                **TABLES,
                "places": "*i64",
                **PLANES,
                "state": "*i32",
                **_PRODUCTS,
            },
            constants,
        )
        yield from on_every_architecture(
            polar_finish.finish,
            {
                **_OUTPUTS,
                **TABLES,
                "places": "*i64",
                "multipliers": "*fp64",
                **PLANES,
                "state": "*i32",
                "units": "*fp32",
                "norms": "*fp32",
                **SUMS,
                "n_matrices": "i32",
                "products": "*fp32",
                "n_products": "i32",
            },
            constants,
        )


BUILDS = list(_builds())
