"""`make gpu` where there is no GPU: a dry run of every step, and what its driver survives."""

import json
import os
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import simt
import torch

from bench import peers
from bench.gpu import __main__ as driver
from bench.gpu import (
    baselines,
    contenders,
    correctness,
    floors,
    implementations,
    isolated,
    launches,
    library,
    ops,
    queued,
    report,
    rows,
    sanitizers,
    table,
)
from bench.gpu.accuracy import of_weights
from bench.gpu.budget import Budget
from bench.gpu.shapes import another, resnet_50, weights
from bench.timing import Budget as TimeBudget
from bench.timing import interleaved
from lipkernels import functional as F

CPU = torch.device("cpu")
RATES = {"copy": 1e12, "float16": 1e15}

# A machine where orthogonium is not installed.
WITHOUT_ORTHOGONIUM = """
import sys
sys.modules["orthogonium"] = None
from bench.gpu.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory, pytestconfig):
    out = tmp_path_factory.mktemp("dry") / "out"
    # Without the interpreter, which the other tests here have: it takes too long.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ORTHOGONIUM, "--dry-run", "--out", str(out)],
        cwd=pytestconfig.rootpath, env=env, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    files = {f.stem: json.loads(f.read_text()) for f in out.glob("*.json")}
    return done, files, (out / "summary.md").read_text()


# ------------------------------------------------------------------------------- the dry run
def test_a_dry_run_writes_a_file_for_each_step_and_a_summary(dry_run):
    done, files, summary = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(files) == set(driver.STEPS)
    for step, content in files.items():
        assert content["table"] == step and content["dry_run"]
        assert content["command"].startswith(f"python -m bench.gpu.{step} --out ")
        assert content["versions"]["torch"] == torch.__version__
        assert content["device"] == "cpu"
        assert f"## {step}\n" in summary
    assert summary in done.stdout
    assert "Nothing wrong was found." in summary
    assert "No figure here means anything" in summary


def test_every_op_is_measured(dry_run):
    _, files, summary = dry_run
    found = files["ops"]["rows"]
    assert {row["op"] for row in found} == set(implementations.IMPLEMENTED)
    assert {row["state"] for row in found} == {"measured"}
    assert not any(row["failed"] for row in found)
    for row in found:
        assert f"**{row['case']}**" in summary
        both = row["op"] not in ops.FORWARD_ONLY
        assert row["passes"] == (["forward", "both"] if both else ["forward"])
        assert all(len(shape) > 1 for shape in row["shapes"])
        for which in row["passes"]:
            assert row["floor"][which]["ms"] > 0
            for figures in row["contenders"].values():
                low, median, high = (figures[which]["ms"][k] for k in ("low", "median", "high"))
                assert 0 < low <= median <= high
                assert figures[which]["times_floor"] > 0
        assert row["contenders"][row["first"]]["forward"]["times_first"]["median"] == 1.0


def test_accuracy_stands_beside_each_time(dry_run):
    _, files, _ = dry_run
    for row in files["ops"]["rows"] + files["models"]["rows"]:
        for name in (row["first"], contenders.COMPOSITION):
            errors = row["contenders"][name]["accuracy"]
            assert errors["value"] <= 1e-5, row["case"]
            if "both" in row["passes"]:
                assert errors["gradient"] <= 1e-4, row["case"]
            assert errors.get("norm_minus_1", 0.0) <= 1e-12, row["case"]
    step = files["train_step"]["rows"][0]["contenders"]
    assert step["lipkernels"]["accuracy"]["norm_minus_1"] <= 0
    assert step["lipkernels"]["accuracy"]["gradient"] <= 1e-4


def test_the_other_libraries_and_the_strong_baseline_take_part(dry_run):
    _, files, _ = dry_run
    polar = next(row for row in files["models"]["rows"] if row["op"] == "polar_factor")
    assert contenders.BASELINE in polar["contenders"]
    assert polar["contenders"][contenders.BASELINE]["accuracy"]["value"] < 1e-4
    for name in contenders.PEERS:
        assert (name in polar["contenders"]) != (name in files["models"]["missing"])
    image = files["ops"]["rows"][0]["contenders"]
    assert {"torch pixel_unshuffle", ops.COPY} <= set(image)
    for row in files["train_step"]["rows"]:
        names = {"unconstrained", "lipkernels", "lipkernels retract"}
        assert names <= set(row["contenders"])
        assert row["contenders"]["unconstrained"]["step"]["times_first"]["median"] == 1.0


@pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))
def test_the_cuda_librarys_kernels_are_measured_in_the_shim(dry_run):
    _, files, _ = dry_run
    for row in files["ops"]["rows"] + files["models"]["rows"]:
        has = "cuda" in implementations.IMPLEMENTED[row["op"]]
        assert ("lipkernels cuda" in row["contenders"]) == has, row["case"]
        if has:
            errors = row["contenders"]["lipkernels cuda"]["accuracy"]
            assert row["first"] == "lipkernels cuda" and errors["value"] <= 1e-5, row["case"]
    assert files["sanitizers"]["script"] == "ran, watched by no tool"


def test_a_missing_library_is_named_and_survived(dry_run):
    _, files, summary = dry_run
    for step in ("ops", "models", "train_step"):
        assert files[step]["missing"]["orthogonium"].startswith("ModuleNotFoundError")
    assert "- orthogonium: ModuleNotFoundError" in summary


def test_the_tests_for_a_gpu_are_collected_here_and_skipped(dry_run):
    _, files, summary = dry_run
    tests = files["correctness"]
    assert tests["collected"] > 100
    assert tests["skipped"] == tests["collected"]
    assert tests["failed"] == tests["not_run"] == 0
    assert tests["uncollected"] == {} and tests["unfinished"] == []
    assert f"{tests['collected']}: Skipped: no CUDA device" in summary


def test_files_with_tests_for_a_gpu_are_found():
    names = {file.name for file in correctness.test_files()}
    assert {"test_gpu.py", "test_op_polar.py", "test_op_sampling.py"} <= names
    assert {"test_cuda_polar.py", "test_cuda_power.py", "test_cuda_sorting.py"} <= names
    assert "test_window.py" not in names


# ------------------------------------------------------------------------------- the driver
FAILING = """
import pytest
pytestmark = pytest.mark.gpu
def test_right():
    pass
@pytest.mark.parametrize("n", [1, 2])
def test_wrong(n):
    assert n == 2, "one is not two"
"""


def test_a_failing_test_is_named_and_the_status_says_so(tmp_path, capsys):
    file = tmp_path / "test_failing.py"
    file.write_text(FAILING)
    arguments = ["--dry-run", "--steps", "correctness", "--tests", str(file)]
    assert driver.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    found = json.loads((tmp_path / "out" / "correctness.json").read_text())
    assert (found["collected"], found["passed"], found["failed"]) == (3, 2, 1)
    ((test, why),) = found["failures"].items()
    assert test.endswith("test_failing.py::test_wrong[1]") and "one is not two" in why
    assert "- 1 tests failed" in capsys.readouterr().out


def test_without_pytest_the_rest_goes_on_and_the_status_says_so(tmp_path, monkeypatch, capsys):
    there = correctness.importlib.util.find_spec
    monkeypatch.setattr(
        correctness.importlib.util, "find_spec", lambda n: None if n == "pytest" else there(n)
    )
    arguments = ["--dry-run", "--steps", "correctness", "rates", "--out", str(tmp_path)]
    assert driver.main(arguments) == 2
    said = capsys.readouterr().out
    assert "Not run: pytest is not installed" in said
    assert "correctness is not shown" in said
    assert len(json.loads((tmp_path / "rates.json").read_text())["rows"]) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_only_a_dry_run_runs(tmp_path, capsys):
    assert driver.main(["--out", str(tmp_path)]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err


def test_wheels_are_used_and_their_absence_is_noted(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    assert "no wheels in" in driver._install(wheels, site)
    name = "carried-1.0"
    with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "here = True\n")
        info = f"{name}.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tag)
        wheel.writestr(f"{info}/RECORD", "")
    assert driver._install(wheels, site) is None
    assert (site / "carried.py").read_text() == "here = True\n"


# ----------------------------------------------------------------------- crashes, time limits
def crashing(argv):
    """A step of four cases: the second is the end of its process, the third raises."""
    found = table.options("crashing", "", argv)

    def raising():
        raise ArithmeticError("no such number")

    table.Table("crashing", found, {}).measure(
        {"a": dict, "b": partial(os._exit, 3), "c": raising, "d": lambda: {"n": 4}}
    )
    return 0


def test_a_crash_costs_one_row(tmp_path):
    step = driver.Step(crashing, 1.0)
    ran = driver.run_step("crashing", step, 60.0, tmp_path, ["--device", "cpu"])
    assert (ran["state"], ran["starts"]) == ("done", 2)
    found = json.loads((tmp_path / "crashing.json").read_text())["rows"]
    states = [(row["case"], row["state"]) for row in found]
    assert states == [("a", "measured"), ("b", "crashed"), ("c", "failed"), ("d", "measured")]
    assert found[2]["reason"] == "ArithmeticError: no such number"
    assert found[3]["n"] == 4
    assert len(rows.faults(found)) == 2


def test_a_step_that_always_crashes_is_given_up(tmp_path):
    step = driver.Step(lambda argv: os._exit(1), 1.0)
    ran = driver.run_step("gone", step, 60.0, tmp_path, [])
    assert (ran["state"], ran["starts"]) == ("crashed", 2)
    assert report.verdict({}, [ran]) == (["gone crashed"], 1)


def test_a_step_that_hangs_is_ended_with_what_it_started(tmp_path):
    pid = tmp_path / "pid"

    def hang(argv):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pid.write_text(str(child.pid))
        time.sleep(600)
        return 0

    start = time.monotonic()
    assert isolated.run(hang, [], tmp_path / "log", 1.0) is None
    assert time.monotonic() - start < 30
    for _ in range(100):  # until whoever inherited it has collected it
        stat = Path(f"/proc/{pid.read_text()}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the step started is still there")


def test_the_cuda_library_is_built_for_the_devices_that_there_are():
    assert library.architectures(["9.0", "8.6", "8.0"]) == ["80", "90a"]
    assert library.architectures(["10.3"]) == ["100f"]
    assert library.architectures(["12.0", "13.0"]) == ["120+PTX"]


def test_the_steps_run_where_the_built_library_is(tmp_path, monkeypatch):
    monkeypatch.delenv(library.VARIABLE, raising=False)
    started, ran = [], []

    def main(argv):
        ran.append(list(argv))
        return 5

    def start(program, command):
        started.append((program, command, os.environ[library.VARIABLE]))
        raise SystemExit(0)

    monkeypatch.setattr(library.os, "execv", start)
    assert library.with_library(main, ["--dry-run"], tmp_path) == 5
    monkeypatch.setattr(library, "provide", lambda out: (None, "no nvcc"))
    assert library.with_library(main, ["--steps", "ops"], tmp_path) == 5
    assert ran[0] == ["--dry-run"]
    assert ran[1][:2] == ["--steps", "ops"] and ran[1][-1] == "--note=CUDA library: no nvcc"
    assert not started
    monkeypatch.setattr(library, "provide", lambda out: (out / "_cuda.so", "built"))
    with pytest.raises(SystemExit):
        library.with_library(main, ["--steps", "ops"], tmp_path)
    ((program, command, variable),) = started
    assert variable == str(tmp_path / "_cuda.so") and program == sys.executable
    assert command[1:5] == ["-m", "bench.gpu", "--steps", "ops"]
    options = driver._parser().parse_args(command[3:])
    assert options.note == ["CUDA library: built"] and 0 <= options.spent < 5
    assert library.with_library(main, [], tmp_path) == 5  # which loads it


def test_without_nvcc_there_is_a_reason(tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library.provide(tmp_path) == (None, "no nvcc was found in CUDA_HOME or on PATH")


def test_notes_are_in_the_summary(tmp_path, capsys):
    driver.main(["--dry-run", "--steps", "rates", "--out", str(tmp_path), "--note=of the library"])
    assert "Notes:\n\n- of the library\n" in capsys.readouterr().out


def test_rows_that_time_did_not_suffice_for_are_named(tmp_path):
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--seconds", "-1"]
    one = table.Table("late", table.options("late", "", arguments), {})
    one.measure({"a": dict, "b": dict})
    found = json.loads((tmp_path / "late.json").read_text())
    assert found["rows"] == [] and found["not_measured"] == ["a", "b"]
    ran = {"step": "late", "state": "out of time", "seconds": 1.0, "limit": 1.0, "starts": 1}
    text, _ = report.summary(tmp_path, [ran], [])
    assert "| late | out of time, 2 rows not measured |" in text
    assert "Not measured, out of time:\n\n- a\n- b" in text


def test_time_that_a_step_leaves_is_shared_by_those_after_it():
    now = [0.0]
    budget = Budget(100.0, {"a": 2, "b": 1, "c": 1}, clock=lambda: now[0])
    assert budget.share("a") == 50
    now[0] = 20.0
    assert budget.share("b") == 40
    now[0] = 99.0
    assert budget.share("c") == 1
    now[0] = 120.0
    assert budget.share("c") == budget.left() == 0


def test_the_whole_stays_below_nine_minutes():
    assert driver.SECONDS + 2 * isolated._GRACE * len(driver.STEPS) < 9 * 60


# ------------------------------------------------------------------------------ the verdicts
def row_with(**accuracy):
    contender = {"lipkernels triton": {"accuracy": accuracy}}
    return {"case": "x", "state": "measured", "failed": {}, "contenders": contender}


def test_a_broken_bound_or_kernel_is_wrong_and_a_peers_is_not():
    assert rows.faults([row_with(norm_minus_1=-1e-7, value=1e-6)]) == []
    assert "a norm of 1 + 1.0e-06" in rows.faults([row_with(norm_minus_1=1e-6)])[0]
    assert "NaN" in rows.faults([row_with(norm_minus_1=-1.0, gradient=float("nan"))])[0]
    fine = row_with(norm_minus_1=-1e-7)
    fine["failed"] = {"orthogonium": "RuntimeError: bug"}
    assert rows.faults([fine]) == []
    fine["failed"] = {"lipkernels triton, CUDA graph": "RuntimeError: capture"}
    wrong = rows.faults([fine])
    assert wrong == ["x, lipkernels triton, CUDA graph: RuntimeError: capture"]
    assert report.verdict({"ops": {"rows": [fine]}}, []) == (wrong, 1)


def test_tests_that_did_not_run_are_no_success():
    ran = [{"step": "correctness", "state": "out of time"}]
    done = {"collected": 3, "passed": 3, "failed": 0, "not_run": 0, "dry_run": False}
    done |= {"uncollected": {}, "unfinished": []}
    assert report.verdict({"correctness": done}, ran) == ([], 0)
    for less in ({"not_run": 1}, {"unfinished": ["-9"]}, {"passed": 0}, {"collected": 0}):
        assert report.verdict({"correctness": done | less}, ran)[1] == 2
    assert report.verdict({}, ran)[1] == 2


SANITIZED = """
========= COMPUTE-SANITIZER
polar_factor triton
group_sort triton
========= {}
"""


def test_what_a_sanitizer_says_is_read():
    clean = sanitizers.verdict(0, SANITIZED.format("ERROR SUMMARY: 0 errors"))
    assert clean["state"] == "clean" and clean["summary"] == "ERROR SUMMARY: 0 errors"
    assert clean["ops"] == ["polar_factor triton", "group_sort triton"]
    text = SANITIZED.format("RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)")
    wrong = sanitizers.verdict(77, text)
    assert wrong["state"] == "found errors" and "1 hazard" in wrong["said"][1]
    assert sanitizers.verdict(None, "")["state"] == "out of time"
    refused = sanitizers.verdict(1, "========= Error: Device not supported")
    assert refused["state"] == "did not run: status 1"
    assert refused["said"] == ["========= Error: Device not supported"]
    tools = {"memcheck": clean, "racecheck": wrong}
    found = report.verdict({"sanitizers": {"tools": tools}}, [])
    assert found == (["racecheck found errors"], 1)


# ------------------------------------------------------------------------------ measurements
def test_a_sample_has_as_many_calls_as_each_contender_needs():
    now, log = [0.0], []

    def contender(name, seconds):
        def call():
            now[0] += seconds
            log.append(name)

        return call

    def watch(work):
        start = now[0]
        work()
        return now[0] - start

    both = {"fast": contender("fast", 2**-10), "slow": contender("slow", 1.0)}
    samples = interleaved(both, TimeBudget(0.0, least=3), CPU, stopwatch=watch, sample=2**-7)
    assert samples == {"fast": [2**-10] * 3, "slow": [1.0] * 3}
    assert log.count("fast") == 2 + 3 * 8 and log.count("slow") == 1 + 3


def test_inputs_rotate():
    seen = []
    works = [
        queued.Work(lambda i=i: seen.append(i) or [], [], []) for i in range(queued.copies(1, CPU))
    ]
    turn = queued.Rotating(works, queued.FORWARD)
    for _ in range(5):
        turn()
    assert seen == [0, 1, 0, 1, 0]


def test_copies_of_weights_are_others_with_the_same_singular_values():
    (weight,), _ = weights([(6, 9)], CPU)
    (copy,) = another([weight], seed=1)
    assert not torch.equal(copy, weight)
    torch.testing.assert_close(torch.linalg.svdvals(copy), torch.linalg.svdvals(weight))
    assert 1.1 < float(torch.linalg.cond(weight)) < 3


def test_resnet_50_has_its_54_matrices():
    assert len(resnet_50()) == 54
    assert sum(rows * cols for rows, cols in resnet_50()) == 25_502_912  # its weights


def test_floors_are_the_larger_of_bytes_and_products():
    found = floors.of_weights("frobenius_normalize", [(2, 3), (4, 4)])
    assert found["forward"] == floors.Floor(2 * 4 * (6 + 16))
    assert found["both"] == floors.Floor(5 * 4 * (6 + 16))
    assert found["forward"].seconds(RATES) == pytest.approx(176e-12)
    products = floors.of_weights("polar_factor", [(1024, 1024)])["forward"]
    assert products.flops == 3 * (1 + 7 + 2) * 1024**3
    assert products.seconds(RATES) == pytest.approx(products.flops / 1e15)
    assert products.seconds({"copy": 1e12}) is None  # a rate is missing
    assert set(floors.of_weights("retract", [(3, 3)])) == {"forward"}


def test_the_baseline_is_the_polar_factor_of_every_weight_in_order():
    problem = weights([(6, 9), (5, 5), (9, 4), (5, 5)], CPU)
    results, gradients = baselines.batched_bjorck(*problem).both()
    order = baselines.unbatched(problem[0])
    truth = contenders.exact(contenders.WEIGHT_OPS["polar_factor"], *problem)
    found = of_weights(order(results), order(gradients), truth, orthogonal=True)
    assert max(found["value"], found["orthogonality"], found["gradient"]) < 1e-3


def test_the_interpreters_kernels_are_measured_like_others():
    pytest.importorskip("triton")
    measured = ops.Ops(CPU, ops.TINY, RATES)
    if "triton" not in implementations.of("space_to_depth", CPU)[0]:
        pytest.skip("Triton's interpreter is off")
    row = measured.image(
        "space_to_depth",
        lambda x, b: F.space_to_depth(x, 2, backend=b),
        torch.randn(1, 1, 2, 2),
        {},
    )
    first = "cuda" if simt.why_not() is None else "triton"
    assert row["first"] == f"lipkernels {first}"
    assert row["contenders"]["lipkernels triton"]["accuracy"] == {"value": 0, "gradient": 0}
    assert row["contenders"]["lipkernels triton"]["launches"] == {"forward": None, "both": None}


def test_a_contender_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    def broken(name, weight):
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(peers, "hold", broken)
    monkeypatch.setattr(peers, "MODULES", dict.fromkeys(peers.MODULES, "torch"))
    problems = [weights([(3, 4)], CPU)]
    everyone, missing = contenders.others(problems)
    assert missing == {}
    truth = contenders.exact(contenders.WEIGHT_OPS["polar_factor"], *problems[0])
    row = rows.measure(
        everyone,
        floors.of_weights("polar_factor", [(3, 4)]),
        lambda r, g: of_weights(r, g, truth, orthogonal=True),
        ops.TINY,
        CPU,
        RATES,
    )
    assert list(row["contenders"]) == [contenders.BASELINE]
    reason = "NotImplementedError: not on this device"
    assert row["failed"] == dict.fromkeys(contenders.PEERS, reason)


def test_launches_are_counted_on_a_gpu_alone():
    assert launches.count(lambda: None, CPU) is None
