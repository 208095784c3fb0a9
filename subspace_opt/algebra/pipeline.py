"""The places of a pipeline and what may stand in each: the part of a spec that says what happens to a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..registry import Model, kind_of, suggest
from .core import Dim, Rule, Selector, Slot
from .storage import StateDtype

if TYPE_CHECKING:
    from .frame import Split


def _listed(value: Any) -> Any:
    """One rule may stand for a list of one; `none` or nothing for the empty list."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(value)
    return (value,)


Rules = Annotated[tuple[Rule, ...], BeforeValidator(_listed)]


class Mix(Model):
    """`inside * lift(update inside) + complement * update of the complement`."""

    inside: float = Field(1.0, ge=0.0, description="Weight of the update made inside the subspace.")
    complement: float = Field(1.0, ge=0.0, description="Weight of the update made from the complement.")


class Pipeline(Model):
    """What happens to the gradient of a matrix, place by place."""

    orient: Literal["right", "left", "short", "long"] = Field(
        "right", description="The side of the matrix on which the basis lives: columns, rows, the shorter, the longer."
    )
    square: Literal["right", "left"] = Field("right", description="The side taken for a square matrix with `short` and `long`.")
    feedback: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="Error feedback: add what was not transmitted before to the gradient; the part of what was transmitted that is "
        "kept all the same (0.95 is the momentum of Trion and Dion, 0 plain error feedback).",
    )
    momentum: Rules = Field((), description="Rules on the whole signal before it is split.")
    selector: Selector = Field("none", validate_default=True, description="What opens the subspace.")
    inside: Rules = Field((), description="Rules on the signal's coordinates in the subspace.")
    complement: Rules = Field((), description="Rules on what the subspace leaves of the signal.")
    mix: Mix = Field(default=Mix(), description="Weights of the two updates.")
    finish: Rules = Field((), description="Rules on the whole update, in the weight's own orientation.")
    decay: Literal["before", "after", "coupled"] = Field(
        "before",
        description="Weight decay on the weight before the update, on the updated weight, or added to the gradient that rules see.",
    )
    lr_scale: float = Field(1.0, gt=0.0, description="Multiplies the learning rate, for the update and for weight decay.")
    decay_scale: float = Field(1.0, ge=0.0, description="Multiplies weight decay; 0 for none.")
    state_dtype: dict[str, StateDtype] = Field(
        {},
        description="How slots of the rules are stored, by name: `{exp_avg: bf16, exp_avg_sq: 8bit}`; others in the dtype of computation. "
        "8bit and 4bit need the extra `lowbit`, and leave small slots and those that blocks do not divide as they are.",
    )

    @field_validator("momentum", "inside", "complement", "finish", mode="after")
    @classmethod
    def _without_silence(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        # A silent rule makes the whole place silent, which is what an empty place is.
        return () if any(rule.silent for rule in rules) else rules

    @model_validator(mode="after")
    def _makes_an_update(self) -> Pipeline:
        rank = self.selector.coords(Dim("rows", 2), Dim("cols", 2))
        opens = rank[0].size * rank[1].size > 0
        outside = bool(self.complement) and self.mix.complement > 0
        if opens and not self.inside and not outside:
            raise ValueError(f"selector '{kind_of(type(self.selector))}' opens a subspace, and `inside` names no rule for it")
        if self.inside and not opens:
            raise ValueError("`inside` needs a `selector` that opens a subspace; for a rule on the whole signal use `complement`")
        if not (self.inside and self.mix.inside > 0) and not outside:
            raise ValueError("neither `inside` nor `complement` makes an update; give one of them a rule and a weight")
        if self.feedback is not None and not opens:
            raise ValueError("`feedback` keeps what the subspace leaves; it needs a `selector` that opens one")
        if not self.selector.orthonormal and (self.feedback is not None or (outside and not self.complement[0].takes_whole)):
            raise ValueError(
                f"the columns of selector '{kind_of(type(self.selector))}' are not orthonormal here, so nothing that it leaves of a signal "
                "is well defined: use neither `feedback` nor a `complement` that takes the residual"
            )
        moves = {slot.transport for rule in self.inside for slot in rule.slots(*rank).values()}
        if opens and not self.selector.keeps_basis and moves & {"project", "project_abs"}:
            raise ValueError(
                f"selector '{kind_of(type(self.selector))}' does not keep the basis of the update before, so nothing can be carried over "
                "by projection; use a rule inside without memory, or `on_refresh: keep`"
            )
        return self

    @model_validator(mode="after")
    def _stores_what_there_is(self) -> Pipeline:
        known = self.storable
        for name in self.state_dtype:
            why = self._why_not_stored(name) if name not in known else None
            if why:
                raise PydanticCustomError("route", "{why}", {"why": why, "place": ("state_dtype", name)})
        return self

    @property
    def storable(self) -> dict[str, bool]:
        """Names of slots that `state_dtype` may name, and whether they are as large as the matrix or its coordinates."""
        found: dict[str, bool] = {} if self.feedback is None else {"error": True}
        for name, slot, large in self._rule_slots():
            if slot.dtype is None and slot.holds != "basis":
                found[name] = found.get(name, False) or large
        return {name: large for name, large in found.items() if name not in self._as_they_are}

    @property
    def _as_they_are(self) -> set[str]:
        return {name for name, slot, _ in self._rule_slots() if slot.dtype is not None or slot.holds == "basis"}

    def _rule_slots(self) -> Iterator[tuple[str, Slot, bool]]:
        """Every slot of the rules for some matrix, by its last name, and whether it has an entry for each of the rule's signal."""
        own = Dim("rows", 2), Dim("cols", 3)
        for rules, sides in ((self.momentum, own), (self.inside, self.selector.coords(*own)), (self.complement, own), (self.finish, own)):
            for rule in rules:
                for name, slot in rule.slots(*sides).items():
                    yield name.rpartition(".")[2], slot, slot.dims == sides

    def _why_not_stored(self, name: str) -> str:
        if name in self._as_they_are:
            return f"slot '{name}' is a basis or whole numbers, and stays as its rule declares it; remove it from `state_dtype`"
        selected = {key.rpartition(".")[2] for key in self.selector.slots(Dim("rows", 2), Dim("cols", 3))}
        if name in selected:
            return (
                f"slot '{name}' is that of selector '{kind_of(type(self.selector))}', which needs it as it was computed: a rounded basis "
                "is no longer orthonormal; remove it from `state_dtype`"
            )
        return f"no rule of this pipeline has a slot '{name}'; {suggest(name, self.storable)}"

    def on(self, rows: int, cols: int, modes: tuple[int, ...] = ()) -> Split:
        """The pipeline for weights of `rows` x `cols`, the columns being `modes` joined."""
        side: str = self.orient
        if side in ("short", "long"):
            long = "left" if rows > cols else "right"
            short = "right" if rows > cols else "left"
            side = self.square if rows == cols else (short if side == "short" else long)
        turned = side == "left"
        own = (Dim("rows", rows), Dim("cols", cols, modes=modes))
        if turned:
            own = (Dim("rows", cols, modes=modes), Dim("cols", rows))
        from .frame import Split  # late: a frame holds a pipeline

        return Split(self, *own, turned)
