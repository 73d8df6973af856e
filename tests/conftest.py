"""Settings of the whole test run: few threads, a fixed seed for every test."""

import pytest
import torch

pytest.register_assert_rewrite("checks")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
