"""Products of matrices in two half-precision planes, against float64."""

import cases
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from lipkernels import backends
from lipkernels.kernels.triton import products
from lipkernels.kernels.triton.group import padded
from lipkernels.kernels.triton.planes import (
    exponent_of,
    load_planes,
    power_of_two,
    store_planes,
    store_symmetric,
    to_unit_magnitude,
)
from lipkernels.kernels.triton.products import add_a_b, add_a_bt

DEVICE = cases.device_of("triton")
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]
SCALE = 128.0
B = products.B
# What fp16 hi * hi + hi * lo + lo * hi leave out, and float32 sums, relative to the two norms.
PRODUCT = 3e-7


@triton.jit
def _multiply(
    hi, lo, out, a, b, m, n, depth, ld, TRANSPOSED: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0), tl.program_id(1)
    ld = (ld // 8) * 8
    acc = tl.zeros((B, B), tl.float32)
    if TRANSPOSED:
        acc = add_a_bt(acc, hi, lo, a, b, i, j, m, n, ld, B, BK, DESCRIPTORS)
    else:
        acc = add_a_b(acc, hi, lo, a, b, i, j, m, depth, ld, n, B, BK, DESCRIPTORS)
    row, col = i * B + tl.arange(0, B)[:, None], j * B + tl.arange(0, B)[None, :]
    tl.store(out + row * n + col, acc / (128.0 * 128.0), mask=(row < m) & (col < n))


@triton.jit
def _mirror(hi, lo, x, rows, ld, n, B: tl.constexpr):
    i, j = tl.program_id(0), tl.program_id(1)
    if i >= j:
        row, col = i * B + tl.arange(0, B)[:, None], j * B + tl.arange(0, B)[None, :]
        block = tl.load(x + row * n + col, mask=(row < rows) & (col < n), other=0.0)
        store_symmetric(hi, lo, 0, i, j, rows, ld, 128.0, block, B)


@triton.jit
def _copy(hi, lo, out, rows, ld, n, B: tl.constexpr):
    i, j = tl.program_id(0), tl.program_id(1)
    x = load_planes(hi, lo, 0, i, j, rows, ld, 128.0, B, B)
    store_planes(hi, lo, 0, i, j, rows, ld, 128.0, x, B, B)  # a second time: nothing is lost
    row, col = i * B + tl.arange(0, B)[:, None], j * B + tl.arange(0, B)[None, :]
    tl.store(out + row * n + col, x, mask=(row < rows) & (col < n))


@triton.jit
def _to_unit(x, out, units, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n, other=0.0)
    bits = tl.max(tl.abs(values).to(tl.int32, bitcast=True))
    values, unit = to_unit_magnitude(values, bits)
    tl.store(out + at, values, mask=at < n)
    tl.store(units, unit)


@triton.jit
def _powers(exponents, out, back, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    e = tl.load(exponents + at, mask=at < n, other=0)
    x = power_of_two(e)
    tl.store(out + at, x, mask=at < n)
    tl.store(back + at, exponent_of(x.to(tl.int32, bitcast=True)), mask=at < n)


def planes_of(x):
    """Both planes of a matrix, rows padded with zeros."""
    scaled = torch.zeros(x.shape[0], padded(x.shape[1]), device=DEVICE)
    scaled[:, : x.shape[1]] = x.to(DEVICE) * SCALE
    hi = scaled.half()
    return hi, (scaled - hi.float()).half()


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "n", "depth"), [(5, 8, 3), (70, 80, 130), (64, 64, 64), (1, 8, 9)])
def test_product(m, n, depth, transposed, descriptors):
    if DEVICE == "cuda" and descriptors and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor descriptors")
    products.tiling(torch.device(DEVICE))
    a, b = torch.randn(m, depth), torch.randn((n, depth) if transposed else (depth, n))
    parts = [planes_of(x) for x in (a, b)]
    hi, lo = (torch.cat([part[k].reshape(-1) for part in parts]) for k in range(2))
    out = torch.full((m, n), torch.nan, device=DEVICE)
    _multiply[(triton.cdiv(m, B), triton.cdiv(n, B))](
        hi, lo, out, 0, m * padded(depth), m, n, depth, padded(depth),
        TRANSPOSED=transposed, B=B, BK=32, DESCRIPTORS=descriptors,
    )  # fmt: skip
    exact = a.double() @ (b.mT if transposed else b).double()
    norms = torch.linalg.vector_norm(a, dim=1)[:, None]
    norms = norms * torch.linalg.vector_norm(b, dim=1 if transposed else 0)[None, :]
    assert ((out.cpu() - exact).abs() / norms).max() <= PRODUCT


def test_planes_keep_22_bits_and_symmetric_blocks_mirror_their_bits():
    n = 70
    x = torch.randn(n, n, dtype=torch.float64)
    x = (x + x.mT).float()
    hi, lo = (torch.full((n, padded(n)), torch.nan, device=DEVICE).half() for _ in range(2))
    grid = (triton.cdiv(n, B), triton.cdiv(n, B))
    _mirror[grid](hi, lo, x.to(DEVICE), n, padded(n), n, B=B)
    assert not hi[:, n:].any() and not lo[:, n:].any()
    out = torch.empty(n, n, device=DEVICE)
    _copy[grid](hi, lo, out, n, padded(n), n, B=B)
    assert torch.equal(out, out.mT)
    assert ((out.cpu() - x).abs() <= 2.0**-22 * x.abs() + 2.0**-32).all()


@pytest.mark.parametrize("magnitude", [1.0, 2.0**-149, 2.0**-130, 1e-38, 3e38, 0.0])
def test_unit_magnitude(magnitude):
    x = torch.tensor([0.25, -1.0, 0.5, 0.0]) * magnitude
    out, unit = torch.empty(4, device=DEVICE), torch.empty(1, device=DEVICE)
    _to_unit[(1,)](x.to(DEVICE), out, unit, 4, BLOCK=4)
    largest = x.abs().max().double()
    expected = 2.0 ** torch.floor(torch.log2(largest)) if magnitude else torch.tensor(1.0).double()
    assert unit.cpu().double() == expected
    torch.testing.assert_close(out.cpu().double(), x.double() / expected, rtol=0, atol=0)


def test_powers_of_two_and_their_exponents():
    exponents = torch.arange(-149, 128, dtype=torch.int32)
    out, back = torch.empty(277, device=DEVICE), torch.empty(277, device=DEVICE, dtype=torch.int32)
    _powers[(1,)](exponents.to(DEVICE), out, back, 277, BLOCK=512)
    assert torch.equal(out.cpu().double(), 2.0 ** exponents.double())
    assert torch.equal(back.cpu(), exponents)
