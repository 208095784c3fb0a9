"""The costs of an optimizer before it exists, and the spec that fits a budget. No weights and no state are allocated.

In: a spec, and the parameters' names, shapes and dtypes, from a model on the meta device or from the headers of safetensors files.
Out: bytes, operations and traffic by role; a spec within a budget, or a `BudgetError`.

    parameters, headers    the parameters of a model, of its files, or of a function that builds it
    rehearsal              the peak of temporaries: the engine's own step on the meta device
    costs                  the sums for the whole plan, by role and pipeline
    budget, knobs, fit     sizes as users write them; ranks and state dtypes; the search for those that fit
"""

from .budget import Budget, BudgetError
from .costs import Costs, GroupCosts, costs_of
from .fit import Fitted, Turn, fit
from .headers import ModelError
from .parameters import Parameters, entries_of, find_parameters

__all__ = [
    "Budget",
    "BudgetError",
    "Costs",
    "Fitted",
    "GroupCosts",
    "ModelError",
    "Parameters",
    "Turn",
    "costs_of",
    "entries_of",
    "find_parameters",
    "fit",
]
