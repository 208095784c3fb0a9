"""State dictionaries.

In: a saved state dictionary and this optimizer's plan. Out: state and groups ready to load, or a `CheckpointError` that names the first
differences; nothing is changed before all is checked.
"""

from .state_dict import MIGRATIONS, MOST, STATE_VERSION, CheckpointError, distinct, equal, matched, migrated

__all__ = ["MIGRATIONS", "MOST", "STATE_VERSION", "CheckpointError", "distinct", "equal", "matched", "migrated"]
