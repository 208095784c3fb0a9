"""Checkpoints: how a saved state dictionary is matched with an optimizer, and the versions of its layout.

In: a saved state dictionary and this optimizer's plan. Out: state and groups ready to load, or a `CheckpointError` that names the first
differences. Nothing changes before everything is checked.
"""

from .keys import differing, keys_in, names_in, saved_keys
from .migrations import MIGRATIONS, STATE_VERSION, CheckpointError, migrated
from .state_dict import MOST, distinct, equal, matched

__all__ = [
    "MIGRATIONS",
    "MOST",
    "STATE_VERSION",
    "CheckpointError",
    "differing",
    "distinct",
    "equal",
    "keys_in",
    "matched",
    "migrated",
    "names_in",
    "saved_keys",
]
