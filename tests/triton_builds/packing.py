"""Of `lipkernels.kernels.triton.packing`: each way to read, float32 and bfloat16."""

from lipkernels.kernels.triton import packing as kernels
from lipkernels.kernels.triton.group import ALIGNMENT
from triton_builds import Build

BUILDS = [
    Build(
        kernels.pack,
        {
            "weights": f"*{kind}",
            "packed": "*fp32",
            "table": "*i64",
            "tiles": "*i32",
            "places": "*i64",
        },
        {
            "ALIGNED": aligned,
            "EIGHTS": eights,
            "UNIT": ALIGNMENT,
            "WIDTH": kernels.WIDTH,
            **kernels.TILE,
        },
        num_warps=kernels.WARPS[eights],
        registers=96,
        wide_loads=True,  # all that is written, and with eights all that is read
        narrow=16 if eights else 48,
        name=f"{kind}-{'eights' if eights else 'aligned' if aligned else 'any'}",
    )
    for kind in ("fp32", "bf16")
    for aligned, eights in ((True, True), (True, False), (False, False))
]
