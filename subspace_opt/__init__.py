"""Subspace optimizers for PyTorch from one declarative spec."""

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
from .conversion import ConversionError, Converted, convert
from .engine.flags.watch import NonFiniteGradient
from .engine.lowbit import LowBitError
from .in_backward import BackwardOptimizer, step_in_backward
from .optimizer import SubspaceOptimizer, build
from .plan import Entry, Plan, make_plan
from .registry import RegistryError, load_plugin, register
from .spec import Spec, SpecError, load_spec

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
