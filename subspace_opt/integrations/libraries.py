"""Imports of optional libraries, with one message if a library is missing or too old."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType


def needed(library: str, extra: str, at_least: str) -> ModuleType:
    """The imported library.

    Args:
        library: Name of the module, which is also the name of its distribution.
        extra: The extra of this package that installs it.
        at_least: The oldest version that works.

    Raises:
        ImportError: The library is missing, or older than `at_least`. The message holds the command that installs it.
    """
    remedy = f"pip install 'subspace-opt[{extra}]'"
    try:
        module = importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise  # the library is there, and misses something itself
        raise ImportError(f"subspace_opt.integrations needs {library}, which is not installed: {remedy}") from error
    found = importlib.metadata.version(library)
    if _numbers(found) < _numbers(at_least):
        raise ImportError(f"subspace_opt.integrations needs {library} {at_least} or newer, and {found} is installed: {remedy} --upgrade")
    return module


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0rc1` gives (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version).group().split("."))  # type: ignore[union-attr]
