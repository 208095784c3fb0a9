"""Options in one line of text, as command lines of trainers pass them: `rank=128,update_proj_gap=50` or `matrix.selector.rank=128`."""

from __future__ import annotations

import re
from typing import Any

from ..arguments import COUNTERPARTS, counterparts, refuse_options
from ..spec import Spec, SpecError
from ..spec.overrides import value_in_text

# Options of `SubspaceOptimizer` that a number or a word can express. A trainer has its own arguments for the rates.
IN_TEXT = ("state_dtype", "nonfinite", "rounding", "stacking", "batch_bytes", "seed", "strict")


def read_options(text: str | None, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """The overrides of a spec, and the options of `SubspaceOptimizer`, that a line of text gives.

    A key is a dotted path into the spec, another optimizer's option with a counterpart in the spec, or one of `IN_TEXT`. Values are YAML.

    Raises:
        SpecError: The text is not `key=value,key=value`, or gives a key twice.
        TypeError: An unknown key, or one without a counterpart in this spec.
    """
    overrides: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in _pairs(text or ""):
        found = {key: value} if "." in key else dict(counterparts(key, value, spec))
        target = options if key in IN_TEXT else overrides
        found = {key: value} if key in IN_TEXT else found
        if not found:
            refuse_options({key: value}, spec, [*IN_TEXT, *(word for word in COUNTERPARTS if dict(counterparts(word, 0, spec)))])
        for path in found.keys() & target.keys():
            raise SpecError(f"'{text}' sets {path} twice; leave one out")
        target |= found
    return overrides, options


def _pairs(text: str) -> list[tuple[str, Any]]:
    """Keys and values. A comma separates them if a key and `=` follow it, so that values may have commas, as in `[1, 2]`."""
    pairs = []
    for part in re.split(r",(?=\s*[\w.]+\s*=)", text) if text.strip() else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise SpecError(f"'{part}' in '{text}': give key=value, separated by commas, such as rank=128,update_proj_gap=50")
        pairs.append((key.strip(), value_in_text(value, f"'{part}' in '{text}'")))
    return pairs
