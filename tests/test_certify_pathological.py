"""Thousands of pathological matrices, each decided in exact arithmetic: no bound below the norm.

    python -m pytest tests/test_certify_pathological.py --matrices 100000

draws that many and prints a table; the default is what fits a test run.
"""

import math

import pytest
import torch
from operator_norm import is_upper_bound, singular_values
from pathological import F64, PATHOLOGICAL

from lipkernels.certify import spectral_norm_bound

FORMATS = (F64, F64, F64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = 6
LOOSE = 1e-5  # allowed for orthogonal weights


def draw(family, generator):
    """One matrix of a family: of a random shape, scale, orientation and format."""
    rows, cols = torch.randint(1, LARGEST + 1, (2,), generator=generator).tolist()
    matrix = PATHOLOGICAL[family](rows, cols)
    choice = torch.rand(3, generator=generator).tolist()
    if choice[0] < 0.5:
        # Families without chance in them (Hilbert, ..) would be the same few matrices.
        matrix = matrix * (0.5 + choice[1])
    kind = FORMATS[int(choice[2] * len(FORMATS))]
    rounded = matrix.to(kind)
    return rounded if bool(torch.isfinite(rounded).all()) else matrix


def looseness(matrix, bound):
    """bound / norm - 1 by a float64 SVD, of a matrix scaled to a largest entry of about one."""
    wide = matrix.double()
    exponent = math.frexp(float(wide.abs().max()))[1]
    half = -exponent // 2
    scaled = torch.ldexp(torch.ldexp(wide, torch.tensor(half)), torch.tensor(-exponent - half))
    norm = float(singular_values(scaled)[0])
    return math.ldexp(math.ldexp(bound, half), -exponent - half) / norm - 1


@pytest.mark.parametrize("dtype", FORMATS[2:], ids=str)
def test_subnormal_entries_count_where_the_processor_hides_them(dtype):
    smallest = torch.finfo(dtype).smallest_normal
    matrices = [(torch.rand(4, 3) * smallest * s).to(dtype) for s in (0.5, 1, 3, 1e4)]
    matrices += [torch.zeros(2, 2, dtype=dtype), torch.eye(3).to(dtype)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        bounds = [spectral_norm_bound(matrix) for matrix in matrices]
    finally:
        torch.set_flush_denormal(False)
    for matrix, bound in zip(matrices, bounds, strict=True):
        assert is_upper_bound(matrix, bound)
    assert 1 <= bounds[-1] <= 1 + 1e-6
    assert spectral_norm_bound(matrices[0]) < bounds[0] + smallest


def family_seed(family):
    return list(PATHOLOGICAL).index(family)


@pytest.mark.parametrize("family", PATHOLOGICAL)
def test_no_bound_is_below_the_norm(family, pytestconfig, capsys):
    asked = pytestconfig.getoption("matrices")
    count = -(-(asked or 5200) // len(PATHOLOGICAL))
    generator = torch.Generator().manual_seed(family_seed(family))
    torch.manual_seed(family_seed(family))
    below, infinite, loose, too_loose = [], 0, [], []
    for _ in range(count):
        matrix = draw(family, generator)
        bound = spectral_norm_bound(matrix)
        if not is_upper_bound(matrix, bound):
            below.append((bound, matrix))
        if bound == math.inf:
            infinite += 1
        elif bool(matrix.any()):
            loose.append(looseness(matrix, bound))
            if family.startswith("orthogonal") and is_upper_bound(matrix, bound * (1 - LOOSE)):
                too_loose.append((bound, matrix))
    assert not below
    assert not too_loose
    assert infinite <= (count if family == "almost_overflow" else 0)
    if asked is not None:
        loose.sort()
        median, largest = (loose[len(loose) // 2], loose[-1]) if loose else (0.0, 0.0)
        with capsys.disabled():
            print(
                f"\n  {family:20s} {count:6d} matrices, {len(below)} below the norm,"
                f" looseness {max(median, 0):.0e} (median) {max(largest, 0):.0e} (largest)",
                end="",
            )
