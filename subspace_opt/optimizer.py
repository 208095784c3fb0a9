"""`SubspaceOptimizer`, a `torch.optim.Optimizer` made of a spec, and `build`."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from .algebra.storage import StateDtype
from .checkpoint import STATE_VERSION, matched
from .engine import lowbit
from .engine import step as engine
from .engine.gradients import survey
from .engine.homes import Memory
from .engine.rounding import Rounding
from .engine.work import Nonfinite, Options, Stacking, Work, allocate
from .plan import Entry, Plan, Row, make_plan
from .plan.modules import canonical_name, module_kinds, refuse_flat
from .registry import suggest
from .spec import Spec, SpecError, load_spec, with_state_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .distributed.exchange import MeshGroups, RankGroup
    from .distributed.placement import Sharding
    from .distributed.shards import ShardedParam

SpecLike = Spec | Mapping[str, Any] | str | os.PathLike[str]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

GROUP_KEYS = ("params", "param_names", "lr", "weight_decay", "maximize", "spec", "overrides", "use", "refresh", "state_version")
# What torch's schedulers and its checkpoints write into groups.
FOREIGN_GROUP_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum", "momentum")


@functools.lru_cache(maxsize=64)
def _spec_of(text: str) -> Spec:
    return Spec.model_validate_json(text)


class SubspaceOptimizer(torch.optim.Optimizer):
    """An optimizer of subspaces, by spec.

    Args:
        params: Parameters, (name, parameter) pairs, or parameter groups. A group may have its own `lr`, `weight_decay`, `maximize`,
            `overrides` (dotted paths into the spec), `spec`, and `use` (the name of a pipeline, past the routes).
        spec: A preset's name, a path to YAML or JSON, a mapping, or a `Spec`.
        lr, weight_decay: None takes the spec's defaults.
        overrides: Dotted paths into the spec, `{"matrix.selector.rank": 128}`.
        state_dtype: How the rules' slots are stored, in all pipelines: `fp32`, `bf16`, `8bit` or `4bit` for all moments, or by slot, as
            `{"exp_avg": "bf16", "exp_avg_sq": "8bit"}`; None leaves it to the spec.
        modules: Kinds of module by parameter name, as `build` finds them in a model; without them routes on `module` match nothing.
        nonfinite: What a NaN or infinity in a gradient does: `raise` (before anything changes), `skip` (this parameter, this step;
            counted in `skipped`), `propagate`.
        rounding: How a bf16 or fp16 parameter is rounded: `nearest`, `stochastic`, `kahan`.
        stacking: Compute matrices of one shape together: `auto` decides by device and size.
        batch_bytes: Bound for one temporary of a stack.
        seed: Of all draws, together with parameter name and step; no global generator is touched.
        strict: A route that matches no parameter is an error.
        process_group: Ranks that hold these parameters whole and the same gradients, as under DistributedDataParallel: they divide work
            and state among them, and `state_dict()` is then a collective. What is sharded (FSDP2, tensor parallel) needs no such word.

    Raises:
        SpecError: a spec that cannot be used, a parameter that no route accepts.
        LowBitError: a slot of 8 or 4 bits without torchao.
        ValueError: a bad lr or weight decay, an unknown key in a group, a complex parameter, two of one name.
    """

    def __init__(
        self,
        params: Params,
        spec: SpecLike = "cosmos",
        *,
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        overrides: Mapping[str, Any] | None = None,
        state_dtype: StateDtype | Mapping[str, StateDtype] | None = None,
        modules: Mapping[str, frozenset[str]] | None = None,
        maximize: bool = False,
        nonfinite: Nonfinite = "raise",
        rounding: Rounding = "nearest",
        stacking: Stacking = "auto",
        batch_bytes: int = 64 * 2**20,
        seed: int = 0,
        strict: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._overrides = dict(overrides or {})
        self._modules = dict(modules or {})
        self._strict = strict
        self._options = Options(
            _choice("nonfinite", nonfinite, Nonfinite),
            _choice("rounding", rounding, Rounding),
            _choice("stacking", stacking, Stacking),
            batch_bytes,
            seed,
        )
        self._memory = Memory()
        self._planned: tuple[Any, Plan] | None = None
        self._placed: tuple[Any, Plan, dict[int, tuple[RankGroup, Sharding]]] | None = None
        self._group = process_group
        self._mesh_groups: MeshGroups | None = None
        self.skipped: dict[str, int] = {}
        self.failures: dict[str, int] = {}
        self.spec = load_spec(spec, self._overrides)
        if state_dtype is not None:
            self.spec = with_state_dtype(self.spec, state_dtype)
        defaults = {
            "lr": self.spec.defaults.lr if lr is None else lr,
            "weight_decay": self.spec.defaults.weight_decay if weight_decay is None else weight_decay,
            "maximize": maximize,
            "spec": self.spec.to_json(),
            "use": None,
            "refresh": False,
            "state_version": STATE_VERSION,
        }
        _check_rates(defaults)
        super().__init__(params, defaults)
        self._warn_if_blind()
        self.plan  # noqa: B018  with `strict`, a route without parameters is an error now

    # ------------------------------------------------------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked as at construction: an unknown key is an error, since it would silently change nothing."""
        for key in param_group:
            if key not in GROUP_KEYS + FOREIGN_GROUP_KEYS:
                raise ValueError(
                    f"unknown key '{key}' in a parameter group; {suggest(key, GROUP_KEYS)} (options of the spec go into `overrides`, "
                    "as {'matrix.selector.rank': 128})"
                )
        if param_group.get("state_version", STATE_VERSION) != STATE_VERSION:
            raise ValueError(
                f"a parameter group of state version {param_group['state_version']}, here {STATE_VERSION}; leave the key out of a new "
                "group: load_state_dict brings older state up to date"
            )
        group = dict(param_group)
        overrides = group.pop("overrides", None)
        if "spec" in group or overrides:
            base = group.get("spec", self.spec)
            base = _spec_of(base) if isinstance(base, str) and base.startswith("{") else base
            group["spec"] = load_spec(base, overrides).to_json()
        _check_rates(group)
        super().add_param_group(group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()  # as if it had never been given
            raise
        self._planned = None

    def _check_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is complex; optimize its real and imaginary parts: "
                    "nn.Parameter(torch.view_as_real(p.data))"
                )
        twice = [name for name, count in Counter(self._names()).items() if count > 1]
        if twice:
            raise ValueError(f"two parameters are named '{twice[0]}'; state and random draws go by name, so give each its own")
        entries = self._entries()[-len(group["params"]) :] if group["params"] else []
        # A parameter that cannot be routed is an error now, not at the first step; so are codes without the package that makes them.
        if any(row.codes for row in make_plan(_spec_of(group["spec"]), entries)):
            lowbit.torchao_types()

    def spec_of(self, group: Mapping[str, Any]) -> Spec:
        """The spec in force for a parameter group."""
        return _spec_of(group["spec"])

    def _names(self) -> list[str]:
        names: list[str] = []
        for g, group in enumerate(self.param_groups):
            given = group.get("param_names")
            names += given or [f"group{g}.param{i}" for i in range(len(group["params"]))]
        return names

    def _warn_if_blind(self) -> None:
        by_module = any(route.module for g in self.param_groups for route in _spec_of(g["spec"]).routes)
        matrices = sum(p.dim() >= 2 for g in self.param_groups if g["use"] is None for p in g["params"])
        if by_module and not self._modules and matrices > 1:
            warnings.warn(
                f"spec '{self.spec.name}' routes embeddings and output heads by their module, and no model was given: they are treated as "
                "any matrix. Use subspace_opt.build(spec, model), or put them into a group with `use`",
                UserWarning,
                stacklevel=3,
            )

    # -------------------------------------------------------------------------------------------------------------------- plan

    def _entries(self) -> list[Entry]:
        entries = []
        names = iter(self._names())
        for group in self.param_groups:
            for p in group["params"]:
                name = next(names)
                entries.append(
                    Entry(
                        name=name,
                        shape=tuple(p.shape),
                        dtype=p.dtype,
                        modules=self._modules.get(canonical_name(name), frozenset()),
                        frozen=not p.requires_grad,
                        lr=float(group["lr"]),
                        weight_decay=float(group["weight_decay"]),
                        use=group["use"],
                    )
                )
        return entries

    @property
    def plan(self) -> Plan:
        """Routes, views, ranks and bytes of state of every parameter; made anew when groups or parameters change."""
        key = tuple((id(p), p.shape, p.dtype, p.requires_grad, g["spec"], g["use"]) for g in self.param_groups for p in g["params"])
        if self._planned is None or self._planned[0] != key:
            specs = [_spec_of(g["spec"]) for g in self.param_groups for _ in g["params"]]
            kahan = self._options.rounding == "kahan"
            self._planned = (key, make_plan(specs, self._entries(), strict=self._strict, compensated=kahan))
        return self._planned[1]

    def explain(self) -> Plan:
        """One row a parameter: name, shape, view, pipeline, rank after clamping, lr multiplier, weight decay, bytes, and why.

        Print it, iterate over it, or take `.to_dict()`.
        """
        self._planned = None  # lr and weight decay of a group may have been scheduled since
        return self.plan

    # ---------------------------------------------------------------------------------------------------------------- sharding

    def _shardings(self) -> dict[int, tuple[RankGroup, Sharding]]:
        """The rank group and sharding of every distributed parameter, by `id`. Computed again when the plan or a placement changes."""
        params = [p for group in self.param_groups for p in group["params"]]
        if self._group is None and not any(hasattr(p, "device_mesh") for p in params):
            return {}
        plan = self.plan
        key = tuple((id(p), p.shape, getattr(p, "placements", None)) for p in params)
        if self._placed is None or self._placed[:2] != (key, plan):
            sizes = [len(group["params"]) for group in self.param_groups]
            from .distributed import exchange, shards  # late: torch.distributed.tensor takes half a second to import

            self._mesh_groups = self._mesh_groups or exchange.MeshGroups()
            self._placed = (key, plan, shards.find_shardings(params, plan.rows, sizes, self._group, self._mesh_groups))
        return self._placed[2]

    # -------------------------------------------------------------------------------------------------------------------- step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient. `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._advance()
        return loss

    def _advance(self) -> None:
        """The updates of one step."""
        work, sharded = self._ready(self._planned_parameters())
        for group in self.param_groups:
            group["refresh"] = False
        self._update(work, sharded)

    def _planned_parameters(self) -> list[tuple[dict[str, Any], Tensor, Row]]:
        """All parameters with their group and their row of the plan."""
        rows = iter(self.plan.rows)
        return [(group, p, next(rows)) for group in self.param_groups for p in group["params"]]

    def _ready(self, given: list[tuple[dict[str, Any], Tensor, Row]]) -> tuple[list[Work], list[ShardedParam]]:
        """What is to be updated of some parameters: those with a gradient, looked at, and with state; and those that ranks share."""
        work, sharded = [], []
        if shardings := self._shardings():
            from .distributed import shards
            from .distributed import step as distributed
        for group, p, row in given:
            if id(p) in shardings:
                if p.requires_grad:  # another rank may have a gradient even if this one has none
                    sharded.append(shards.sharded_param(*shardings[id(p)], p, self._work(group, p, row), group["maximize"]))
            elif p.grad is not None and p.numel():
                work.append(self._work(group, p, row))
                if group["maximize"]:
                    work[-1].grad = -p.grad
            elif p.grad is not None and not self.state.get(p):
                allocate(row, p, self.state[p])  # nothing to update, yet checkpoints ask every parameter for state
        work, skipped = survey(work, self._options.nonfinite)
        if sharded:
            sharded, besides = distributed.survey(sharded, self._options)
            skipped += besides
        for item in work:
            item.state = self.state[item.param]
            if not item.state:
                allocate(item.row, item.param, item.state)
        for name in skipped:
            self.skipped[name] = self.skipped.get(name, 0) + 1
        return work, sharded

    def _update(self, work: list[Work], sharded: list[ShardedParam]) -> None:
        """Update what is ready."""
        engine.take_step(work, self._options, self._memory, self.failures)
        if sharded:
            from .distributed import step as distributed

            distributed.take_step(sharded, self.state, self._options, self._memory, self.failures)

    def _work(self, group: dict[str, Any], p: Tensor, row: Row) -> Work:
        grad = p.grad
        if grad is not None and grad.is_sparse:
            raise RuntimeError(
                f"'{row.entry.name}' has a sparse gradient, which subspaces cannot use; build the embedding with sparse=False"
            )
        state = self.state.get(p)  # not [p], which would leave an empty entry behind if nothing comes of it
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type == "cpu":
            lr = lr.item()
        return Work(
            row=row,
            param=p,
            grad=p if grad is None else grad,
            lr=lr * row.lr_scale,
            weight_decay=float(group["weight_decay"]) * row.decay_scale,
            refresh=group["refresh"] or row.entry.name in self.failures,
            count=engine.count(row.entry.name, state, self._memory) if state else 0,
        )

    def refresh_bases(self) -> None:
        """Have every selector take a new basis at the next step, whatever its schedule: a new task begins (arXiv:2504.07097)."""
        for group in self.param_groups:
            group["refresh"] = True

    # -------------------------------------------------------------------------------------------------------------- checkpoints

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state, by parameter and slot; of parameters that several ranks share, as DTensors: then call it on all of them."""
        shardings = self._shardings()
        if not shardings:
            return super().state_dict()
        from .distributed import shards

        own = self.state
        self.state = shards.export_state(shardings, own)
        try:
            return super().state_dict()
        finally:
            self.state = own

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: Any) -> None:
        """Load a state: dtypes are kept as saved, parameters are matched by name where names are known, and all is checked first.

        Raises:
            CheckpointError: the state is another spec's or another model's; nothing is changed then.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        readers = {}
        if shardings := self._shardings():
            from .distributed import shards

            readers = {key: shards.slot_reader(*pair) for key, pair in shardings.items()}
        state, groups = matched(state_dict, self.param_groups, self.plan, readers)
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("spec", "skipped", "failures", "_overrides", "_modules", "_strict", "_options")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # put in by torch's class: no option of ours, and it would go into later groups
        self._planned = self._placed = None
        self._memory = Memory()
        for own in ("_group", "_mesh_groups"):  # groups of processes cannot be copied or pickled
            setattr(self, own, getattr(self, own, None))


def _choice(name: str, value: Any, kind: Any) -> Any:
    if value not in kind.__args__:
        raise ValueError(f"{name} is '{value}'; {suggest(str(value), kind.__args__)}")
    return value


def _check_rates(group: Mapping[str, Any]) -> None:
    lr, decay = group.get("lr", 0.0), group.get("weight_decay", 0.0)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name, value in (("learning rate", lr), ("weight_decay value", decay)):
        number = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
        if not number or not math.isfinite(float(value)) or float(value) < 0:
            raise ValueError(f"Invalid {name}: {value}; it must be a finite number, 0 or more")


def build(
    spec: SpecLike,
    model_or_params: nn.Module | Params,
    *,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> SubspaceOptimizer:
    """An optimizer from a spec, for a model (whose modules then decide what is an embedding or a head) or for parameters.

    Example:
        >>> import torch, subspace_opt
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 16), torch.nn.Linear(16, 100))
        >>> optimizer = subspace_opt.build("cosmos", model, lr=2e-3, overrides={"matrix.selector.rank": 8})

    See `SubspaceOptimizer` for the options.
    """
    params, known = named_parameters(model_or_params)
    return SubspaceOptimizer(params, spec, lr=lr, weight_decay=weight_decay, overrides=overrides, **{**known, **options})


def named_parameters(model_or_params: nn.Module | Params) -> tuple[Params, dict[str, Any]]:
    """Parameters as an optimizer takes them, and of a model the kinds of their modules besides, as the option `modules`."""
    if not isinstance(model_or_params, nn.Module):
        return model_or_params, {}
    module = model_or_params
    known: dict[str, Any] = {}
    if isinstance(module, nn.parallel.DistributedDataParallel):
        known["process_group"] = module.process_group
        module = module.module
    refuse_flat(module)
    found = module_kinds(module)
    named = OrderedDict((canonical_name(name), p) for name, p in module.named_parameters())
    if not named:
        raise SpecError("the model has no parameters")
    known["modules"] = {name: found.get(id(p), frozenset()) for name, p in named.items()}
    return named.items(), known
