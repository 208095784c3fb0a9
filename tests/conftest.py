"""One thread per process, deterministic hypothesis in CI, slow tests first, and selections of tests (`selection.py`)."""

import gc
import os

import pytest
import torch
from hypothesis import settings
from selection import selected

torch.set_num_threads(1)
if not torch.cuda.is_available():
    torch.manual_seed = torch.default_generator.manual_seed  # the public one also records a stack trace for CUDA, which takes a millisecond

# No deadline, because a first call may load a kernel or compile a graph.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def new_objects_only() -> None:
    """Let the garbage collector see only objects that the test makes: to count tensors it then does not visit a million older objects."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one preset a question, a part of long tables, no test marked slow")
    parser.addoption("--all-presets", action="store_true", help="every case of every preset")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    kept = selected(items, all_presets=config.getoption("all_presets"), quick=config.getoption("quick"))
    left = set(items).difference(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = kept
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # otherwise one worker would end long after the others


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from thousands of collected tests and their modules, which live to the end."""
    gc.collect()
    gc.freeze()
