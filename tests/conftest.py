"""What all tests share."""

import os

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # before a run in this process asks
torch.set_num_threads(1)  # for what is made before the first test


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small wait longer for a second thread than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
