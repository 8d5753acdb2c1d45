"""One thread: the matrices here are tiny, and OpenMP's barriers would cost ten times their work."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
