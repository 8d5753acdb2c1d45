"""Pairs side by side and in channels, in both directions; small groups; whole rows."""

from __future__ import annotations

from lipkernels.kernels.triton import sorting
from triton_builds import Build

ITEMSIZE = {"*fp16": 2, "*bf16": 2, "*fp32": 4, "*fp64": 8, "*u8": 1}


def built(kernel, settings, signature, **others):
    settings = dict(settings)
    num_warps = settings.pop("num_warps")
    return Build(kernel, signature, settings, num_warps=num_warps, **others)


def pairs(kind, inner, sort, n=2**20):
    return built(
        sorting.sort_pairs,
        {**sorting.pair_settings(n, inner, ITEMSIZE[kind]), "SORT": sort},
        {"x": kind, "y": kind, "swaps": "*u8", "n": "i32", "inner": "i32"},
        registers=96,
        shared=1024,
        wide_loads=True,
        narrow=4,  # of the bits, a byte to each thread
        name=f"{kind[1:]}-{n}-inner{inner}-{'sort' if sort else 'exchange'}",
    )


def elements(kernel, kind, narrow, **others):
    n, inner = 2**20, 1024
    return built(
        kernel,
        {**sorting.element_settings(n, inner, ITEMSIZE[kind]), **others},
        {
            **{"x": kind, "y": kind, "index": "*u8"},
            **{"n": "i32", "inner": "i32", "size": "i32"},
        },
        registers=168,
        shared=16 * 1024,
        wide_loads=True,
        narrow=narrow,  # what is moved to or from its place
        name="-".join([kind[1:], *(f"{k}{v}" for k, v in others.items())]),
    )


def columns(kind, size):
    return built(
        sorting.sort_groups,
        sorting.column_settings(2**12, size),
        {
            **{"x": kind, "y": kind, "index": "*u8" if size <= 256 else "*i16"},
            **{"n": "i32", "inner": "i32", "size": "i32"},
        },
        registers=80,
        shared=16 * 1024,
        name=f"{kind[1:]}-{size}",
    )


BUILDS = [
    *(pairs(kind, 1, sort) for kind in ("*fp16", "*fp32") for sort in (True, False)),
    *(pairs(kind, 784, sort) for kind in ("*bf16", "*fp32") for sort in (True, False)),
    pairs("*fp64", 64, True),
    pairs("*fp16", 64, True, n=2**30),  # 64-bit offsets
    pairs("*u8", 64, True),
    *(elements(sorting.rank_groups, kind, 32) for kind in ("*fp16", "*fp32")),
    *(
        elements(sorting.move_in_groups, kind, 18, GATHER=gather)
        for kind in ("*fp16", "*fp32")
        for gather in (True, False)
    ),
    *(columns("*fp32", size) for size in (64, 256, 1024)),
]
