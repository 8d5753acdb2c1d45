"""Of `lipkernels.kernels.triton.half`: both formats, with each architecture's tiling."""

from lipkernels.kernels.triton import half as kernels
from lipkernels.kernels.triton import planes, products
from lipkernels.kernels.triton.workspace import LANES
from triton_builds import Build

_TABLES = {"table": "*i64", "tiles": "*i32"}
_PLANES = {"hi": "*fp16", "lo": "*fp16"}
_BLOCKS = {"squares": "*fp32", "n_blocks": "i32"}
_SUMS = {"sums": "*fp32", "n_sums": "i32"}


def _builds():
    for tiling, architectures in (
        (products.WITH_POINTERS, (80,)),
        (products.WITH_DESCRIPTORS, (90, 100)),
    ):
        yield Build(
            kernels.fourth_powers,
            {**_TABLES, **_PLANES, **_SUMS},
            tiling.constants,
            **tiling.options,
            wide_loads=True,
            narrow=40,
            registers=160,
            architectures=architectures,
        )
    for results in ("*fp16", "*bf16"):
        common = {"matrices": "*fp32", "results": results, **_TABLES, "places": "*i64"}
        common["numbers"] = "*fp64"
        yield Build(
            kernels.attempt,
            {**common, **_PLANES, **_BLOCKS},
            {"ALIGNED": True, "B": products.B},
            num_warps=planes.WARPS,
            registers=128,
            name=results,
        )
        yield Build(
            kernels.choose,
            {**common, **_BLOCKS, **_SUMS},
            {"ALIGNED": True, "B": products.B, "LANES": LANES},
            num_warps=planes.WARPS,
            registers=128,
            name=results,
        )


BUILDS = list(_builds())
