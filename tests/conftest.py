"What all tests share: a seed, a backend without windows, one hypothesis profile."
import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run: a red test must stay red until the code changes.
settings.register_profile("course", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("course")

@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same random state, whatever ran before it."
    torch.manual_seed(0)

@pytest.fixture
def figures():
    "Close what a test of pictures leaves open."
    import matplotlib.pyplot as plt
    plt.close("all")
    yield plt
    plt.close("all")
