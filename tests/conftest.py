"""One thread per process and a deterministic hypothesis in CI: a run on two cores is quick and says the same twice."""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# No deadline: a first call may load a kernel or compile a graph, which says nothing about the example at hand.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
