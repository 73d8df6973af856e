"""Settings of the whole test run: one thread, a fixed seed for every test."""

import gc
import os
import sys

# The tensors are small, and threads that wait for each other are slow; in the processes that tests
# start as well.
os.environ["OMP_NUM_THREADS"] = "1"

import interpreter
import pytest
import torch

# Where Triton kernels cannot run, they are interpreted.
if not torch.cuda.is_available() and interpreter.supported():
    interpreter.enable()
pytest.register_assert_rewrite("checks")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_accelerator():
    """accelerate's settings are of the process: those of one test are no other's."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def short_collections():
    """Each run of a stage collects garbage, which takes long among the objects of the libraries."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()
