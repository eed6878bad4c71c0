"""What all tests share: fixed seeds, one thread, reproducible hypothesis examples."""

import random

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("mcd_edu", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("mcd_edu")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start each test from the same random numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
