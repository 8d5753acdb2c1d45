"""Permuted copies of the layouts and orders that networks use."""

from __future__ import annotations

import torch

from lipkernels.kernels.blocks import Dim, to_depth, to_space
from lipkernels.kernels.triton import sampling
from triton_builds import Build

FORMATS = {
    torch.uint8: "*u8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
MOVED = {1: "*u8", 2: "*i16", 4: "*i32", 8: "*i64"}
CHANNELS_LAST = {"memory_format": torch.channels_last}


def build(name, down, shape, dtype, mode="CRD", last=False, scaled=False, block=2, **layout):
    """``shape`` of the wide image; the input is in ``layout``, the output contiguous."""
    wide = torch.empty(shape, dtype=dtype, device="meta")
    move = torch.pixel_unshuffle(wide.movedim(-1, 1) if last else wide, block)
    deep = torch.empty_like(move.movedim(1, -1) if last else move).contiguous()
    if layout:
        wide, deep = (wide.to(**layout), deep) if down else (wide, deep.to(**layout))
    sides = (wide, deep) if down else (deep, wide)
    dims = (to_depth if down else to_space)(*sides, block, block, mode, last)
    kind = str(dtype).removeprefix("torch.")
    return of_dims(dims, dtype, scaled, f"{'down' if down else 'up'}-{name}-{mode}-{kind}")


def of_dims(dims, dtype, scaled, name):
    constants = dict(sampling.launch(dims, dtype.itemsize)[2])
    num_warps = constants.pop("num_warps")
    kind = FORMATS[dtype] if scaled else MOVED[dtype.itemsize]
    return Build(
        sampling.permuted_copy,
        {"x": kind, "y": kind, "scale": "fp32", **dict.fromkeys(sampling.ARGUMENTS, "i32")},
        {**constants, "SCALED": scaled},
        num_warps=num_warps,
        registers=64,
        shared=16 * 1024,
        wide_loads=True,
        name=name,
    )


def copy_of_channels_last(shape, dtype):
    x = torch.empty(shape, dtype=dtype, device="meta").to(**CHANNELS_LAST)
    dims = tuple(map(Dim, shape, x.stride(), x.contiguous().stride()))
    return of_dims(dims, dtype, False, f"copy-channels_last-{dtype}")


IMAGES, SMALL = (16, 64, 64, 64), (16, 128, 16, 16)
BUILDS = [
    *(
        build(name, down, IMAGES, torch.float16, mode, last, scaled=True)
        for down in (True, False)
        for mode in ("CRD", "DCR")
        for name, last in (("images", False), ("last", True))
    ),
    *(build("images", down, IMAGES, torch.float32) for down in (True, False)),
    *(build("small", down, SMALL, torch.bfloat16, scaled=True) for down in (True, False)),
    *(build("bytes", down, IMAGES, torch.uint8) for down in (True, False)),
    build("double", True, IMAGES, torch.float64, scaled=True),
    build("block4", False, IMAGES, torch.float16, block=4),
    build("memory", True, IMAGES, torch.float16, **CHANNELS_LAST),
    build("memory", True, IMAGES, torch.float32, "DCR", **CHANNELS_LAST),
    build("memory", False, IMAGES, torch.float16, "DCR", **CHANNELS_LAST),
    copy_of_channels_last(IMAGES, torch.float16),
    build("far", True, (2**17, 64, 16, 16), torch.float16, scaled=True),  # 64-bit offsets
]
