"""Of `lipkernels.kernels.triton.polar`: every kernel, with the tiling of each architecture."""

from lipkernels.kernels.triton import planes, polar, products
from lipkernels.kernels.triton.workspace import LANES
from triton_builds import Build

_TABLES = {"table": "*i64", "tiles": "*i32"}
_PLANES = {"hi": "*fp16", "lo": "*fp16"}
_SUMS = {"sums": "*fp32", "n_sums": "i32"}
_STATES = {"state": "*i32", "following": "*i32"}
_NORMS = {"norms": "*fp32", "n_matrices": "i32"}
_COMMON = {**_TABLES, **_PLANES}
_LANES = {"LANES": LANES}

# kernel, signature, constants besides those of the tiling
_PRODUCTS = [
    (polar.first_gram, {**_COMMON, "squares": "*fp32", "norms": "*fp32", **_SUMS}, _LANES),
    (polar.first_square, {**_COMMON, **_SUMS}, {}),
    (polar.gram, {**_COMMON, "state": "*i32", **_SUMS}, {}),
    (polar.square, {**_COMMON, "state": "*i32", **_SUMS}, {}),
    *(
        (
            polar.polynomial,
            {**_TABLES, "coefficients": "*fp32", **_PLANES, **_STATES, "last": "i32", **_SUMS},
            {"FIRST": first, **_LANES},
        )
        for first in (True, False)
    ),
    *((polar.apply, {**_COMMON, **_STATES, **_NORMS}, {"FIRST": first}) for first in (True, False)),
    (polar.polish, {**_COMMON, **_STATES, **_SUMS}, _LANES),
    (
        polar.last_gram,
        {"factors": "*fp32", **_TABLES, "places": "*i64", **_PLANES, "state": "*i32", **_SUMS},
        {"WIDTH": 4, "ALIGNED": True},
    ),
    (
        polar.finish,
        {
            **dict.fromkeys(("results", "factors", "spectra", "scalars"), "*fp32"),
            **_TABLES,
            "places": "*i64",
            "multipliers": "*fp64",
            **_PLANES,
            "state": "*i32",
            "units": "*fp32",
            **_NORMS,
            **_SUMS,
        },
        {"WIDTH": 4, "ALIGNED": True, **_LANES},
    ),
]


def _builds():
    for tiling, architectures in (
        (products.WITH_POINTERS, (80,)),
        (products.WITH_DESCRIPTORS, (90, 100)),
    ):
        for kernel, signature, constants in _PRODUCTS:
            yield Build(
                kernel,
                signature,
                {**constants, **tiling.constants},
                **tiling.options,
                wide_loads=True,
                narrow=1000,
                registers=200,
                architectures=architectures,
                name="-".join(f"{k}{v}" for k, v in constants.items()),
            )
    for weights in ("*fp32", "*fp16", "*bf16"):
        yield Build(
            polar.pack,
            {
                "weights": weights,
                **_TABLES,
                "places": "*i64",
                "maxima": "*i32",
                **_PLANES,
                "units": "*fp32",
                "squares": "*fp32",
                "n_matrices": "i32",
            },
            {"WIDTH": 1, "ALIGNED": True, "B": products.B, **_LANES},
            num_warps=planes.WARPS,
            registers=128,
            name=weights,
        )
    yield Build(
        polar.center,
        {**_COMMON, **_SUMS, **_NORMS},
        {"B": products.B, **_LANES},
        num_warps=planes.WARPS,
        registers=200,
    )


BUILDS = list(_builds())
