"""Schedules: numbers of a spec that change with the count of a parameter's updates.

    beta: {schedule: linear, from: 0.85, to: 0.95, over: 300}

`n` is the number of updates that the parameter has had. The first update uses the value at n = 0, update n + 1 the value at n. A component
keeps the first value in its field and the schedule beside it, so plan, state and every rule see plain numbers.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PlainValidator,
    PositiveInt,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from .registry import Model

Place = tuple[int | str, ...]

WHOLE = frozenset({"every"})  # fields of whole numbers that may follow a schedule; every field of type float may


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PydanticCustomError("number", "should be a number")
    return value


def _pairs(value: Any) -> Any:
    return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in value) if isinstance(value, list | tuple) else value


Number = Annotated[float, PlainValidator(_number, json_schema_input_type=float)]
Pairs = Annotated[tuple[tuple[NonNegativeInt, Number], ...], BeforeValidator(_pairs)]


class Ramp(Model):
    """From one value to another: `(1 - w) from + w to`, or `from (to / from)^w` if exponential.

    With `f = min(max(n - delay, 0) / over, 1)`, `w` is `f`, or `(1 - cos(pi f)) / 2` if cosine.
    """

    schedule: Literal["linear", "cosine", "exponential"] = Field(description="The curve between the two values.")
    start: Number = Field(alias="from", description="The value of the first update.")
    end: Number = Field(alias="to", description="The value after `delay` and `over` updates, and from then on.")
    over: PositiveInt = Field(description="Updates from the first value to the last.")
    delay: NonNegativeInt = Field(0, description="Updates with the first value before the change begins.")

    @model_validator(mode="after")
    def _has_a_ratio(self) -> Ramp:
        if self.schedule == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError("an exponential schedule multiplies by a constant, so `from` and `to` must be above 0; use `linear`")
        return self

    @property
    def points(self) -> tuple[tuple[Place, int | float], ...]:
        """The given values, each with its place in the schedule."""
        return (("from",), self.start), (("to",), self.end)

    @property
    def span(self) -> int:
        """Updates after which the value no longer changes."""
        return self.delay + self.over

    def plain(self) -> dict[str, Any]:
        """The schedule as a spec file has it."""
        delay = {"delay": self.delay} if self.delay else {}
        return {"schedule": self.schedule, "from": self.start, "to": self.end, "over": self.over, **delay}

    def in_floats(self) -> Ramp:
        """The same with its values as floats."""
        return self.model_copy(update={"start": float(self.start), "end": float(self.end)})

    def at(self, n: int) -> float:
        """The value after `n` updates."""
        part = min(max(n - self.delay, 0) / self.over, 1.0)
        if self.schedule == "exponential" and 0 < part < 1:
            return _between(self.start * (self.end / self.start) ** part, self.start, self.end)
        return _mixed((1 - math.cos(math.pi * part)) / 2 if self.schedule == "cosine" else part, self.start, self.end)


class Piecewise(Model):
    """Straight lines between given points. Before the first point its value holds, after the last point the last value."""

    schedule: Literal["piecewise"] = Field(description="Straight lines between points.")
    values: Pairs = Field(alias="points", min_length=1, description="Pairs [updates, value], in increasing order of updates.")

    @model_validator(mode="after")
    def _increases(self) -> Piecewise:
        for (a, _), (b, _) in pairwise(self.values):
            if b <= a:
                raise ValueError(f"`points` must be in increasing order of updates, and {b} comes after {a}; sort them")
        return self

    @property
    def points(self) -> tuple[tuple[Place, int | float], ...]:
        """The given values, each with its place in the schedule."""
        return tuple((("points", i, 1), value) for i, (_, value) in enumerate(self.values))

    @property
    def span(self) -> int:
        """Updates after which the value no longer changes."""
        return self.values[-1][0]

    def plain(self) -> dict[str, Any]:
        """The schedule as a spec file has it."""
        return {"schedule": self.schedule, "points": [list(pair) for pair in self.values]}

    def in_floats(self) -> Piecewise:
        """The same with its values as floats."""
        return self.model_copy(update={"values": tuple((n, float(value)) for n, value in self.values)})

    def at(self, n: int) -> float:
        """The value after `n` updates."""
        i = bisect_right(self.values, n, key=lambda pair: pair[0])
        if i in (0, len(self.values)):
            return float(self.values[max(i - 1, 0)][1])
        (a, start), (b, end) = self.values[i - 1], self.values[i]
        return _mixed((n - a) / (b - a), start, end)


Schedule = Ramp | Piecewise
WORDS = (*get_args(Ramp.model_fields["schedule"].annotation), "piecewise")


def _mixed(weight: float, start: float, end: float) -> float:
    return _between((1 - weight) * start + weight * end, start, end)


def _between(value: float, start: float, end: float) -> float:
    """The value, without the round-off that would bring it outside both ends."""
    return min(max(value, min(start, end)), max(start, end))


def schedule_model(given: Mapping[str, Any]) -> type[Ramp] | type[Piecewise]:
    """The model that reads a schedule given as a mapping."""
    return Piecewise if given.get("schedule") == "piecewise" else Ramp


def _read(given: Mapping[str, Any]) -> Schedule:
    word = given.get("schedule")
    if word is not None and word not in WORDS:
        unknown = PydanticCustomError("schedule", f"should be {', '.join(WORDS[:-1])} or {WORDS[-1]}")
        raise ValidationError.from_exception_data("schedule", [InitErrorDetails(type=unknown, loc=("schedule",), input=word)])
    return schedule_model(given).model_validate(dict(given))


# ----------------------------------------------------------------------------------------------------------- refreshes


def last_refresh(every: Schedule, offset: int, t: int) -> tuple[int, int]:
    """The last refresh at or before update `t`, and its index, if the time between refreshes follows a schedule.

    Each refresh says when the next one comes: refresh `k + 1` follows refresh `k` by the value of `every` at refresh `k`. The first
    refresh is at update `1 - offset`, with `offset` modulo the first value; without an offset this is the first update.
    """
    times = _changing(every, offset)
    if t <= times[-1]:
        index = bisect_right(times, t) - 1
        return times[index], index
    period = whole(every, every.span)
    more = (t - times[-1]) // period
    return times[-1] + more * period, len(times) - 1 + more


@functools.lru_cache(maxsize=256)
def _changing(every: Schedule, offset: int) -> tuple[int, ...]:
    """The refreshes up to the first one after which `every` no longer changes."""
    times = [1 - offset % whole(every, 0)]
    while times[-1] <= every.span:
        times.append(times[-1] + whole(every, max(times[-1], 1) - 1))
    return tuple(times)


def whole(schedule: Schedule, n: int) -> int:
    """The value after `n` updates, rounded to the nearest whole number."""
    return math.floor(schedule.at(n) + 0.5)


# ---------------------------------------------------------------------------------------------------------- components


class Scheduled(Model):
    """A model whose numbers may follow schedules."""

    _schedules: Mapping[str, Schedule] = PrivateAttr(default={})

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The schedules by field. A field itself holds the first value."""
        private = self.__pydantic_private__  # not `self._schedules`: pydantic takes microseconds to look that up, at every step
        found: Mapping[str, Schedule] = private["_schedules"] if private else {}
        return found

    def scheduled_at(self, name: str, n: int) -> int | float:
        """The value of a scheduled field after `n` updates."""
        schedule = self._schedules[name]
        return schedule.at(n) if takes_float(type(self), name) else whole(schedule, n)

    def ever_positive(self, name: str) -> bool:
        """True if a number, or a point of its schedule, is above 0."""
        schedule = self._schedules.get(name)
        return getattr(self, name) > 0 or (schedule is not None and any(value > 0 for _, value in schedule.points))

    def with_field(self, name: str, value: Any) -> Self:
        """A copy with another value in a field, in place of its schedule too. The value is not validated."""
        made = self.model_copy(update={name: value})
        for key in vars(made).keys() - type(self).model_fields.keys():
            del vars(made)[key]  # a cached property may depend on the field
        if name in self.schedules:
            made._schedules = {key: one for key, one in self.schedules.items() if key != name}
        return made

    @model_validator(mode="wrap")
    @classmethod
    def _read_schedules(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        given = {name: v for name, v in data.items() if isinstance(v, Mapping)} if isinstance(data, Mapping) else {}
        given = {name: v for name, v in given.items() if name in scheduled_fields(cls) or _is_refused(cls, name, v)}
        if not given:
            return handler(data)
        schedules: dict[str, Schedule] = {}
        wrong: list[InitErrorDetails] = []
        for name, value in given.items():
            try:
                if name not in scheduled_fields(cls):
                    raise PydanticCustomError("route", "this field cannot follow a schedule; only `every` and fields with fractions can")
                schedules[name] = _read(value).in_floats() if takes_float(cls, name) else _read(value)
            except ValidationError as error:
                wrong += _located(error, lambda loc, name=name: (name, *loc))
            except PydanticCustomError as error:
                wrong.append(InitErrorDetails(type=error, loc=(name,), input=value))
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        data = {**data, **{name: schedule.points[0][1] for name, schedule in schedules.items()}}
        _check_points(cls, data, schedules)
        made = handler(data)
        made._schedules = schedules
        return made

    @model_serializer(mode="wrap")
    def _write_schedules(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        return {name: self._schedules[name].plain() if name in self._schedules else value for name, value in plain.items()}


def _check_points(cls: type[Scheduled], data: dict[str, Any], schedules: Mapping[str, Schedule]) -> None:
    """Validate the model with every point of every schedule.

    Raises:
        ValidationError: A point is outside the field's range; the error is located at the point.
    """
    wrong: list[InitErrorDetails] = []
    for name, schedule in schedules.items():
        for i, (place, value) in enumerate(schedule.points):
            try:
                cls.model_validate({**data, name: value})
            except ValidationError as error:
                if i == 0 and any(item["loc"][:1] != (name,) for item in error.errors()):
                    break  # the fault is elsewhere, and the caller's own validation reports it
                wrong += _located(error, lambda loc, name=name, place=place: (name, *place) if loc[:1] in ((name,), ()) else None)
    if wrong:
        raise ValidationError.from_exception_data(cls.__name__, wrong)


def _located(error: ValidationError, move: Any) -> Iterator[InitErrorDetails]:
    """The errors at their new places, without those that `move` places at None."""
    for item in error.errors(include_url=False):
        place, kind, ctx = move(item["loc"]), item["type"], item.get("ctx", {})
        if place is not None:
            custom = kind not in _known_errors()
            what: Any = PydanticCustomError(kind, "{said}", {**ctx, "said": item["msg"]}) if custom else kind
            yield InitErrorDetails(type=what, loc=place, input=item["input"], ctx=ctx)


@functools.cache
def _known_errors() -> frozenset[str]:
    return frozenset(get_args(ErrorType))


def scheduled_fields(cls: type[BaseModel]) -> frozenset[str]:
    """The fields of a component that may follow a schedule: those of type float, and `every`."""
    return _fields_of(cls)[0]


def takes_float(cls: type[BaseModel], name: str) -> bool:
    """True if a field takes numbers with fractions."""
    return name in _fields_of(cls)[1]


@functools.lru_cache(maxsize=512)
def _fields_of(cls: type[BaseModel]) -> tuple[frozenset[str], frozenset[str]]:
    types = {name: set(_types(field.annotation)) for name, field in cls.model_fields.items()}
    fractions = frozenset(name for name, found in types.items() if float in found)
    return fractions | {name for name in WHOLE & types.keys() if int in types[name]}, fractions


def _types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation joins, without those inside containers."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and origin is None:
        yield annotation
    elif origin is Annotated:
        yield from _types(get_args(annotation)[0])
    elif origin is Literal:
        yield str
    elif origin not in (dict, tuple, list, Mapping):
        for part in get_args(annotation):
            yield from _types(part)
    else:
        yield origin


def _is_refused(cls: type[BaseModel], name: str, value: Mapping[str, Any]) -> bool:
    """True if a schedule is given to a field of another type than a number with a fraction."""
    field = cls.model_fields.get(name)
    if field is None or value.get("schedule") not in WORDS:
        return False
    return all(kind in (int, str, bool, type(None)) for kind in _types(field.annotation))
