"""Of `lipkernels.kernels.triton.polar_start`: every kernel, with each architecture's tiling."""

from lipkernels.kernels.triton import planes, polar_start, products
from lipkernels.kernels.triton.workspace import LANES
from triton_builds import Build

TABLES = {"table": "*i64", "tiles": "*i32"}
PLANES = {"hi": "*fp16", "lo": "*fp16"}
SUMS = {"sums": "*fp32", "n_sums": "i32"}
COMMON = {**TABLES, **PLANES}
TILINGS = ((products.WITH_POINTERS, (80,)), (products.WITH_DESCRIPTORS, (90, 100)))


def on_every_architecture(kernel, signature, constants, **limits):
    """A kernel of products, with the tiling that each architecture has."""
    for tiling, architectures in TILINGS:
        yield Build(
            kernel,
            signature,
            {**constants, **tiling.constants},
            **tiling.options,
            **{"wide_loads": True, "narrow": 1000, "registers": 200, **limits},
            architectures=architectures,
            name="-".join(f"{k}{v}" for k, v in constants.items()),
        )


def _builds():
    squares = {"squares": "*fp32", "norms": "*fp32"}
    for fast in (False, True):
        yield from on_every_architecture(
            polar_start.first_gram,
            {**COMMON, **squares, **SUMS},
            {"FAST": fast, "LANES": LANES},
        )
        yield from on_every_architecture(
            polar_start.first_square, {**COMMON, **SUMS}, {"FAST": fast}
        )
    for weights in ("*fp32", "*fp16", "*bf16"):
        yield Build(
            polar_start.pack,
            {
                "weights": weights,
                **TABLES,
                "places": "*i64",
                "maxima": "*i32",
                **PLANES,
                "units": "*fp32",
                "squares": "*fp32",
                "n_matrices": "i32",
            },
            {"WIDTH": 1, "ALIGNED": True, "B": products.B, "LANES": LANES},
            num_warps=planes.WARPS,
            registers=128,
            name=weights,
        )
    yield Build(
        polar_start.center,
        {**COMMON, **SUMS, "norms": "*fp32", "n_matrices": "i32"},
        {"B": products.B, "LANES": LANES},
        num_warps=planes.WARPS,
        registers=200,
    )


BUILDS = list(_builds())
