"""An optimizer's parameter groups and the plan made from them: the checks of a new group, and the tables that show both."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from . import arguments
from .algebra.pipeline import Values
from .checkpoint import STATE_VERSION, keys_in, names_in
from .engine import lowbit
from .engine.capture.fitness import refuse_unfit
from .engine.rounding import Rounding
from .engine.work import Nonfinite, Options, Stacking
from .plan import COUNTERS, Entry, Plan, Role, Row, counts, make_plan
from .plan.names import canonical_name
from .plan.numbers import checked_values, listed_values
from .spec import Spec, SpecError, load_spec
from .spec.summary import html_table

if TYPE_CHECKING:
    from .diagnostics import Observer

MOST_NAMES = 5  # in one warning


@functools.lru_cache(maxsize=64)
def _spec_of(text: str) -> Spec:
    return Spec.model_validate_json(text)


@functools.lru_cache(maxsize=64)
def _values_of(text: str, values: Values) -> dict[str, Values]:
    return checked_values(_spec_of(text), values)


class PlannedOptimizer(torch.optim.Optimizer):
    """Parameter groups, each with its spec, and the plan of all parameters."""

    spec: Spec
    _modules: dict[str, frozenset[str]]
    _model_roles: Mapping[str, Role]
    _strict: bool
    _options: Options
    _planned: tuple[Any, Plan] | None
    diagnostics: Observer | None = None  # made by `build(..., diagnostics=50)` or `subspace_opt.diagnostics.observe`

    def _observed(self, wanted: int | Mapping[str, Any] | None) -> Self:
        """This optimizer, observed as `build`'s option `diagnostics` asks."""
        if wanted is not None:
            from .diagnostics import observe  # late: a run without diagnostics does not import them

            observe(self, **(wanted if isinstance(wanted, Mapping) else {"every": wanted}))
        return self

    # ------------------------------------------------------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked as at construction.

        Raises:
            TypeError: The group is no dict.
            ValueError: An unknown key, or a value that construction would refuse. The optimizer is then unchanged.
        """
        arguments.check_group(param_group, STATE_VERSION)
        group = dict(param_group)
        overrides = group.pop("overrides", None)
        if "spec" in group or overrides:
            base = group.get("spec", self.spec)
            base = _spec_of(base) if isinstance(base, str) and base.startswith("{") else base
            group["spec"] = load_spec(base, overrides).to_json()
        arguments.check_rates(group)
        arguments.check_moments(group, _spec_of(group["spec"]) if "spec" in group else self.spec)
        if group.get("values"):
            _values_of(group.get("spec") or self.spec.to_json(), listed_values(group["values"]))
            group["values"] = dict(group["values"])
        super().add_param_group(group)
        try:
            self._check_last_group()
        except ValueError:
            self.param_groups.pop()
            raise
        self._planned = None

    def _check_last_group(self) -> None:
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is complex; optimize its real and imaginary parts: "
                    "nn.Parameter(torch.view_as_real(p.data))"
                )
        entries = self._entries()
        for said, values in (("are named", [e.name for e in entries]), ("have the key", [e.key for e in entries])):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ValueError(
                    f"two parameters {said} '{twice[0]}'; state and random draws depend on the name, so give each parameter its own"
                )
        # A parameter without a route and codes without torchao must raise now, not at the first step.
        own = entries[-len(group["params"]) :] if group["params"] else []
        rows = make_plan(_spec_of(group["spec"]), own)
        if any(row.codes for row in rows):
            lowbit.torchao_types()
        if self._options.capturable:
            refuse_unfit(rows, self._options)

    def _planned_parameters(self) -> list[tuple[dict[str, Any], torch.Tensor, Row]]:
        """All parameters, each with its group and its row of the plan."""
        rows = iter(self.plan.rows)
        return [(group, p, next(rows)) for group in self.param_groups for p in group["params"]]

    def _move_counters(self) -> None:
        """Bring the counters of a loaded state to the parameters' devices, or back to the host."""
        for p, slots in self.state.items():
            for key in [key for key in COUNTERS if key in slots]:
                slots[key] = slots[key].to(p.device if self._options.capturable else "cpu")

    def spec_of(self, group: Mapping[str, Any]) -> Spec:
        """The spec in force for a parameter group."""
        return _spec_of(group["spec"])

    def values_of(self, group: Mapping[str, Any]) -> Mapping[str, Values]:
        """The numbers that a parameter group sets by its `values`, by pipeline.

        Raises:
            ValueError: A path leads to no number of the group's spec, or a number cannot be used there.
        """
        given = group.get("values")
        return _values_of(group["spec"], listed_values(given)) if given else {}

    def state_dict(self) -> dict[str, Any]:
        """The state dictionary of torch's class, with copies of the groups' `values`, which a run may change in place."""
        state = super().state_dict()
        for group in state["param_groups"]:
            if group.get("values"):
                group["values"] = dict(group["values"])
        return state

    def _check_roles(self, roles: Mapping[str, str], *, in_groups: bool) -> None:
        """Warn, once, of matrices whose role is a guess and decides their pipeline.

        Args:
            roles: The roles that were given to the optimizer; each must match a parameter.
            in_groups: The caller gave groups. Libraries that make groups of a model drop the names that would tell roles.

        Raises:
            ValueError: A glob matches no parameter.
            SpecError: Several guesses in groups without names.
        """
        rows = self.plan.rows
        arguments.check_globs(roles, [canonical_name(row.entry.name) for row in rows])
        specs = [_spec_of(g["spec"]) for g in self.param_groups for _ in g["params"]]
        guessed = [
            row
            for row, spec in zip(rows, specs, strict=True)
            if row.role.is_guess and row.entry.use is None and any(route.role or route.module for route in spec.routes)
        ]
        if len(guessed) > (0 if self._modules else 1):  # a single matrix without a model is an experiment
            first, *more = [f"'{canonical_name(row.entry.name)}'" for row in guessed[:MOST_NAMES]]
            listed = ", ".join([first, *more]) + (f" and {len(guessed) - MOST_NAMES} more" if len(guessed) > MOST_NAMES else "")
            route = guessed[0].why.partition(";")[0]
            if in_groups and not self._modules and not any("param_names" in group for group in self.param_groups):
                raise SpecError(
                    f"spec '{self.spec.name}' routes parameters by role, and these parameter groups have no names, so the roles of "
                    f"{len(guessed)} matrices are unknown: embeddings would be updated as hidden matrices. Pass the model too: model=model"
                )
            warnings.warn(
                f"spec '{self.spec.name}' routes parameters by role, and "
                + ("neither module nor name" if self._modules else "no model was given, and no name")
                + f" tells the role of {listed}. {first} goes to '{guessed[0].pipeline}' as a hidden matrix ({route}). "
                f"Say what it is, roles={{{first}: 'hidden'}}" + ("" if self._modules else ", or use subspace_opt.build(spec, model)"),
                UserWarning,
                stacklevel=arguments.caller_level(),
            )

    # -------------------------------------------------------------------------------------------------------------------- plan

    def _entries(self) -> list[Entry]:
        entries = []
        for group, names, keys in zip(self.param_groups, names_in(self.param_groups), keys_in(self.param_groups), strict=True):
            for p, name, key in zip(group["params"], names, keys, strict=True):
                entries.append(
                    Entry(
                        name=name,
                        shape=tuple(p.shape),
                        dtype=p.dtype,
                        modules=self._modules.get(canonical_name(name), frozenset()),
                        role=self._model_roles.get(canonical_name(name)),
                        frozen=not p.requires_grad,
                        lr=float(group["lr"]),
                        weight_decay=float(group["weight_decay"]),
                        use=group["use"],
                        key=key,
                    )
                )
        return entries

    @property
    def plan(self) -> Plan:
        """Route, view, ranks and bytes of state of every parameter. Made again if groups or parameters have changed."""
        key = tuple((id(p), p.shape, p.dtype, p.requires_grad, g["spec"], g["use"]) for g in self.param_groups for p in g["params"])
        if self._planned is None or self._planned[0] != key:
            specs = [_spec_of(g["spec"]) for g in self.param_groups for _ in g["params"]]
            kahan = self._options.rounding == "kahan"
            self._planned = (key, make_plan(specs, self._entries(), strict=self._strict, compensated=kahan))
        return self._planned[1]

    def explain(self) -> Plan:
        """One row per parameter: name, shape, view, pipeline, rank after clamping, lr multiplier, weight decay, bytes, and the reason.

        Print it, iterate over it, or take `.to_dict()`.
        """
        self._planned = None  # a schedule may have changed a group's lr or weight decay
        return self.plan

    def __repr__(self) -> str:
        return _text(type(self).__name__, self.spec.name, self.param_groups, self.plan)

    def _repr_html_(self) -> str:
        return _html(type(self).__name__, self.spec.name, self.param_groups, self.plan)


def engine_options(nonfinite: Nonfinite, rounding: Rounding, stacking: Stacking, batch_bytes: int, seed: int, capturable: bool) -> Options:
    """The options of the engine, checked."""
    return Options(
        arguments.chosen("nonfinite", nonfinite, Nonfinite),
        arguments.chosen("rounding", rounding, Rounding),
        arguments.chosen("stacking", stacking, Stacking),
        batch_bytes,
        seed,
        capturable,
    )


Groups = Sequence[Mapping[str, Any]]


def _text(title: str, spec_name: str, groups: Groups, plan: Plan) -> str:
    """Lines in the manner of `torch.optim.Optimizer`: a block per group."""
    lines = [f"{title} ("]
    for g, (group, pipelines) in enumerate(_by_group(groups, plan)):
        lines += [f"Parameter Group {g}", f"    spec: {spec_name}"]
        lines += [f"    {option}: {value}" for option, value in _options(group)]
        lines += [f"    {name}: {counts(rows)}" for name, rows in pipelines.items()]
    return "\n".join([*lines, ")"])


def _html(title: str, spec_name: str, groups: Groups, plan: Plan) -> str:
    """HTML with a line per group and pipeline."""
    head = ("group", "options", "pipeline", "parameters and state")
    body = [
        (str(g), ", ".join(f"{option} {value}" for option, value in _options(group)), name, counts(rows))
        for g, (group, pipelines) in enumerate(_by_group(groups, plan))
        for name, rows in pipelines.items()
    ]
    return html_table(head, body, caption=f"{title}, spec '{spec_name}', {plan.total_bytes:,} bytes of state")


def _options(group: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The rates, and those options that are set."""
    yield "lr", f"{float(group['lr']):g}"
    yield "weight_decay", f"{float(group['weight_decay']):g}"
    for key in ("momentum", "betas", "values"):
        if group.get(key):
            yield key, str(group[key])
    if group["maximize"]:
        yield "maximize", "True"
    if group["refresh"]:
        yield "refresh", "True"


def _by_group(groups: Groups, plan: Plan) -> Iterator[tuple[Mapping[str, Any], dict[str, list[Row]]]]:
    """Every group with its rows by pipeline."""
    rows = iter(plan.rows)
    for group in groups:
        pipelines: dict[str, list[Row]] = {}
        for _ in group["params"]:
            row = next(rows)
            pipelines.setdefault(row.pipeline, []).append(row)
        yield group, pipelines
