"""Products of matrices in planes: one block of A B^T, or of A B, accumulated in float32.

Note [Where sums are rounded]
A matrix unit adds what it multiplies to its accumulator with truncation, always towards zero: over
a long sum of squares (the diagonal of a Gram matrix) that adds up to a bias of many units, and the
residual I - U U^T would miss it. So each step of the loop has an accumulator of its own, the three
products of the planes in it from small to large, and is added to the sum by an ordinary, rounded
addition.

Note [Planes]
PLANES = 3 takes all of both factors; 2 the upper plane of A, 11 bits, and all of B; 1 the upper
planes alone. The lower planes that are left out are not read either.

Note [Tiles]
Blocks of 64 x 64, with tensor descriptors (the tensor memory accelerator fills shared memory) where
the architecture has them, with pointers elsewhere. Networks' weights are too small to fill a
device with larger ones: a Gram matrix of 256 rows has ten blocks of 64 on or below its diagonal,
three of 128. A weight alone has the same blocks as in a list, so that its result has the same bits.
"""

# Inside a kernel integers are tensors, and lists of them descriptors' shapes.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

B = 64  # rows and columns of a block


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is computed: constants and options of its kernels."""

    depth: int  # of one step of the loop
    descriptors: bool
    num_warps: int = 4
    num_stages: int = 3

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"B": B, "BK": self.depth, "DESCRIPTORS": self.descriptors}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


WITH_POINTERS = Tiling(depth=32, descriptors=False)
WITH_DESCRIPTORS = Tiling(depth=64, descriptors=True)


def tiling(device: torch.device) -> Tiling:
    """The one that ``device`` takes."""
    if device.type != "cuda":
        return Tiling(depth=64, descriptors=False)  # Triton's interpreter: fewer steps
    if torch.cuda.get_device_capability(device) < (9, 0):
        return WITH_POINTERS
    # Descriptors are made on the device, in memory that Triton asks for at each launch.
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
    )
    return WITH_DESCRIPTORS


@triton.jit
def _part(ah, al, bh, bl, depth, PLANES: tl.constexpr):
    if PLANES == 3:
        part = tl.dot(al, bh)
        part = tl.dot(ah, bl, part)
        part = tl.dot(ah, bh, part)
    elif PLANES == 2:
        part = tl.dot(ah, bl)
        part = tl.dot(ah, bh, part)
    else:
        # A factor that the compiler cannot know: it would make a product alone add to the sum
        # itself (see Note [Where sums are rounded]), and cannot compile a reduction of that.
        part = tl.dot(ah, bh) * tl.where(depth > 0, 1.0, 0.0)
    return part


@triton.jit
def add_a_bt(
    acc, hi, lo, a, b, i, j, rows_a, rows_b, depth,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, PLANES: tl.constexpr = 3,
):  # fmt: skip
    """``acc`` + block (i, j) of A B^T, both with ``depth`` columns (a multiple of 8)."""
    if DESCRIPTORS:
        a_hi = tl.make_tensor_descriptor(hi + a, [rows_a, depth], [depth, 1], [B, BK])
        b_hi = tl.make_tensor_descriptor(hi + b, [rows_b, depth], [depth, 1], [B, BK])
        a_lo, b_lo = a_hi, b_hi
        if PLANES == 3:
            a_lo = tl.make_tensor_descriptor(lo + a, [rows_a, depth], [depth, 1], [B, BK])
        if PLANES >= 2:
            b_lo = tl.make_tensor_descriptor(lo + b, [rows_b, depth], [depth, 1], [B, BK])
        for k in range(0, depth, BK):
            ah, bh = a_hi.load([i * B, k]), b_hi.load([j * B, k])
            al = a_lo.load([i * B, k]) if PLANES == 3 else ah
            bl = b_lo.load([j * B, k]) if PLANES >= 2 else bh
            acc += _part(ah, al, bh.T, bl.T, depth, PLANES)
    else:
        ra = i * B + tl.arange(0, B)[:, None]
        rb = j * B + tl.arange(0, B)[:, None]
        c = tl.arange(0, BK)[None, :]
        at_a, at_b = a + ra * depth + c, b + rb * depth + c
        for k in range(0, depth, BK):
            in_a, in_b = (ra < rows_a) & (k + c < depth), (rb < rows_b) & (k + c < depth)
            ah = tl.load(hi + at_a + k, mask=in_a, other=0.0)
            al = tl.load(lo + at_a + k, mask=in_a, other=0.0) if PLANES == 3 else ah
            bh = tl.load(hi + at_b + k, mask=in_b, other=0.0)
            bl = tl.load(lo + at_b + k, mask=in_b, other=0.0) if PLANES >= 2 else bh
            acc += _part(ah, al, bh.T, bl.T, depth, PLANES)
    return acc


@triton.jit
def add_a_b(
    acc, hi, lo, a, b, i, j, rows, depth, ld_a, cols,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, PLANES: tl.constexpr = 3,
):  # fmt: skip
    """``acc`` + block (i, j) of A B: A (rows, depth), its rows ``ld_a`` apart, B (depth, cols).

    ``ld_a`` and ``cols`` are multiples of 8.
    """
    if DESCRIPTORS:
        a_hi = tl.make_tensor_descriptor(hi + a, [rows, ld_a], [ld_a, 1], [B, BK])
        b_hi = tl.make_tensor_descriptor(hi + b, [depth, cols], [cols, 1], [BK, B])
        a_lo, b_lo = a_hi, b_hi
        if PLANES == 3:
            a_lo = tl.make_tensor_descriptor(lo + a, [rows, ld_a], [ld_a, 1], [B, BK])
        if PLANES >= 2:
            b_lo = tl.make_tensor_descriptor(lo + b, [depth, cols], [cols, 1], [BK, B])
        for k in range(0, depth, BK):
            ah, bh = a_hi.load([i * B, k]), b_hi.load([k, j * B])
            al = a_lo.load([i * B, k]) if PLANES == 3 else ah
            bl = b_lo.load([k, j * B]) if PLANES >= 2 else bh
            acc += _part(ah, al, bh, bl, depth, PLANES)
    else:
        ra = i * B + tl.arange(0, B)[:, None]
        ca = tl.arange(0, BK)[None, :]
        rb = tl.arange(0, BK)[:, None]
        cb = j * B + tl.arange(0, B)[None, :]
        at_a, at_b = a + ra * ld_a + ca, b + rb * cols + cb
        for k in range(0, depth, BK):
            in_a, in_b = (ra < rows) & (k + ca < ld_a), (k + rb < depth) & (cb < cols)
            ah = tl.load(hi + at_a + k, mask=in_a, other=0.0)
            al = tl.load(lo + at_a + k, mask=in_a, other=0.0) if PLANES == 3 else ah
            bh = tl.load(hi + at_b + k * cols, mask=in_b, other=0.0)
            bl = tl.load(lo + at_b + k * cols, mask=in_b, other=0.0) if PLANES >= 2 else bh
            acc += _part(ah, al, bh, bl, depth, PLANES)
    return acc


@triton.jit
def identity(i, j, rows, B: tl.constexpr):
    """Block (i, j) of the identity matrix with ``rows`` rows, zeros around it."""
    row = i * B + tl.arange(0, B)[:, None]
    col = j * B + tl.arange(0, B)[None, :]
    return tl.where((row == col) & (row < rows), 1.0, 0.0)


@triton.jit
def sum_of_symmetric(x, i, j):
    """What the entries ``x`` of block (i, j), i >= j, add to a sum over a symmetric matrix."""
    return tl.sum(tl.sum(x, 1), 0) * tl.where(i == j, 1.0, 2.0)
