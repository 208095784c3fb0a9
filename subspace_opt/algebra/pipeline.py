"""The places of a pipeline and the rules in them: the part of a spec that says how a gradient becomes an update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..registry import kind_of, suggest
from ..schedules import Place, Scheduled, scheduled_fields, takes_float
from .core import Dim, Rule, Selector, Slot
from .storage import StateDtype
from .weight_rule import WeightRule


def _listed(value: Any) -> Any:
    """Read one rule as a list of one, and nothing as the empty list."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(value)
    return (value,)


SAMPLE = Dim("rows", 2), Dim("cols", 3)  # sides of some matrix, for questions whose answer does not depend on the shape

Rules = Annotated[tuple[Rule, ...], BeforeValidator(_listed)]
WeightRules = Annotated[tuple[WeightRule, ...], BeforeValidator(_listed)]

Values = tuple[tuple[str, float], ...]  # by dotted path, such as ("inside.beta1", 0.85)


class Mix(Scheduled):
    """`inside * lift(update inside) + complement * update of the complement`."""

    inside: float = Field(1.0, ge=0.0, description="Weight of the update made inside the subspace.")
    complement: float = Field(1.0, ge=0.0, description="Weight of the update made from the complement.")


class Pipeline(Scheduled):
    """How the gradient of a matrix becomes an update, place by place."""

    orient: Literal["right", "left", "short", "long"] = Field(
        "right", description="The side of the matrix on which the basis lives: columns, rows, the shorter, the longer."
    )
    square: Literal["right", "left"] = Field("right", description="The side of a square matrix that `short` and `long` take.")
    feedback: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="Error feedback: the gradient of the next update gets the part that the subspace did not transmit, and this share "
        "of the part that it did (0.95 is the momentum of Trion and Dion, 0 plain error feedback).",
    )
    momentum: Rules = Field((), description="Rules on the whole signal before it is split.")
    selector: Selector = Field("none", validate_default=True, description="The selector that opens the subspace.")
    inside: Rules = Field((), description="Rules on the signal's coordinates in the subspace.")
    complement: Rules = Field((), description="Rules on the residual, the part of the signal outside the subspace.")
    mix: Mix = Field(default=Mix(), description="Weights of the two updates.")
    finish: Rules = Field((), description="Rules on the whole update, in the weight's own orientation.")
    apply: WeightRules = Field((), description="Rules that see the weight too: how the update meets it. Empty: W - lr U.")
    decay: Literal["before", "after", "coupled"] = Field(
        "before",
        description="Weight decay on the weight before the update, on the updated weight, or added to the gradient that rules see. "
        "A rule in `apply` that decays the weight replaces it.",
    )
    lr_scale: float = Field(1.0, gt=0.0, description="Multiplies the learning rate, for the update and for weight decay.")
    decay_scale: float = Field(1.0, ge=0.0, description="Multiplies weight decay; 0 for none.")
    state_dtype: dict[str, StateDtype] = Field(
        {},
        description="How slots of the rules are stored, by name: `{exp_avg: bf16, exp_avg_sq: 8bit}`; others keep the dtype of "
        "computation. 8bit and 4bit need the extra `lowbit`; slots that are small, or no multiple of a block, keep it too.",
    )

    @field_validator("momentum", "inside", "complement", "finish", mode="after")
    @classmethod
    def _without_silence(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        for rule in rules:
            if rule.schedules and rule.traits(*SAMPLE).silent:
                raise ValueError(
                    f"rule '{kind_of(type(rule))}' makes an update of 0 here, so a schedule has no effect; remove the schedule"
                )
        # A rule whose update is 0 makes the whole place 0, as an empty place is.
        return () if any(rule.traits(*SAMPLE).silent for rule in rules) else rules

    @model_validator(mode="after")
    def _makes_an_update(self) -> Pipeline:
        inner, traits = self.selector.coords(*SAMPLE), self.selector.traits()
        opens = inner[0].size * inner[1].size > 0
        outside = bool(self.complement) and self.mix.ever_positive("complement")
        if opens and not self.inside and not outside:
            raise ValueError(f"selector '{kind_of(type(self.selector))}' opens a subspace, and `inside` names no rule for it")
        if self.inside and not opens:
            raise ValueError("`inside` needs a `selector` that opens a subspace; for a rule on the whole signal use `complement`")
        if not (self.inside and self.mix.ever_positive("inside")) and not outside:
            raise ValueError("neither `inside` nor `complement` makes an update; give one of them a rule and a weight")
        if self.feedback is not None and not opens:
            raise ValueError("`feedback` keeps the residual of a subspace; it needs a `selector` that opens one")
        residual = outside and not self.complement[0].traits(*SAMPLE).takes_whole
        if not traits.orthonormal and (self.feedback is not None or residual):
            raise ValueError(
                f"the columns of selector '{kind_of(type(self.selector))}' are not orthonormal here, so a residual is not well defined: "
                "use neither `feedback` nor a `complement` that takes the residual"
            )
        moves = {slot.transport for rule in self.inside for slot in rule.slots(*inner).values()}
        if opens and not traits.keeps_basis and moves & {"project", "project_abs"}:
            raise ValueError(
                f"selector '{kind_of(type(self.selector))}' does not keep the basis of the previous update, so no moment can be projected "
                "onto the new one; use a rule inside without memory, or `on_refresh: keep`"
            )
        return self

    @model_validator(mode="after")
    def _decays_once(self) -> Pipeline:
        own = [kind_of(type(rule)) for rule in self.apply if rule.traits(*SAMPLE).decays]
        if len(own) > 1:
            raise ValueError(f"`apply` decays the weight {len(own)} times, by {' and '.join(own)}; keep one of them")
        if own and self.decay != "before":
            raise ValueError(
                f"`decay: {self.decay}` and '{own[0]}' in `apply` both decay the weight; set `decay: before`, which the rule replaces, or "
                "remove the rule"
            )
        return self

    @property
    def decay_beside_rules(self) -> Literal["before", "after"] | None:
        """When a weight decays that rules in `apply` update; None if one of them does it, or the gradient has it."""
        if self.decay == "coupled" or any(rule.traits(*SAMPLE).decays for rule in self.apply):
            return None
        return self.decay

    @model_validator(mode="after")
    def _stores_what_there_is(self) -> Pipeline:
        known = self.storable
        for name in self.state_dtype:
            why = self._why_not_stored(name) if name not in known else None
            if why:
                raise PydanticCustomError("route", "{why}", {"why": why, "place": ("state_dtype", name)})
        return self

    @model_validator(mode="after")
    def _schedules_keep_the_state(self) -> Pipeline:
        for path, place, part, name in scheduled(self):
            for point, value in part.schedules[name].points:
                number = value if takes_float(type(part), name) else int(value)
                if changes_state(self, ((path, number),)):
                    why = (
                        f"with {value} here, the rules or the selector would keep other state, or declare other traits, than with "
                        f"{getattr(part, name)}; a schedule may change numbers alone: leave out values that add or remove a moment, such "
                        "as a decay rate of 0, and ranks"
                    )
                    raise PydanticCustomError("route", "{why}", {"why": why, "place": (*place, *point)})
        return self

    @property
    def storable(self) -> dict[str, bool]:
        """The slots that `state_dtype` may name; True for those as large as the matrix or its coordinates."""
        found: dict[str, bool] = {} if self.feedback is None else {"error": True}
        for name, slot, large in self._rule_slots():
            if slot.dtype is None and slot.holds != "basis":
                found[name] = found.get(name, False) or large
        return {name: large for name, large in found.items() if name not in self._as_they_are}

    @property
    def _as_they_are(self) -> set[str]:
        return {name for name, slot, _ in self._rule_slots() if slot.dtype is not None or slot.holds == "basis"}

    def _rule_slots(self) -> Iterator[tuple[str, Slot, bool]]:
        """Every slot of the rules for some matrix: its last name, and whether it has one entry for each entry of the rule's signal."""
        inner = self.selector.coords(*SAMPLE)
        places: list[tuple[tuple[Rule | WeightRule, ...], tuple[Dim, Dim]]] = [(self.momentum, SAMPLE), (self.inside, inner)]
        for rules, sides in (*places, (self.complement, SAMPLE), (self.finish, SAMPLE), (self.apply, SAMPLE)):
            for rule in rules:
                for name, slot in rule.slots(*sides).items():
                    yield name.rpartition(".")[2], slot, slot.dims == sides

    def _why_not_stored(self, name: str) -> str:
        if name in self._as_they_are:
            return f"slot '{name}' holds a basis or whole numbers, which its rule declares in a fixed dtype; remove it from `state_dtype`"
        selected = {key.rpartition(".")[2] for key in self.selector.slots(*SAMPLE)}
        if name in selected:
            return (
                f"slot '{name}' belongs to selector '{kind_of(type(self.selector))}', which needs it unrounded: a rounded basis "
                "is no longer orthonormal; remove it from `state_dtype`"
            )
        return f"no rule of this pipeline has a slot '{name}'; {suggest(name, self.storable)}"


# ------------------------------------------------------------------------------------- numbers that groups and schedules set


class MomentFields(NamedTuple):
    """Paths of the decay rates of first and second moments in a pipeline's rules, without those that are 0: they keep no moment."""

    first: tuple[str, ...]
    second: tuple[str, ...]


def moment_fields(pipeline: Pipeline) -> MomentFields:
    """The fields that `momentum` and `betas` of a parameter group set.

    First moments: `beta1` of any rule, `beta` of a rule with `nesterov`, and `feedback`. Second moments: `beta2` of any rule.
    """
    first = ["feedback"] if pipeline.feedback else []
    second = []
    for place in ("momentum", "inside", "complement", "finish"):
        for path, _, rule in _parts(place, (), getattr(pipeline, place)):
            fields = type(rule).model_fields
            names = ["beta1", "beta"] if "nesterov" in fields else ["beta1"]
            first += [f"{path}.{name}" for name in names if getattr(rule, name, 0)]
            second += [f"{path}.beta2"] if getattr(rule, "beta2", 0) else []
    return MomentFields(tuple(first), tuple(second))


def _parts(path: str, place: Place, part: Any) -> Iterator[tuple[str, Place, Scheduled]]:
    """The pipeline and every component in it: dotted path, place in the spec, component. The only rule of a place has no index."""
    if isinstance(part, tuple):
        for i, item in enumerate(part):
            yield from _parts(path if len(part) == 1 else f"{path}.{i}", (*place, i), item)
    elif isinstance(part, Scheduled):
        yield path, place, part
        for name in type(part).model_fields:
            yield from _parts(f"{path}.{name}".strip("."), (*place, name), getattr(part, name))


def scheduled(pipeline: Pipeline) -> Iterator[tuple[str, Place, Scheduled, str]]:
    """The numbers that follow a schedule: dotted path, place in the spec, component and field."""
    for path, place, part in _parts("", (), pipeline):
        yield from ((f"{path}.{name}".strip("."), (*place, name), part, name) for name in part.schedules)


def changes_state(pipeline: Pipeline, values: Values) -> bool:
    """True if other numbers would change the slots, coordinates or traits of matrices of some shape."""
    return any(_form(pipeline, *sides) != _form(with_values(pipeline, values), *sides) for sides in _SIDES)


_SIDES = (SAMPLE, (Dim("rows", 512), Dim("cols", 384)), (Dim("rows", 384), Dim("cols", 512)))


def _form(pipeline: Pipeline, rows: Dim, cols: Dim) -> tuple[Any, ...]:
    """All that the numbers of a pipeline may not change."""
    selector, inner = pipeline.selector, pipeline.selector.coords(rows, cols)
    sides = {"momentum": (rows, cols), "inside": inner, "complement": (rows, cols), "finish": (rows, cols), "apply": (rows, cols)}
    rules = [(rule.slots(*dims), rule.traits(*dims)) for place, dims in sides.items() for rule in getattr(pipeline, place)]
    return inner, selector.slots(rows, cols), selector.traits(), pipeline.feedback is None, rules


def checked_value(pipeline: Pipeline, path: str, value: float) -> str:
    """The path of a number as `Values` have it, for a number that replaces it.

    Raises:
        ValueError: The path leads to no number that may change, or the number is outside the range of its field, or would change the state.
    """
    known = {}
    for dotted, place, part in _parts("", (), pipeline):
        for name in scheduled_fields(type(part)):
            found = f"{dotted}.{name}".strip("."), part, name
            known[".".join(map(str, (*place, name)))] = known[found[0]] = found
    if path not in known:
        raise ValueError(f"this path leads to no number that may change; {suggest(path, {found[0] for found in known.values()})}")
    own, part, name = known[path]
    try:
        type(part)(**{**{key: getattr(part, key) for key in type(part).model_fields}, name: value})
    except ValidationError as error:
        said = str(error.errors()[0]["msg"]).removeprefix("Value error, ").replace("Input should", "it should")
        raise ValueError(f"{value!r} cannot be used: {said}") from None
    if isinstance(part, Mix) and not part.ever_positive(name):
        raise ValueError("the spec gives this weight 0, so that part of the update has no state; give it a weight above 0 there")
    if changes_state(pipeline, ((own, value),)):
        raise ValueError(f"{value!r} would change the state that the rules keep; a group may change numbers alone")
    return own


def with_values(pipeline: Pipeline, values: Values) -> Pipeline:
    """The pipeline with other numbers at dotted paths, which must exist. The numbers are not validated."""
    for path, value in values:
        pipeline = _changed(pipeline, path.split("."), value)
    return pipeline


def _changed(part: Any, path: list[str], value: float) -> Any:
    """A copy of a component, or of the rules of one place, with a number at a path."""
    if isinstance(part, tuple):
        index, rest = (0, path) if len(part) == 1 else (int(path[0]), path[1:])
        return (*part[:index], _changed(part[index], rest, value), *part[index + 1 :])
    name, *rest = path
    return part.with_field(name, _changed(getattr(part, name), rest, value) if rest else value)
