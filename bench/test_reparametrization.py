"""Forward and backward of one constrained weight, every library in turns."""

import pytest

from bench.cases import KINDS, SHAPES, Case
from bench.peers import BUILDERS, OURS
from bench.replay import CLOCK, replay

CASES = [Case(*shape, kind) for shape in SHAPES for kind in KINDS]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("contender", BUILDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reparametrization(benchmark, tables, case, contender):
    if contender in tables.missing["weights"]:
        pytest.skip(f"{contender} is missing: {tables.missing['weights'][contender]}")
    row = tables.reparametrization(case)
    benchmark.group = case.name
    figures = row["contenders"][contender]
    benchmark.extra_info.update(figures, condition=row["condition"], rounds=row["rounds"])
    replay(benchmark, row["samples"][contender])
    if contender == OURS:
        assert figures["norm"] <= 1.0
        if row["condition"] <= 101:
            assert figures["orthogonality"] <= 1e-5
            assert figures["gradient"] <= 1e-3
