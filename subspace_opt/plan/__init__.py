"""The plan: the computation and the state of each parameter, known before any tensor exists.

In: a spec, and the parameters' names, shapes, dtypes and kinds of module. Out: a `Plan` with one `Row` per parameter: its route, its view
as matrices, its ranks after clamping, its state to the byte.
"""

from .names import Role
from .plan import Plan, counts
from .routing import make_plan
from .rows import COUNTERS, Entry, Row, adamw_bytes, said, state_key

__all__ = ["COUNTERS", "Entry", "Plan", "Role", "Row", "adamw_bytes", "counts", "make_plan", "said", "state_key"]
