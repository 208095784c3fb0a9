"""The options of `pytest --pyargs subspace_opt.testing`; a pytest plugin that `subspace_opt_pytest` brings in only then."""

from __future__ import annotations

import pytest

from ..registry import RegistryError
from ..spec import SpecError, preset_names
from . import Check, UnknownComponentError, checks, spec_checks

CHECKS = pytest.StashKey[list[Check]]()

HOW = (
    "give what to test: --component KIND, --component my_pkg:MyRule, --component file.py, --spec my.yaml, or all for everything that is "
    "installed"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("subspace_opt", "conformance of components and specs of subspace_opt")
    group.addoption(
        "--component",
        action="append",
        default=[],
        metavar="NAME",
        help="a rule or selector: a kind, module:Class, file.py:Class, or all; options as JSON, 'switch={\"at\": 3}'; can be repeated",
    )
    group.addoption("--spec", action="append", default=[], metavar="SPEC", help="a spec: a preset, a file, or all presets; can be repeated")


def pytest_configure(config: pytest.Config) -> None:
    """Find what is asked for, before anything is collected."""
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
    """The checks of a session; none without options, or where this plugin is not at work."""
    return config.stash.get(CHECKS, [])
