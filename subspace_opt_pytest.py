"""A pytest plugin that does nothing until `pytest --pyargs subspace_opt.testing` is run; then it adds that kit's options.

It is a module of its own so that pytest, which loads it at every start wherever this package is installed, does not import torch.
"""

from __future__ import annotations

from typing import Any


def pytest_load_initial_conftests(early_config: Any, args: list[str]) -> None:
    """Bring in the options of the kit, if the kit is what runs."""
    if any(argument.startswith("subspace_opt.testing") for argument in args):
        early_config.pluginmanager.import_plugin("subspace_opt.testing.plugin")
