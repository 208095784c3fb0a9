"""The options of `pytest --pyargs subspace_opt.testing`. `subspace_opt_pytest` loads this pytest plugin for that command only."""

from __future__ import annotations

import pytest

from ..registry import RegistryError
from ..spec import SpecError, preset_names
from . import Check, UnknownComponentError, checks, spec_checks

CHECKS = pytest.StashKey[list[Check]]()

HOW = (
    "name the components or specs to test: --component KIND, --component my_pkg:MyRule, --component file.py, --spec my.yaml; `all` "
    "tests everything that is installed"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("subspace_opt", "conformance of components and specs of subspace_opt")
    group.addoption(
        "--component",
        action="append",
        default=[],
        metavar="NAME",
        help="a component: a kind, module:Class, file.py:Class, or all; options as JSON, 'switch={\"at\": 3}'; can be repeated",
    )
    group.addoption("--spec", action="append", default=[], metavar="SPEC", help="a spec: a preset, a file, or all presets; can be repeated")


def pytest_configure(config: pytest.Config) -> None:
    """Make the checks before pytest collects tests, so that a wrong option is a usage error."""
    found: list[Check] = []
    try:
        for name in config.getoption("component"):
            found += checks(name)
        for name in config.getoption("spec"):
            for source in preset_names() if name == "all" else [name]:
                found += spec_checks(source)
    except (UnknownComponentError, SpecError, RegistryError) as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[CHECKS] = found


def asked(config: pytest.Config) -> list[Check]:
    """The checks of a session; an empty list if no options were given or this plugin is not loaded."""
    return config.stash.get(CHECKS, [])
