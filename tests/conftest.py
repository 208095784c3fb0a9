"""One thread per process, deterministic hypothesis in CI, slow tests first, and `--quick`, a selection of tests."""

import gc
import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    torch.manual_seed = torch.default_generator.manual_seed  # the public one also records a stack trace for CUDA, which takes a millisecond

# No deadline, because a first call may load a kernel or compile a graph.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# `--quick` keeps these rows of tests that run for every preset, or for every component of the conformance kit.
QUICK_PRESETS = frozenset({"cosmos", "galore"})
QUICK_SUBJECTS = frozenset({"cosmos", "rule adam", "selector svd"})


@pytest.fixture
def new_objects_only() -> None:
    """Let the garbage collector see only objects that the test makes: to count tensors it then does not visit a million older objects."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="two presets a question, no test marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.getoption("quick"):
        kept = [item for item in items if is_quick(item)]
        config.hook.pytest_deselected(items=[item for item in items if not is_quick(item)])
        items[:] = kept
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # otherwise one worker would end long after the others


def is_quick(item: pytest.Item) -> bool:
    """True if a test is in the selection: it is not slow, and if it runs for every preset, its preset is one of the few."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if item.get_closest_marker("slow") or given.get("preset", "cosmos") not in QUICK_PRESETS:
        return False
    return "check" not in given or given["check"].subject.partition("=")[0] in QUICK_SUBJECTS


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from thousands of collected tests and their modules, which live to the end."""
    gc.collect()
    gc.freeze()
