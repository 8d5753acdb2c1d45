"""One thread: the matrices here are tiny, and OpenMP's barriers would cost ten times their work."""

import sys

import pytest
import torch


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


def pytest_terminal_summary(terminalreporter):
    """What the random calls of this run came to."""
    fuzzing = sys.modules.get("fuzzing")
    if fuzzing is not None and fuzzing.CALLS:
        calls, refused = sum(fuzzing.CALLS.values()), sum(fuzzing.REFUSED.values())
        terminalreporter.write_line(
            f"random calls: {calls} of {len(fuzzing.CALLS)} public names, {calls - refused} with a"
            f" result, {refused} refused as documented"
        )
