"""Subspace optimizers for PyTorch from one declarative spec."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .algebra import (
    Basis,
    Change,
    Coords,
    Dim,
    Drawn,
    LowRank,
    Order,
    Refreshed,
    Rule,
    RuleTraits,
    Selector,
    SelectorFlops,
    SelectorTraits,
    Slot,
    State,
    Step,
    Transport,
    WeightError,
    WeightRule,
    WeightTraits,
)
from .checkpoint import CheckpointError
from .engine.flags.watch import NonFiniteGradient
from .engine.lowbit import LowBitError
from .in_backward import BackwardOptimizer, step_in_backward
from .optimizer import SubspaceOptimizer, build
from .plan import Entry, Plan, make_plan
from .registry import RegistryError, load_plugin, register
from .spec import Spec, SpecError, load_spec

if TYPE_CHECKING:
    from .conversion import ConversionError, Converted, convert

__version__ = "0.1.0"

__all__ = [
    "BackwardOptimizer",
    "Basis",
    "Change",
    "CheckpointError",
    "ConversionError",
    "Converted",
    "Coords",
    "Dim",
    "Drawn",
    "Entry",
    "LowBitError",
    "LowRank",
    "NonFiniteGradient",
    "Order",
    "Plan",
    "Refreshed",
    "RegistryError",
    "Rule",
    "RuleTraits",
    "Selector",
    "SelectorFlops",
    "SelectorTraits",
    "Slot",
    "Spec",
    "SpecError",
    "State",
    "Step",
    "SubspaceOptimizer",
    "Transport",
    "WeightError",
    "WeightRule",
    "WeightTraits",
    "build",
    "convert",
    "load_plugin",
    "load_spec",
    "make_plan",
    "register",
    "step_in_backward",
]


def __getattr__(name: str) -> Any:
    if name in ("ConversionError", "Converted", "convert"):  # imported late: most runs convert nothing
        return getattr(import_module(".conversion", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
