"""Of `lipkernels.kernels.triton.spectral`: every kernel as it is launched."""

import triton.language as tl

from lipkernels.kernels.triton import norms, packing
from lipkernels.kernels.triton import spectral as kernels
from lipkernels.kernels.triton.frobenius import WHOLE
from lipkernels.kernels.triton.group import ALIGNMENT
from triton_builds import Build

_WARPS = {"num_warps": kernels.WARPS}
_TRIPLETS = {
    "x": "*fp32",
    **dict.fromkeys(("sigmas", "vectors", "sigma_parts", "lefts", "rights"), "*fp64"),
    "table": "*i64",
    "tiles": "*i32",
    "places": "*i64",
    "transposed": "*i32",
}
_SIZES = {"UNIT": ALIGNMENT, "WIDTH": norms.COLUMNS_OF_TABLE, "SIDE": norms.SIDE}
_DECIDE = {
    **dict.fromkeys(("factors", "bounds", "scales", "worst"), "*fp64"),
    "skip": "*i32",
    "n": "i32",
    "smaller": "fp32",
}


def _apply(weight, result, aligned):
    return Build(
        kernels.apply,
        {
            "weights": f"*{weight}",
            "results": f"*{result}",
            "table": "*i64",
            "tiles": "*i32",
            "places": "*i64",
            "factors": "*fp64",
            "sigmas": "*fp64",
        },
        {"ALIGNED": aligned, "BLOCK": WHOLE["BLOCK"]},
        registers=96,
        wide_loads=aligned,
        narrow=48,  # the last block is masked, element by element
        name=f"{weight}-{result}-{'aligned' if aligned else 'any'}",
        **_WARPS,
    )


def _differentiate(weight, result):
    return Build(
        kernels.differentiate,
        {
            "grads": f"*{result}",
            "results": f"*{weight}",
            **dict.fromkeys(("sigmas", "lefts", "rights"), "*fp64"),
            "blocks": "*i64",
            "tiles": "*i32",
            "sides": "*i64",
            "places": "*i64",
            "scales": "*fp64",
            "products": "*fp64",
            "limit": "fp32",
        },
        {"ALIGNED": True, **WHOLE, **kernels.BY_TILES},
        registers=128,
        name=f"{weight}-{result}",
        **_WARPS,
    )


BUILDS = [
    Build(
        kernels.write_triplets,
        _TRIPLETS,
        {**_SIZES, "ALIGNED": True, "COLUMNS": kernels.COLUMNS},
        registers=128,
        wide_loads=True,
        narrow=64,  # the vectors, whose ends are anywhere
        **_WARPS,
    ),
    *(_apply("fp32", result, aligned) for result in ("fp32", "bf16") for aligned in (True, False)),
    *(
        Build(
            kernels.round_packed,
            {
                "x": "*fp32",
                "rounded": "*fp32",
                "tiles": "*i32",
                "factors": "*fp64",
                "sigmas": "*fp64",
                "skip": "*i32",
            },
            {"BLOCK": packing.TILE["ROWS"] * packing.TILE["COLUMNS"], "DTYPE": dtype},
            registers=96,
            wide_loads=True,
            narrow=8,
            name=str(dtype),
            **_WARPS,
        )
        for dtype in (tl.bfloat16, tl.float16)
    ),
    *(
        Build(
            kernels.decide,
            _DECIDE,
            {"LAST": last, "LANES": kernels.DECISIONS},
            registers=64,
            name="last" if last else "others",
            **_WARPS,
        )
        for last in (False, True)
    ),
    *(_differentiate("fp32", result) for result in ("fp32", "bf16")),
]
