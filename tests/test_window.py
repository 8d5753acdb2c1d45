"""How often a window reads an element: certify.window against counting by brute force."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from operator_norm import padded_sources, taps

from lipkernels.certify import max_reads, operator_factor
from lipkernels.functional import symmetric_pad

MODES = ("zeros", "reflect", "replicate", "circular", "symmetric")
LARGEST = 40  # sizes, for the supremum


def allowed(size, left, right, mode):
    """Whether torch (or numpy) pads an image of that size that far."""
    widest = max(left, right)
    if mode == "reflect":
        return widest < size
    return mode in ("zeros", "replicate") or widest <= size


def counted(kernel, stride, left, right, dilation, mode, size):
    """max_i n_i, counted: the gradient of a convolution's sum with a kernel of ones."""
    x = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    sources = torch.from_numpy(padded_sources(size, left, right, mode))
    padded = torch.where(sources >= 0, x[sources.clamp_min(0)], 0.0)
    if len(sources) < dilation * (kernel - 1) + 1:
        return 0
    ones = torch.ones(1, 1, kernel, dtype=torch.float64)
    y = torch.nn.functional.conv1d(padded[None, None], ones, stride=stride, dilation=dilation)
    (reads,) = torch.autograd.grad(y.sum(), x)
    return int(reads.max())


@pytest.mark.parametrize("mode", MODES)
def test_torch_pads_as_the_oracle_does(mode):

    def pad(x, widths):
        if mode == "symmetric":
            return symmetric_pad(x, widths)
        return torch.nn.functional.pad(x, widths, "constant" if mode == "zeros" else mode)

    for size, left, right in itertools.product(range(1, 7), range(5), range(5)):
        if allowed(size, left, right, mode):
            x = torch.arange(1.0, size + 1)[None, None]
            sources = torch.from_numpy(padded_sources(size, left, right, mode))
            expected = torch.where(sources >= 0, sources + 1, 0).to(x.dtype)
            assert torch.equal(pad(x, (left, right))[0, 0], expected)


@pytest.mark.parametrize("mode", MODES)
def test_reads_at_a_size(mode):
    """Every geometry of a few thousand, uneven padding included."""
    generator = torch.Generator().manual_seed(0)
    geometries = list(
        itertools.product(range(1, 6), range(1, 4), range(6), range(6), range(1, 4), range(1, 13))
    )
    chosen = torch.randperm(len(geometries), generator=generator)[:1500]
    n_checked = 0
    for i in chosen.tolist():
        kernel, stride, left, right, dilation, size = geometries[i]
        fits = size + left + right >= dilation * (kernel - 1) + 1
        if not (allowed(size, left, right, mode) and fits):
            continue
        arguments = (kernel, stride, left, right, dilation, mode, size)
        assert max_reads(*arguments) == counted(*arguments), arguments
        n_checked += 1
    assert n_checked > 500


def counted_fast(kernel, stride, left, right, dilation, mode, size):
    """:func:`counted` without torch, for the suprema."""
    return int(taps(kernel, stride, left, right, dilation, mode, size).sum(dim=(0, 1)).max())


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_supremum_over_sizes(mode, stride):
    """Without a size: the largest count over all sizes up to 40, no less and no more."""
    generator = torch.Generator().manual_seed(stride)
    for kernel, dilation in itertools.product(range(1, 6), range(1, 4)):
        paddings = [(0, 0), *torch.randint(0, 6, (2, 2), generator=generator).tolist()]
        for left, right in paddings:
            counts = [
                counted_fast(kernel, stride, left, right, dilation, mode, size)
                for size in range(1, LARGEST + 1)
                if allowed(size, left, right, mode)
                and size + left + right >= dilation * (kernel - 1) + 1
            ]
            arguments = (kernel, stride, left, right, dilation, mode)
            assert max_reads(*arguments) == max(counts), arguments


def test_zero_padding_by_formula():
    for kernel, stride, dilation, padding in itertools.product(
        range(1, 8), range(1, 6), range(1, 6), range(4)
    ):
        expected = math.ceil(kernel * math.gcd(dilation, stride) / stride)
        assert max_reads(kernel, stride, padding, padding, dilation, "zeros") == expected


# The peers' failures, by hand.
@pytest.mark.parametrize(
    ("arguments", "reads"),
    [
        ((3, 1, 1, 1, 1, "zeros"), 3),
        ((3, 2, 1, 1, 1, "zeros"), 2),
        ((3, 2, 0, 0, 2, "zeros"), 3),
        ((5, 5, 0, 0, 5, "zeros"), 5),
        # Three times itself, and once as the copy beyond one edge; both edges at size 3.
        ((3, 1, 1, 1, 1, "reflect", 5), 4),
        ((3, 1, 1, 1, 1, "reflect"), 5),
        ((3, 3, 1, 1, 1, "reflect"), 2),
        # Two pixels padded to six: four windows of three.
        ((3, 1, 2, 2, 1, "circular", 2), 6),
        ((3, 1, 2, 2, 1, "circular"), 6),
        # The edge pixel and its four copies: 5 + 4 + 3 + 2 + 1; one pixel alone: all 5 x 5.
        ((5, 1, 4, 4, 1, "replicate", 9), 15),
        ((5, 1, 4, 4, 1, "replicate"), 25),
        ((3, 1, 1, 1, 1, "symmetric"), 3),
        # Dilation carries both taps over the only pixel.
        ((2, 1, 1, 1, 2, "zeros", 1), 0),
    ],
)
def test_counts_by_hand(arguments, reads):
    assert max_reads(*arguments) == reads


def test_operator_factor_is_rounded_up():
    """factor^2 >= max n, in exact arithmetic, and by less than 1e-15 of it."""
    for kernel, stride, padding, dilation in itertools.product(
        range(1, 12), (1, 2), (0, 3), (1, 2)
    ):
        for mode in MODES:
            pads = [(padding, padding)] * 2
            geometry = ([kernel, 3], [stride, 1], pads, [dilation, 1], mode)
            factor = operator_factor(*geometry)
            reads = max_reads(kernel, stride, padding, padding, dilation, mode)
            reads *= max_reads(3, 1, padding, padding, 1, mode)
            assert reads <= Fraction(factor) ** 2 <= reads * (1 + Fraction(1, 10**15))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0, 0, 1, "zeros"), "at least 1, got 0, 1 and 1"),
        ((3, 0, 0, 0, 1, "zeros"), "at least 1, got 3, 0 and 1"),
        ((3, 1, 0, 0, 0, "zeros"), "at least 1, got 3, 1 and 0"),
        ((3, 1, 1, 1, 1, "mirror"), "padding_mode: expected one of .*'mirror'"),
        ((3, 1, 4, 4, 1, "reflect", 4), "size: expected at least 5"),
        ((3, 1, 1, 4, 1, "circular", 3), "size: expected at least 4"),
        ((3, 1, 4, 1, 1, "symmetric", 3), "size: expected at least 4"),
        ((5, 1, 1, 0, 2, "zeros", 7), "size: expected at least 8"),
    ],
)
def test_impossible_windows_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        max_reads(*arguments)
