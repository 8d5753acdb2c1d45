"""Of `lipkernels.kernels.triton.power`: every kernel as it is launched."""

from lipkernels.kernels.triton import packing
from lipkernels.kernels.triton import power as kernels
from lipkernels.kernels.triton.group import ALIGNMENT
from triton_builds import Build

_SIZES = {"UNIT": ALIGNMENT, "WIDTH": kernels.COLUMNS_OF_TABLE}
_BLOCK = {**_SIZES, "BLOCK": kernels.BLOCK}
_PASS = {"w": "*fp32", "u": "*fp64", "v": "*fp64", "table": "*i64", "tiles": "*i32"}
_FINISH = {
    "u": "*fp64",
    "v": "*fp64",
    "sigmas": "*fp32",
    "lefts": "*fp32",
    "rights": "*fp32",
    "table": "*i64",
    "places": "*i64",
    "limit": "fp32",
}
# Besides the matrix: the table, the tile and the vectors.
_WIDE = {"num_warps": kernels.WARPS, "registers": 168, "wide_loads": True, "narrow": 24}

BUILDS = [
    *(
        Build(
            kernels.start,
            {"table": "*i64", "starts": f"*{kind}", "u": "*fp64"},
            _BLOCK,
            num_warps=kernels.WARPS,
            registers=64,
            name=kind,
        )
        for kind in ("fp32", "bf16", "fp64")
    ),
    Build(kernels.down, _PASS, {**_SIZES, **kernels.DOWN}, **_WIDE),
    Build(kernels.across, _PASS, {**_SIZES, **kernels.ACROSS}, **_WIDE),
    Build(kernels.rounds, {**_PASS, "n_iter": "i32"}, {**_SIZES, **packing.TILE}, **_WIDE),
    Build(
        kernels.finish,
        _FINISH,
        {**_BLOCK, "ALIGNED": True, "ROUNDS": True},
        num_warps=kernels.WARPS,
        registers=64,
    ),
]
