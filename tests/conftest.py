"""Shared by all tests: small real images, and the shipped configurations."""

import pytest
import torch

from emp_plugin.config import read_config
from emp_plugin.data import load_dataset
from support import SCRIPTS

# tiny tensors: threads mostly wait for each other
# (tests/solo_learn beside other work: 208 s with two threads, 19 s with one)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits():
    """(train, test) of the digits, 32x32 RGB."""
    return load_dataset("digits", None)


@pytest.fixture
def config():
    """Reads a shipped configuration: config("digits/emp", "max_epochs=1")."""
    return lambda name, *overrides: read_config(str(SCRIPTS / "pretrain"), name, list(overrides))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
