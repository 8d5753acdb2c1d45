"""What every docstring example may assume, and how long tests/test_soak.py trains.

Without a CUDA device Triton's kernels run in its interpreter, on CPU tensors. Triton reads the
variable when it makes a kernel: it is set before any test imports one.
"""

import importlib.util
import os

import pytest
import torch

_HAS_TRITON = importlib.util.find_spec("triton") is not None
if _HAS_TRITON and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Doctests import every file of the package.
collect_ignore_glob = [] if _HAS_TRITON else ["lipkernels/kernels/triton/*"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-steps", type=int, default=500, help="steps of tests/test_soak.py")


@pytest.fixture(autouse=True)
def _doctest_world(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
    torch.manual_seed(0)
