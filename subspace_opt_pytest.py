"""A pytest plugin that adds the options of the conformance kit to `pytest --pyargs subspace_opt.testing`, and does nothing in other runs.

pytest loads it at every start if this package is installed. It is a separate module, so that this does not import torch.
"""

from __future__ import annotations

from typing import Any


def pytest_load_initial_conftests(early_config: Any, args: list[str]) -> None:
    """Add the options of the kit if this run is of the kit."""
    if any(argument.startswith("subspace_opt.testing") for argument in args):
        early_config.pluginmanager.import_plugin("subspace_opt.testing.plugin")
