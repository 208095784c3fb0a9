"""What a user writes: specs as YAML, JSON or mappings, presets, overrides.

In: a preset's name, a file, a mapping, overrides. Out: a frozen, checked `Spec`, or a `SpecError` that names file, line and remedy.
"""

from .load import load_spec, parse_spec, preset_names, with_state_dtype
from .model import STANDARD_OTHER, Defaults, Route, Spec, SpecError
from .schema import json_schema

__all__ = [
    "STANDARD_OTHER",
    "Defaults",
    "Route",
    "Spec",
    "SpecError",
    "json_schema",
    "load_spec",
    "parse_spec",
    "preset_names",
    "with_state_dtype",
]
