"""torchtitan: an `OptimizersContainer` whose optimizers come from a spec, with flat state dictionaries and several model parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..arguments import named_parameters
from ..optimizer import SubspaceOptimizer
from .libraries import needed

needed("torchtitan", "torchtitan", "0.3")

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig  # noqa: E402

SUBSPACE = "Subspace"  # the `optimizer_name` of parameter groups that the spec optimizes
IMPLEMENTATION = ("fused", "foreach")  # keys that torchtitan puts into every group, for torch's own optimizers


class SubspaceOptimizersContainer(OptimizersContainer):
    """A torchtitan container with one `SubspaceOptimizer` for each model part.

    Names, roles and kinds of modules come from the model parts. `state_dict` and `load_state_dict` use torchtitan's flat layout, in which
    every entry has the name of its parameter, so a checkpoint also loads with another number of parts or ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        spec: str = "cosmos"
        """A preset's name, or the path of a YAML or JSON file."""

        lr: float | None = None
        """Learning rate. None takes the spec's default."""

        weight_decay: float | None = None
        """Weight decay. None takes the spec's default."""

        overrides: dict[str, Any] = field(default_factory=dict)
        """Values by dotted path into the spec, such as {"matrix.selector.rank": 128}."""

        options: dict[str, Any] = field(default_factory=dict)
        """Further options of `SubspaceOptimizer`, such as {"state_dtype": "bf16", "seed": 1}."""

        param_groups: list[ParamGroupConfig] = field(default_factory=lambda: [ParamGroupConfig(pattern=".*", optimizer_name=SUBSPACE)])
        """Groups by pattern. Groups with `optimizer_name="Subspace"` use the spec, and their `optimizer_kwargs` are keys of a parameter
        group, such as {"weight_decay": 0.0} or {"use": "other"}. Other names are those of torchtitan, such as "AdamW".
        """

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self._spec = config
        by_name: dict[str, dict[str, Any]] = {"modules": {}, "model_roles": {}}
        self._known: dict[str, Any] = dict(by_name)
        for part in model_parts:
            _, known = named_parameters(part)
            for option, found in by_name.items():
                found.update(known.pop(option))
            self._known.update(known)  # under DistributedDataParallel: its process group
        super().__init__(config, model_parts=model_parts)

    def _resolve_optimizer_factory(self, name: str) -> Callable[..., Optimizer]:
        return self._create if name == SUBSPACE else super()._resolve_optimizer_factory(name)

    def _create(self, groups: list[dict[str, Any]], **options: Any) -> SubspaceOptimizer:
        """The optimizer of one model part."""
        own = [{key: value for key, value in group.items() if key not in IMPLEMENTATION} for group in groups]
        given = {"lr": self._spec.lr, "weight_decay": self._spec.weight_decay, "overrides": self._spec.overrides, **self._spec.options}
        optimizer = SubspaceOptimizer(own, self._spec.spec, **{**self._known, **given, **options})
        optimizer.register_load_state_dict_pre_hook(_with_names)
        return optimizer


def _with_names(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state with the names of this optimizer's groups.

    torchtitan leaves them out of the groups that it rebuilds in the optimizer's own order. Without names the parameters would get other
    keys, and then other random draws.
    """
    pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    return {**state_dict, "param_groups": [{"param_names": own["param_names"], **saved} for saved, own in pairs]}
