"""Of `lipkernels.kernels.triton.planes`: weights of every format."""

from lipkernels.kernels.triton import planes
from triton_builds import Build

_POINTERS = {"tiles": "*i32", "places": "*i64", "numbers": "*i64", "maxima": "*i32"}

BUILDS = [
    Build(
        planes.magnitudes,
        {"weights": weights, **_POINTERS},
        {"WIDTH": 1, "ALIGNED": aligned, "BLOCK": planes.BLOCK},
        num_warps=planes.WARPS,
        registers=80,
        name=f"{weights}-{aligned}",
    )
    for weights in ("*fp32", "*fp16", "*bf16")
    for aligned in (True, False)
]
