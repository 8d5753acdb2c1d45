"""Each shape of a pool, both ways."""

from __future__ import annotations

import torch

from lipkernels.kernels.triton import pooling
from triton_builds import Build

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
POINTERS[torch.float64] = "*fp64"


def build(backward, dtype, shape, kernel, stride=None, padding=0, ceil=False, last=False, **limits):
    arguments = ([kernel] * 2, [stride or kernel] * 2, [padding] * 2, ceil, last, dtype.itemsize)
    _, how = pooling.plan(shape, *arguments)
    constants = dict(how.constants)
    num_warps = constants.pop("num_warps")
    function = (pooling.SPREAD if backward else pooling.NORM)[how.kind]
    names = function.arg_names
    signature = {name: "i32" for name in names if name not in constants}
    signature |= {n: POINTERS[dtype] for n in ("x", "y", "grad", "out") if n in names}
    if backward:
        signature["eps"] = "fp32"
    kind = str(dtype).removeprefix("torch.")
    name = f"{kind}-{kernel}-{stride or kernel}-{padding}" + ("-last" if last else "")
    return Build(function, signature, constants, num_warps=num_warps, name=name, **limits)


IMAGES = (16, 64, 64, 64)
LAST = (16, 64, 64, 64)  # (N, C, H, W) with the channels last in memory
WIDE = {"registers": 96, "shared": 16 * 1024, "wide_loads": True}
NARROW = {"registers": 128, "shared": 8 * 1024}
BUILDS = [
    build(backward, *case, **limits)
    for backward in (False, True)
    for case, limits in (
        ((torch.float16, IMAGES, 2), WIDE),
        ((torch.float32, IMAGES, 2), WIDE),
        ((torch.bfloat16, IMAGES, 4), WIDE),
        ((torch.float64, IMAGES, 2), WIDE),
        ((torch.float16, (64, 512, 32, 32), 32), {**WIDE, "narrow": 8}),  # a number for each row
        ((torch.float32, (64, 512, 7, 7), 7), NARROW),
        ((torch.float16, LAST, 2, 2, 0, False, True), WIDE),
        ((torch.float32, LAST, 3, 2, 1, False, True), WIDE),
        ((torch.float32, IMAGES, 3, 2, 1), NARROW),
    )
]
