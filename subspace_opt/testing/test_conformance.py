"""One test for each check of the components and specs that the command line names."""

from __future__ import annotations

import pytest

from subspace_opt.testing import Check
from subspace_opt.testing.plugin import HOW, asked


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = asked(metafunc.config)
    metafunc.parametrize("check", found or [pytest.param(None, marks=pytest.mark.skip(reason=HOW), id="nothing")], ids=str)


def test_conformance(check: Check) -> None:
    check()
