"""Pools whose windows fill the image, both ways: of norms and of means."""

from __future__ import annotations

import torch

from lipkernels.kernels.triton import pooling
from triton_builds import Build

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
POINTERS[torch.float64] = "*fp64"
IMAGES = (16, 64, 64, 64)
WIDE = {"registers": 96, "shared": 16 * 1024, "wide_loads": True}
NARROW = {"registers": 128, "shared": 8 * 1024}


def _build(norm, backward, dtype, shape, kernel, stride, padding, last, limits):
    arguments = ([kernel] * 2, [stride] * 2, [padding] * 2, False, last, dtype.itemsize)
    _, how = pooling.plan(shape, *arguments)
    constants = {**how.constants, "NORM": norm}
    num_warps = constants.pop("num_warps")
    function = (pooling.SPREAD if backward else pooling.GATHER)[how.kind]
    names = function.arg_names
    signature = {name: "i32" for name in names if name not in constants}
    signature |= {n: POINTERS[dtype] for n in ("x", "y", "grad", "out") if n in names}
    signature["number"] = "fp32"
    kind = str(dtype).removeprefix("torch.")
    name = f"{'norm' if norm else 'mean'}-{kind}-{kernel}-{stride}-{padding}"
    name += "-last" if last else ""
    return Build(function, signature, constants, num_warps=num_warps, name=name, **limits)


def builds(dtype, shape, kernel, stride=None, padding=0, last=False, **limits):
    """The kernels of a geometry: each pool, each way."""
    window = (kernel, stride or kernel, padding, last)
    return [
        _build(norm, backward, dtype, shape, *window, limits)
        for norm in (True, False)
        for backward in (False, True)
    ]


BUILDS = [
    *builds(torch.float16, IMAGES, 2, **WIDE),
    *builds(torch.float32, IMAGES, 2, **WIDE),
    *builds(torch.bfloat16, IMAGES, 4, **WIDE),
    *builds(torch.float64, IMAGES, 2, **WIDE),
]
