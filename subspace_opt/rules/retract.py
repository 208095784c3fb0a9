"""A rule in `apply` that brings the updated weight back into a set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor

from ..algebra import Dim, Rule, State, Step, WeightRule, WeightTraits
from ..algebra.pipeline import SAMPLE
from ..registry import kind_of, register


@register
class Retract(WeightRule):
    """`by(W - lr U)`: the updated weight is replaced by its image, such as its polar factor UV' (SPEL, arXiv:2601.21487)."""

    kind: Literal["retract"] = "retract"
    by: Rule = Field(
        {"kind": "orthogonalize", "coefficients": "quintic", "dtype": "input"},
        validate_default=True,
        description="The rule that maps the updated weight into the set; it keeps no state. Its result is the weight, so it should compute "
        "in the weight's precision.",
    )

    @field_validator("by", mode="after")
    @classmethod
    def _maps_the_weight_alone(cls, rule: Rule) -> Rule:
        traits = rule.traits(*SAMPLE)
        if rule.slots(*SAMPLE) or traits.takes_whole or traits.silent:
            raise ValueError(
                f"'{kind_of(type(rule))}' needs more than the weight, or makes it 0; use a rule without state, such as `orthogonalize` "
                "or `rms_normalize`"
            )
        return rule

    def traits(self, rows: Dim, cols: Dim) -> WeightTraits:
        own = self.by.traits(rows, cols)
        return WeightTraits(decomposes=own.decomposes, elementwise=own.elementwise, by_rows=own.by_rows, waits=own.waits)

    def flops(self, rows: Dim, cols: Dim) -> float:
        return self.by.flops(rows, cols)

    def landed(self, after: Tensor, before: Tensor, state: State, step: Step) -> Tensor:
        return self.by.apply(after, after, {}, step._replace(in_place=False, spare=False))[0]
