"""Forward and backward of one constrained weight, every library in turns."""

import pytest

from bench.cases import all_cases
from bench.peers import OURS
from bench.reparametrization import contenders
from bench.replay import CLOCK, replay

PAIRS = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in all_cases()
    for name in contenders(case)
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "contender"), PAIRS)
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
