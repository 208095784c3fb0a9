"""`SubspaceOptimizer`, a `torch.optim.Optimizer` made from a spec, and `build`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, overload

import torch
from torch import Tensor, nn

from . import arguments
from .algebra.pipeline import moment_fields
from .algebra.storage import StateDtype
from .arguments import Params, SpecLike, named_parameters
from .checkpoint import STATE_VERSION, matched
from .engine import lowbit
from .engine import step as engine
from .engine.capture import replay
from .engine.capture.clock import is_capturing
from .engine.flags.watch import NonFiniteGradient
from .engine.gradients import survey, work_of
from .engine.homes import Memory
from .engine.rounding import Rounding
from .engine.work import Nonfinite, Stacking, Work, allocate
from .plan import Plan, Role, Row
from .planned import PlannedOptimizer, engine_options
from .spec import RoleName, load_spec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .distributed.exchange import MeshGroups, RankGroup
    from .distributed.placement import Sharding
    from .distributed.shards import ShardedParam

EMPTY_STEPS = 3  # steps in a row without any gradient, before there is a warning


class SubspaceOptimizer(PlannedOptimizer):
    """An optimizer made from a spec.

    Args:
        params: Parameters, (name, parameter) pairs, or parameter groups. A group may have its own `lr`, `weight_decay`, `maximize`,
            `overrides` (dotted paths into the spec), `spec`, and `use` (the name of a pipeline, which overrides the routes). `momentum`
            is the decay rate of all first moments, and `betas` of first and second ones. `values` sets numbers of the spec by dotted path,
            such as `{"matrix.mix.complement": 0.5}`. All three may change at any step. A model stands for all its parameters.
        spec: A preset's name, a path to YAML or JSON, a mapping, or a `Spec`.
        lr, weight_decay: None takes the spec's defaults.
        overrides: Values by dotted path into the spec, such as `{"matrix.selector.rank": 128}`.
        state_dtype: How the rules' slots are stored, in all pipelines. One of `fp32`, `bf16`, `8bit`, `4bit` for all moments, or a mapping
            by slot, `{"exp_avg": "bf16", "exp_avg_sq": "8bit"}`. None leaves the choice to the spec.
        model: The model that holds the parameters. It tells names and roles, which groups made by other libraries lack.
        roles: Corrects roles: glob of parameter names to role, as `roles` in a spec, and before it.
        modules: Kinds of module by parameter name. `build` finds them in a model. Without them, routes with `module` match nothing.
        model_roles: Roles by parameter name. `build` finds them in a model. Without them, roles come from names and shapes.
        maximize: Maximize the objective.
        nonfinite: The policy for a gradient with NaN or infinity. `raise`: an error, and nothing changes. `skip`: the parameter is left out
            of this step and counted in `skipped`. `propagate`: the gradient is used. On a GPU the error and the count come with the next
            step, `state_dict()` or `check()`, so that no step waits.
        rounding: How a bf16 or fp16 parameter is rounded: `nearest`, `stochastic`, `kahan`.
        stacking: Whether matrices of one shape are computed together. `auto` decides by device and size.
        batch_bytes: Upper bound for one temporary of a stack.
        seed: Seed of all random draws, together with the parameter's key and the step. No global generator is used.
        strict: Raise if a route matches no parameter.
        process_group: Ranks that hold these parameters whole and have the same gradients, as under DistributedDataParallel. They divide
            the work and the state, and `state_dict()` is then a collective. Sharded parameters (FSDP2, tensor parallel) do not need it.
        capturable: Keep counters on the parameters' device, so that a CUDA graph can hold the step. `refreshes_next()` says which graph.

    Raises:
        SpecError: The spec cannot be used, no route accepts a parameter, or parameter groups without names leave the roles of matrices
            unknown that the spec's routes ask for.
        LowBitError: A slot is to be stored in 8 or 4 bits, and torchao cannot be imported.
        TypeError: An unknown option. The message says what to write instead.
        ValueError: A bad lr or weight decay, an unknown key in a group, a complex parameter, or two parameters with one name.
    """

    _model_roles: Mapping[str, Role] = MappingProxyType({})
    _planned: tuple[Any, Plan] | None = None
    _placed: tuple[Any, Plan, dict[int, tuple[RankGroup, Sharding]]] | None = None
    _mesh_groups: MeshGroups | None = None
    _process_group: ProcessGroup | None = None
    _empty_steps = 0  # in a row, until now
    _has_warned = False

    def __init__(
        self,
        params: nn.Module | Params,
        spec: SpecLike = "cosmos",
        *,
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        overrides: Mapping[str, Any] | None = None,
        state_dtype: StateDtype | Mapping[str, StateDtype] | None = None,
        model: nn.Module | None = None,
        roles: Mapping[str, RoleName] | None = None,
        modules: Mapping[str, frozenset[str]] | None = None,
        model_roles: Mapping[str, Role] | None = None,
        maximize: bool = False,
        nonfinite: Nonfinite = "raise",
        rounding: Rounding = "nearest",
        stacking: Stacking = "auto",
        batch_bytes: int = 64 * 2**20,
        seed: int = 0,
        strict: bool = False,
        process_group: ProcessGroup | None = None,
        capturable: bool = False,
        **unknown: NoReturn,
    ) -> None:
        self._overrides = dict(overrides or {})
        params, known = arguments.with_model(params, model)
        self._modules, self._model_roles = dict(modules or known.get("modules", {})), dict(model_roles or known.get("model_roles", {}))
        self._strict = strict
        self._options = engine_options(nonfinite, rounding, stacking, batch_bytes, seed, capturable)
        self._memory = Memory.of(self._options)
        self._process_group = process_group or known.get("process_group")
        self.skipped: dict[str, int] = {}
        self.failures: dict[str, int] = {}
        self.spec = load_spec(spec, self._overrides)
        arguments.refuse_options(unknown, self.spec, OPTIONS)
        self.spec = arguments.with_options(self.spec, roles, state_dtype)
        usual = self.spec.defaults
        rates = {"lr": usual.lr if lr is None else lr, "weight_decay": usual.weight_decay if weight_decay is None else weight_decay}
        arguments.check_rates(rates)
        own = {"spec": self.spec.to_json(), "use": None, "refresh": False, "state_version": STATE_VERSION}
        # Schedulers look for `momentum` here. None: as in the spec.
        moments = {"momentum": None} if any(moment_fields(pipeline).first for pipeline in self.spec.pipelines.values()) else {}
        super().__init__(params, {**rates, **moments, "maximize": maximize, **own})
        # With `strict`, a route that matches no parameter raises here.
        self._check_roles(roles or {}, in_groups=isinstance(next(iter(params)), dict))

    # ---------------------------------------------------------------------------------------------------------------- sharding

    def _shardings(self) -> dict[int, tuple[RankGroup, Sharding]]:
        """The rank group and sharding of every distributed parameter, by `id`. Made again if the plan or a placement has changed."""
        params = [p for group in self.param_groups for p in group["params"]]
        if self._process_group is None and not any(hasattr(p, "device_mesh") for p in params):
            return {}
        plan = self.plan
        key = tuple((id(p), p.shape, getattr(p, "placements", None)) for p in params)
        if self._placed is None or self._placed[:2] != (key, plan):
            sizes = [len(group["params"]) for group in self.param_groups]
            from .distributed import exchange, shards  # late: importing PyTorch's distributed tensors takes half a second

            self._mesh_groups = self._mesh_groups or exchange.MeshGroups()
            self._placed = (key, plan, shards.find_shardings(params, plan.rows, sizes, self._process_group, self._mesh_groups))
        return self._placed[2]

    # -------------------------------------------------------------------------------------------------------------------- step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._advance()
        return loss

    @torch._disable_dynamo  # under torch.compile, a step runs as ordinary code between two graphs
    def _advance(self) -> None:
        """Make the updates of one step."""
        self.check()
        work, sharded = self._ready(self._planned_parameters())
        self._count_empty_steps(bool(sharded) or any(p.grad is not None for group in self.param_groups for p in group["params"]))
        for group in self.param_groups:
            group["refresh"] = False
        self._update(work, sharded)

    def _count_empty_steps(self, has_gradient: bool) -> None:
        """Warn once if several steps in a row find no gradient. For distributed parameters that means: on no rank."""
        self._empty_steps = 0 if has_gradient else self._empty_steps + 1
        if self._empty_steps == EMPTY_STEPS and not self._has_warned and any(group["params"] for group in self.param_groups):
            self._has_warned = True
            arguments.warn_of_no_gradient(EMPTY_STEPS)

    def _ready(self, given: list[tuple[dict[str, Any], Tensor, Row]]) -> tuple[list[Work], list[ShardedParam]]:
        """Inspect gradients and allocate state.

        Returns:
            The parameters to update: first those that only this rank holds, then those that ranks share.
        """
        work, sharded = [], []
        if shardings := self._shardings():
            from .distributed import shards
            from .distributed import step as distributed
        for group, p, row in given:
            if id(p) in shardings:
                if p.requires_grad:  # other ranks may have a gradient, so all ranks join
                    sharded.append(shards.sharded_param(*shardings[id(p)], p, self._work(group, p, row), group["maximize"]))
            elif p.grad is not None and p.numel():
                work.append(self._work(group, p, row))
                if group["maximize"]:
                    work[-1].grad = -p.grad
            elif p.grad is not None and not self.state.get(p):
                allocate(
                    row, p, self.state[p], capturable=self._options.capturable
                )  # an empty parameter: nothing to update, but checkpoints expect state
        if is_capturing():
            replay.check_capture(work, capturable=self._options.capturable, sharded=bool(sharded))
        work, skipped = survey(work, self._options.nonfinite, None if sharded else self._memory.watch)
        if sharded:
            sharded, besides = distributed.survey(sharded, self._options)
            skipped += besides
        for item in work:
            item.state = self.state[item.param]
            if not item.state:
                allocate(item.row, item.param, item.state, capturable=self._options.capturable)
        for name in skipped:
            self.skipped[name] = self.skipped.get(name, 0) + 1
        return work, sharded

    def _update(self, work: list[Work], sharded: list[ShardedParam]) -> None:
        """Update parameters that are ready."""
        engine.take_step(work, self._options, self._memory, self.failures)
        if sharded:
            from .distributed import step as distributed

            distributed.take_step(sharded, self.state, self._options, self._memory, self.failures)

    def _work(self, group: dict[str, Any], p: Tensor, row: Row) -> Work:
        given = self.values_of(group)
        return work_of(group, p, row, self.state.get(p), given, self._memory, self.failures, capturable=self._options.capturable)

    def refresh_bases(self) -> None:
        """Make every selector take a new basis at the next step, outside its schedule, as when a new task begins (arXiv:2504.07097)."""
        for group in self.param_groups:
            group["refresh"] = True

    def check(self) -> None:
        """Read the flags that earlier steps left on a device, and bring `skipped`, `failures` and the counters in the state up to date.

        On a device other than a CPU no step waits to learn that a gradient is not finite: the flag alone keeps the weights from changing.
        The next `step()`, `state_dict()` and this method read it. It waits for the flags, not for later work of the device.

        Raises:
            NonFiniteGradient: with `nonfinite="raise"`; weights and state are those of before that step.
        """
        if is_capturing():
            return
        try:
            self._memory.watch.settle(self.state, self.skipped, self.failures)
        except NonFiniteGradient:
            self._memory.forget_counts()  # replays may have been gated
            raise

    def refreshes_next(self) -> bool:
        """True if the next step takes a new basis, or a parameter has not begun: a graph of a step without a refresh does not fit it."""
        return replay.refreshes_next(self._planned_parameters(), self.state, self._memory, self.failures)

    def count_replay(self) -> None:
        """Note that a captured step was replayed. The counters on the device count by themselves; `refreshes_next` needs those of the host.

        Raises:
            RuntimeError: No step has been captured.
        """
        replay.count_replay(self._planned_parameters(), self.state, self._memory)

    # -------------------------------------------------------------------------------------------------------------- checkpoints

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state by parameter and slot. State that ranks share is returned as DTensors; call it on all ranks then.

        Raises:
            NonFiniteGradient: as `check`.
        """
        self.check()
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
        """Load a state. Slots keep their saved dtypes, and parameters take the saved keys.

        Parameters are matched by name if both sides have names, else by position.

        Raises:
            CheckpointError: The state belongs to another spec or another model. The optimizer is then unchanged.
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
        self.check()
        own = ("spec", "skipped", "failures", "_overrides", "_modules", "_model_roles", "_strict", "_options")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch's class adds it; it is not an option here, and later groups would get it
        self._planned = self._placed = None
        self._memory = Memory.of(self._options)
        self._move_counters()
        if any(lowbit.found(value) for slots in self.state.values() for value in slots.values()):
            lowbit.torchao_types()  # so that codes which were unpickled can be cloned


OPTIONS = tuple(SubspaceOptimizer.__init__.__kwdefaults__ or ())


def build(
    spec: SpecLike,
    model_or_params: nn.Module | Params,
    *,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    diagnostics: int | Mapping[str, Any] | None = None,
    **options: Any,
) -> SubspaceOptimizer:
    """An optimizer from a spec, for a model or for parameters. A model tells the role of each parameter.

    Example:
        >>> import torch, subspace_opt
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 16), torch.nn.Linear(16, 100))
        >>> optimizer = subspace_opt.build("cosmos", model, lr=2e-3, overrides={"matrix.selector.rank": 8})

    See `SubspaceOptimizer` for the options. `diagnostics`: sample every layer's subspace each so many steps, or a mapping of the options of
    `subspace_opt.diagnostics.observe`; the newest sample is `optimizer.diagnostics.last`.
    """
    params, known = named_parameters(model_or_params)
    given = {**known, **options}
    return SubspaceOptimizer(params, spec, lr=lr, weight_decay=weight_decay, overrides=overrides, **given)._observed(diagnostics)
