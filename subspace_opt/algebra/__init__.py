"""The mathematics, pure, on stacks of matrices `(B, m, n)`.

In: a gradient, the state, the step. Out: an update and the new state. `core` is the interface for rules and selectors; `pipeline` names the
places, `frame` runs them. Nothing here knows parameters, devices or files.
"""

from .core import (
    Basis,
    Constants,
    Coords,
    Dim,
    Kernel,
    Order,
    Refreshed,
    Rule,
    RuleTraits,
    Selector,
    SelectorFlops,
    SelectorTraits,
    Side,
    Slot,
    State,
    Step,
    Transport,
)
from .linear import Linear
from .low_rank import LowRank, Rank
from .projection import add_lift, lift, project
from .transport import Change, averaged, averaged_square
from .weight_rule import WeightError, WeightRule, WeightTraits

__all__ = [
    "Basis",
    "Change",
    "Constants",
    "Coords",
    "Dim",
    "Kernel",
    "Linear",
    "LowRank",
    "Order",
    "Rank",
    "Refreshed",
    "Rule",
    "RuleTraits",
    "Selector",
    "SelectorFlops",
    "SelectorTraits",
    "Side",
    "Slot",
    "State",
    "Step",
    "Transport",
    "WeightError",
    "WeightRule",
    "WeightTraits",
    "add_lift",
    "averaged",
    "averaged_square",
    "lift",
    "project",
]
