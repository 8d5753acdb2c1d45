"""The rounding inside Triton's kernels is torch's, bit by bit."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl

from lipkernels import backends
from lipkernels.kernels.triton.rounding import rounded

DEVICE = "cpu" if backends.is_interpreted() else "cuda"
pytestmark = [] if backends.is_interpreted() else [pytest.mark.gpu]
NAMES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def round_all(x, y, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, rounded(tl.load(x + i, mask=i < n), DTYPE), mask=i < n)


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_rounded(dtype):
    special = [0.0, -0.0, 1e-45, -1e-40, 3e38, 3.4e38, 65519.9, 65520.0, 6e-8, 2.9e-8, 1e-39]
    ties = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-11, 1 + 3 * 2**-11]
    x = torch.cat(
        (
            torch.tensor([*special, *ties, torch.inf, -torch.inf, torch.nan]),
            torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32),
            torch.randn(4000, generator=torch.Generator().manual_seed(0)),
        )
    ).to(DEVICE)
    y = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    round_all[(1,)](x, y, x.numel(), DTYPE=NAMES[dtype], BLOCK=4096)
    expected = x.to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    good = ~y.isnan()
    assert torch.equal(y[good].view(integer), expected[good].view(integer))
    assert y.isnan().sum() == 4
