"""Of `lipkernels.kernels.triton.norms`: every kernel as it is launched.

Products of float64 tiles: tensor cores on sm_80 and sm_90; sm_100 has them in other instructions
alone, and multiplies without.
"""

from lipkernels.kernels.triton import norms as kernels
from lipkernels.kernels.triton.group import ALIGNMENT
from triton_builds import Build

_SIZES = {"UNIT": ALIGNMENT, "WIDTH": kernels.COLUMNS_OF_TABLE, "SIDE": kernels.SIDE}
_SQUARE = {**_SIZES, "LANES": kernels.LANES, "HISTORY": kernels.HISTORY}
_TABLES = {"table": "*i64", "tiles": "*i32", "skip": "*i32"}
_DEPTH = kernels.DEPTH
_TOPS = {
    **dict.fromkeys(("even", "odd", "even_squares", "odd_squares", "sigmas", "vectors"), "*fp64"),
    "history": "*fp64",
    "done": "*i32",
    **_TABLES,
    "allowances": "*fp64",
    "squarings": "i32",
}

BUILDS = [
    Build(
        kernels.gram_parts,
        {"x": "*fp32", "parts": "*fp64", **_TABLES},
        {**_SIZES, "DEPTH": kernels.PARTS["DEPTH"]},
        num_warps=kernels.PARTS["num_warps"],
        registers=168,
        wide_loads=True,
        narrow=24,
    ),
    Build(
        kernels.small_tops,
        {
            "parts": "*fp64",
            "sigmas": "*fp64",
            "vectors": "*fp64",
            **_TABLES,
            "allowances": "*fp64",
            "squarings": "i32",
        },
        {**_SIZES, "RANK_ONE": kernels.RANK_ONE},
        num_warps=kernels.WARPS,
        registers=168,
        wide_loads=True,
        narrow=24,
    ),
    Build(
        kernels.gram_sums,
        {"parts": "*fp64", "powers": "*fp64", "squares": "*fp64", **_TABLES},
        _SIZES,
        num_warps=kernels.WARPS,
        registers=128,
        wide_loads=True,
        narrow=24,
    ),
    Build(
        kernels.square,
        {
            **dict.fromkeys(("powers", "results", "squares", "new_squares", "history"), "*fp64"),
            "done": "*i32",
            **_TABLES,
            "k": "i32",
        },
        {**_SQUARE, "DEPTH": _DEPTH, "RANK_ONE": kernels.RANK_ONE},
        num_warps=kernels.WARPS,
        registers=168,
        wide_loads=True,
        narrow=32,
    ),
    Build(kernels.tops, _TOPS, _SQUARE, num_warps=kernels.WARPS, registers=96),
]
