"""What every docstring example may assume, and how long tests/test_soak.py trains."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-steps", type=int, default=500, help="steps of tests/test_soak.py")


@pytest.fixture(autouse=True)
def _doctest_world(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
    torch.manual_seed(0)
