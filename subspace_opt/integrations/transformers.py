"""Hugging Face Trainer: `SubspaceTrainer`, a mixin for other trainers, a factory for a plain Trainer, and a callback that measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..arguments import SpecLike, counterparts, named_parameters
from ..optimizer import SubspaceOptimizer
from ..spec import Spec, load_spec
from .libraries import needed
from .measures import UpdateSizes, captured_energy, means
from .option_strings import read_options

needed("transformers", "transformers", at_least="4.50")
needed("accelerate", "transformers", at_least="1.0")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402 -- after the versions

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


def optimizer_for(
    trainer_or_model: Trainer | nn.Module,
    args: TrainingArguments | None = None,
    spec: SpecLike = "cosmos",
    *,
    model: nn.Module | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> SubspaceOptimizer:
    """An optimizer from a spec that follows `TrainingArguments`.

    Learning rate and weight decay come from the arguments, and the decay is that of the parameters in Trainer's own list. `adam_beta1`,
    `adam_beta2` and `adam_epsilon` change the spec only if they differ from the arguments' defaults. `optim_args` holds overrides.

    Args:
        trainer_or_model: A trainer, whose model and list of decayed parameters are used, or a model.
        args: None takes the trainer's.
        model: The model, if it is not the trainer's.
        lr, weight_decay: None takes the arguments' values, never the spec's defaults.
        overrides: Values by dotted path into the spec. They come before those of `optim_args`, and these before the `adam_` arguments.
        options: Options of `SubspaceOptimizer`.

    Raises:
        ValueError: An argument that the optimizer would ignore.
        TypeError: An unknown key in `optim_args`.
    """
    trainer: Any = trainer_or_model if isinstance(trainer_or_model, Trainer) else None
    args = args or getattr(trainer, "args", None)
    if args is None:
        raise TypeError("optimizer_for(model, args, spec) needs the TrainingArguments; without them use subspace_opt.build(spec, model)")
    _refuse(args, options)
    given: nn.Module = model or (trainer.model if trainer else trainer_or_model)
    model = given.module if isinstance(given, nn.parallel.DistributedDataParallel) else given
    # The list does not depend on an instance of the class.
    decayed = set(trainer.get_decay_parameter_names(model) if trainer else Trainer.get_decay_parameter_names(None, model))
    loaded = load_spec(spec)
    in_text, more = read_options(args.optim_args, loaded)
    _, known = named_parameters(model)
    decay = args.weight_decay if weight_decay is None else weight_decay
    return SubspaceOptimizer(
        _groups(model, decayed, decay),
        spec,
        lr=args.learning_rate if lr is None else lr,
        weight_decay=decay,
        overrides={**_adam_overrides(args, loaded), **in_text, **(overrides or {})},
        **{**known, **more, **options},
    )


class OptimizerFactory:
    """For a plain Trainer: `optimizer_cls_and_kwargs=(OptimizerFactory, {"args": args, "spec": "cosmos"})`.

    Trainer makes an instance and calls it with the model, so the names of parameters, their roles and the decay groups are known.

    Raises:
        TypeError: The Trainer is older than this protocol, and takes the factory for the class of an optimizer.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        if given or options:
            raise TypeError("this version of transformers knows no factories of optimizers; upgrade it, or use SubspaceTrainer")

    def __call__(self, model: nn.Module, *, args: TrainingArguments, spec: SpecLike = "cosmos", **options: Any) -> SubspaceOptimizer:
        """The optimizer of `optimizer_for`."""
        return optimizer_for(model, args, spec, **options)


class SubspaceMixin:
    """Gives a trainer an optimizer from a spec: `class MyTrainer(SubspaceMixin, Trainer)`.

    Args:
        spec: A preset's name, a path to YAML or JSON, a mapping, or a `Spec`.
        optimizer_options: Keyword arguments of `optimizer_for`, such as `{"overrides": {"matrix.selector.rank": 64}}`.

    Raises:
        ValueError: The trainer is given another optimizer too.
    """

    def __init__(self, *args: Any, spec: SpecLike, optimizer_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._spec, self._optimizer_options = spec, dict(optimizer_options or {})
        super().__init__(*args, **kwargs)
        if self.optimizer is not None or getattr(self, "optimizer_cls_and_kwargs", None) is not None:
            raise ValueError("the trainer is given a spec and another optimizer; leave out `optimizers` and `optimizer_cls_and_kwargs`")

    optimizer: Any

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer from the spec and the training arguments, unless there is one."""
        if self.optimizer is None:
            trainer: Any = self
            self.optimizer = optimizer_for(trainer, trainer.args, self._spec, model=model, **self._optimizer_options)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the values that a `SubspaceMetrics` has measured since the last log."""
        trainer: Any = self
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, SubspaceMetrics):
                logs |= callback.taken()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class SubspaceTrainer(SubspaceMixin, Trainer):
    """`transformers.Trainer` with an optimizer from a spec."""


class SubspaceMetrics(TrainerCallback):
    """Adds to Trainer's logs how much of the gradients the subspaces capture, and how large the updates are.

    `captured_energy/<pipeline>` is the mean share of a gradient's squared norm inside its subspace. `update_size/<pipeline>` is the norm of
    the weights' change relative to the weights. Both belong to the last measured update.

    Args:
        every: Updates between two measurements; None measures the updates that Trainer logs (`logging_steps`).
        energy: Measure captured energy. Impossible with sharded parameters.
        update_sizes: Measure the sizes of updates. It copies all trained weights during a measured update.
    """

    def __init__(self, every: int | None = None, *, energy: bool = True, update_sizes: bool = True) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every is {every}; give a number of updates, 1 or more, or None for those that Trainer logs")
        self.every, self.energy, self.update_sizes = every, energy, update_sizes
        self._measured: dict[str, float] = {}
        self._sizes: UpdateSizes | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the updates to measure are known in advance."""
        if self.every is None and args.logging_strategy != "steps":
            raise ValueError(
                f"logging_strategy is '{args.logging_strategy.value}', so say which updates to measure: SubspaceMetrics(every=10)"
            )

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the weights of an update that is measured."""
        if self.update_sizes and self._is_due(args, state):
            self._sizes = UpdateSizes(_inner(kwargs["optimizer"]))

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the update."""
        if not self._is_due(args, state):
            return
        optimizer = _inner(kwargs["optimizer"])
        if self.energy:
            found = means(captured_energy(optimizer), optimizer)
            self._measured |= {f"captured_energy/{pipeline}": value for pipeline, value in found.items()}
        if self._sizes is not None:
            self._measured |= {f"update_size/{pipeline}": value for pipeline, value in self._sizes.by_pipeline().items()}
            self._sizes = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Add the values to the log of a trainer that is no `SubspaceMixin`. Callbacks before this one have seen the log without them."""
        taken = self.taken()
        if logs is not None:
            logs |= taken
        state.log_history[-1] |= taken

    def taken(self) -> dict[str, float]:
        """The values measured since the last call."""
        measured, self._measured = self._measured, {}
        return measured

    def _is_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        """True if the present update is measured."""
        number = state.global_step + 1
        is_first = self.every is None and args.logging_first_step and number == 1
        return bool(is_first or number % int(self.every or state.logging_steps) == 0)


def _inner(optimizer: Any) -> SubspaceOptimizer:
    """The optimizer inside Accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, SubspaceOptimizer):
        raise TypeError(f"SubspaceMetrics measures a SubspaceOptimizer, and the trainer has {type(inner).__name__}; use SubspaceTrainer")
    return inner


# ------------------------------------------------------------------------------------------------------------------ arguments


def _groups(model: nn.Module, decayed: set[str], decay: float) -> list[dict[str, Any]]:
    """The trained parameters with their names, in a group with weight decay and one without."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with_decay = [(name, p) for name, p in trained if name in decayed]
    without = [(name, p) for name, p in trained if name not in decayed]
    return [{"params": some, "weight_decay": rate} for some, rate in ((with_decay, decay), (without, 0.0)) if some]


def _refuse(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Raise a ValueError for what would be ignored, or would stop a run when Trainer saves."""
    if args.optim != _default(args, "optim"):
        optim = getattr(args.optim, "value", args.optim)
        raise ValueError(f"optim='{optim}' chooses another optimizer than the spec; leave it out")
    if args.optim_target_modules is not None:
        raise ValueError("optim_target_modules is not used: the spec's routes choose the matrices; correct them with `roles`")
    if options.get("process_group") is not None:
        raise ValueError(
            "process_group divides the state over ranks, and Trainer saves it on one rank only; leave it out, or use FSDP2, which divides "
            "the state too"
        )


def _adam_overrides(args: TrainingArguments, spec: Spec) -> dict[str, Any]:
    """The fields of the spec that correspond to those `adam_` arguments that are not at their defaults."""
    found: dict[str, Any] = {}
    for name in ADAM:
        value = getattr(args, name)
        if value == _default(args, name):
            continue
        paths = dict(counterparts(name, value, spec))
        if not paths:
            raise ValueError(f"{name}={value}: no rule of spec '{spec.name}' has such a field; leave it out")
        found |= paths
    return found


def _default(args: TrainingArguments, name: str) -> Any:
    """The default of an argument in the class of `args`."""
    return next(field.default for field in dataclasses.fields(args) if field.name == name)
