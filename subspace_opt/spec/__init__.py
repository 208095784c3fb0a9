"""Specs, presets and overrides: the files and values that a user writes.

In: a preset's name, a YAML or JSON file, a mapping, overrides.
Out: a frozen, checked `Spec`, or a `SpecError` with file, line and remedy.
"""

from .load import load_spec, parse_spec, preset_names, with_roles, with_state_dtype
from .model import STANDARD_OTHER, Defaults, RoleName, Route, Spec, SpecError
from .schema import json_schema

__all__ = [
    "STANDARD_OTHER",
    "Defaults",
    "RoleName",
    "Route",
    "Spec",
    "SpecError",
    "json_schema",
    "load_spec",
    "parse_spec",
    "preset_names",
    "with_roles",
    "with_state_dtype",
]
