"""One thread: the matrices here are tiny, and OpenMP's barriers would cost ten times their work.

``--hypothesis-profile fuzz``: thousands of random examples (LIPKERNELS_FUZZ of each test) where the
default profile, ci, has a few hundred, the same ones every time.
"""

import collections
import os
import sys

import cuda_builds
import pytest
import simt
import torch
from hypothesis import HealthCheck, settings

# Without a CUDA device the kernels of csrc/cuda run on the CPU: the library that is loaded where
# lipkernels is imported, which no test has done yet.
if simt.why_not() is None:
    os.environ.setdefault("LIPKERNELS_CUDA_LIBRARY", str(simt.build()))

_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
settings.register_profile(
    "ci", max_examples=50, derandomize=True, deadline=None, suppress_health_check=_SLOW
)
_EXAMPLES = int(os.environ.get("LIPKERNELS_FUZZ", "3000"))  # of each test
settings.register_profile(
    "fuzz",
    max_examples=_EXAMPLES,
    deadline=None,
    suppress_health_check=_SLOW,
    print_blob=True,
)
settings.load_profile("ci")

if os.environ.get("TRITON_INTERPRET") == "1":  # set by conftest.py of the root
    import quick_interpreter

    quick_interpreter.install()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--matrices",
        type=int,
        default=None,
        help="how many pathological matrices test_certify_pathological.py draws (default: 5200)",
    )
    parser.addoption(
        "--demo-model",
        default=None,
        help="a model.pt that the demo wrote, for test_certify_attack.py to attack",
    )


@pytest.fixture(scope="session")
def built_for_gpus():
    """The library of csrc/cuda as nvcc builds it, for all architectures."""
    return cuda_builds.start().result()


def pytest_collection_finish(session):
    """Compile kernels for GPUs beside the tests that run before those of the builds."""
    if session.config.option.collectonly or _is_worker(session.config):
        return
    for item in session.items:
        if item.path.name == "test_triton_builds.py" and hasattr(item, "callspec"):
            item.module.report_of(item.callspec.params["family"])
        needs_library = item.path.name in ("test_cuda_builds.py", "test_cuda_library.py")
        if needs_library and cuda_builds.why_no_nvcc() is None:
            cuda_builds.start()


# With pytest-xdist there is a process for each core, and none is left to compile beside them. What
# each of them counts comes together in the one that reports.
_RANDOM = {"calls": collections.Counter(), "refused": collections.Counter()}


def _is_worker(config):
    return hasattr(config, "workeroutput")


def _random_calls():
    fuzzing = sys.modules.get("fuzzing")
    return {"calls": fuzzing.CALLS, "refused": fuzzing.REFUSED} if fuzzing else {}


def pytest_sessionfinish(session):
    if _is_worker(session.config):
        session.config.workeroutput["random"] = {k: dict(v) for k, v in _random_calls().items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for kind, counts in getattr(node, "workeroutput", {}).get("random", {}).items():
        _RANDOM[kind].update(counts)


def pytest_terminal_summary(terminalreporter):
    """What the random calls of this run came to."""
    for kind, counts in _random_calls().items():
        _RANDOM[kind].update(counts)
    names, calls, refused = len(_RANDOM["calls"]), *(_RANDOM[k].total() for k in _RANDOM)
    if calls:
        terminalreporter.write_line(
            f"random calls: {calls} of {names} public names, {calls - refused} with a"
            f" result, {refused} refused as documented"
        )
