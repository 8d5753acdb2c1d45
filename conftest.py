"""What every docstring example may assume: ``import torch``, and a fixed seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _doctest_world(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
    torch.manual_seed(0)
