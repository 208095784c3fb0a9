"""What will be computed and held, known before it is: routes, views, ranks, bytes. No tensors.

In: a spec, and names, shapes, dtypes and module kinds of parameters. Out: a `Plan` with one `Row` a parameter.
"""

from .plan import COUNTERS, Entry, Plan, Row, adamw_bytes, make_plan, said, state_key

__all__ = ["COUNTERS", "Entry", "Plan", "Row", "adamw_bytes", "make_plan", "said", "state_key"]
