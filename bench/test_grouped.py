"""16 weights of 32x288, in one call and in 16, every library in turns."""

import pytest

from bench.cases import SPEED_KINDS
from bench.grouped import GROUPED
from bench.peers import BUILDERS, OURS
from bench.replay import CLOCK, replay


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("contender", [GROUPED, *BUILDERS])
@pytest.mark.parametrize("kind", SPEED_KINDS)
def test_grouped(benchmark, tables, kind, contender):
    if contender in tables.missing["weights"]:
        pytest.skip(f"{contender} is missing: {tables.missing['weights'][contender]}")
    row = tables.grouped(kind)
    benchmark.group = row["case"]
    figures = row["contenders"][contender]
    benchmark.extra_info.update(figures, condition=row["condition"], rounds=row["rounds"])
    replay(benchmark, row["samples"][contender])
    if contender in (GROUPED, OURS):
        assert figures["norm"] <= 1.0
        assert figures["orthogonality"] <= 1e-5
