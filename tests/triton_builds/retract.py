"""Of `lipkernels.kernels.triton.retract`: the projection, with each architecture's tiling."""

from lipkernels.kernels.triton import planes, products
from lipkernels.kernels.triton import retract as kernels
from lipkernels.kernels.triton.workspace import LANES
from triton_builds import Build

_TABLES = {"table": "*i64", "tiles": "*i32"}
_PLANES = {"hi": "*fp16", "lo": "*fp16"}


def _builds():
    for tiling, architectures in (
        (products.WITH_POINTERS, (80,)),
        (products.WITH_DESCRIPTORS, (90, 100)),
    ):
        products_of = {
            **tiling.options,
            "wide_loads": True,
            "narrow": 200,
            "registers": 200,
            "architectures": architectures,
        }
        yield Build(kernels.across, {**_TABLES, **_PLANES}, tiling.constants, **products_of)
        for kind in ("*fp32", "*bf16"):
            yield Build(
                kernels.subtract,
                {
                    "grads": kind,
                    "out": kind,
                    **_TABLES,
                    "places": "*i64",
                    **_PLANES,
                    "units": "*fp32",
                    "limit": "fp32",
                },
                {"ALIGNED": True, **tiling.constants},
                **products_of,
                name=f"{kind}{tiling.depth}",
            )
    for kind in ("*fp32", "*bf16"):
        yield Build(
            kernels.pack,
            {
                "grads": kind,
                "weights": kind,
                **_TABLES,
                "places": "*i64",
                "scales": "*fp64",
                "maxima": "*i32",
                **_PLANES,
                "units": "*fp32",
            },
            {"ALIGNED": True, "B": products.B, "LANES": LANES},
            num_warps=planes.WARPS,
            registers=128,
            name=kind,
        )


BUILDS = list(_builds())
