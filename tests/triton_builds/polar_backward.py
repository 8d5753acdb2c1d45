"""Of `lipkernels.kernels.triton.polar_backward`: every kernel, with each architecture's tiling."""

from lipkernels.kernels.triton import planes, products
from lipkernels.kernels.triton import polar_backward as kernels
from lipkernels.kernels.triton.workspace import LANES
from triton_builds import Build

_TABLES = {"table": "*i64", "tiles": "*i32"}
_PLANES = {"hi": "*fp16", "lo": "*fp16"}
_COMMON = {**_TABLES, **_PLANES}
_SAVED = ("results", "factors", "spectra", "scalars")
_LANES = {"LANES": LANES}

# kernel, signature, constants besides those of the tiling
_PRODUCTS = [
    (kernels.gradient_along, {**_COMMON, "squares": "*fp32"}, _LANES),
    (
        kernels.start,
        {"spectra": "*fp32", **_TABLES, "places": "*i64", **_PLANES},
        {"WIDTH": 1, "ALIGNED": True},
    ),
    (kernels.invert, {**_COMMON, "step": "i32"}, {}),
    (kernels.first_half, {**_COMMON, "n_slot": "i32"}, {}),
    (kernels.second_half, {**_COMMON, "n_slot": "i32"}, {}),
    *(
        (kernel, {**_COMMON, "step": "i32"}, {"PLANES": planes})
        for planes in (3, 1)
        for kernel in (kernels.smith_products, kernels.smith_sum)
    ),
    (kernels.subtract, {**_COMMON, "v_slot": "i32"}, {}),
    *(
        (
            kernels.finish,
            {
                "out": out,
                "spectra": "*fp32",
                "scalars": "*fp32",
                **_TABLES,
                "places": "*i64",
                "scales": "*fp64",
                **_PLANES,
                "units": "*fp32",
                "squares": "*fp32",
                "v_slot": "i32",
                "limit": "fp32",
                "n_matrices": "i32",
            },
            {"WIDTH": 3, "ALIGNED": True, **_LANES},
        )
        for out in ("*fp32", "*bf16")
    ),
]


def _builds():
    for tiling, architectures in (
        (products.WITH_POINTERS, (80,)),
        (products.WITH_DESCRIPTORS, (90, 100)),
    ):
        for kernel, signature, constants in _PRODUCTS:
            finish = {"num_stages": kernels.FINISH_STAGES} if kernel is kernels.finish else {}
            yield Build(
                kernel,
                signature,
                {**constants, **tiling.constants},
                **tiling.options | finish,
                wide_loads=True,
                narrow=200,
                registers=255,
                architectures=architectures,
                name=f"{signature.get('out', '')}{tiling.depth}-{constants.get('PLANES', 3)}",
            )
    yield Build(
        kernels.pack,
        {
            "grads": "*fp32",
            **dict.fromkeys(_SAVED, "*fp32"),
            **_TABLES,
            "places": "*i64",
            "maxima": "*i32",
            **_PLANES,
            "units": "*fp32",
            "squares": "*fp32",
            "n_matrices": "i32",
        },
        {"WIDTH": 5, "ALIGNED": True, "B": products.B, **_LANES},
        num_warps=planes.WARPS,
        registers=128,
    )


BUILDS = list(_builds())
