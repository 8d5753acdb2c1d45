"""What every docstring example may assume, and the options of the long tests.

``--soak-steps N``: how long tests/test_soak.py trains. ``--hypothesis-profile fuzz``: thousands of
random examples where the default profile, ci, has a few hundred, the same ones every time.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-steps", type=int, default=500, help="steps of tests/test_soak.py")


@pytest.fixture(autouse=True)
def _doctest_world(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
    torch.manual_seed(0)
