"""An optimizer that updates every parameter as soon as its gradient is complete, so that the model's gradients never exist all at once.

The update is the ordinary one, parameter by parameter. Nothing in it depends on another parameter's gradient. Operations that do need all
gradients, such as clipping by their total norm, are impossible with this optimizer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .arguments import Params, SpecLike, named_parameters
from .engine.flags.watch import NonFiniteGradient
from .optimizer import SubspaceOptimizer
from .plan import Row

Place = tuple[dict[str, Any], Tensor, Row]


class BackwardOptimizer(SubspaceOptimizer):
    """A `SubspaceOptimizer` that makes its updates during `backward()`. `step()` ends the iteration. Made by `step_in_backward`."""

    def __init__(self, params: Params, spec: SpecLike = "cosmos", **options: Any) -> None:
        self._hooks: dict[int, tuple[Tensor, Any]] = {}  # by id; holding the parameter keeps its id from being used again
        self._places: dict[int, Place] | None = None  # during an iteration: group and row of every parameter, by id
        self._updated: set[int] = set()  # ids of the parameters updated in this iteration
        self._refreshing: list[bool] = []  # by group: whether this iteration makes the refresh that `refresh_bases` asked for
        self._listening = True
        self._lock = threading.Lock()  # gradients on several devices come from several threads
        super().__init__(params, spec, **options)

    # ------------------------------------------------------------------------------------------------------------- gradients

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Its parameters are updated during `backward()` too."""
        super().add_param_group(param_group)
        self._places = None
        self._listen()

    def _listen(self) -> None:
        """Register a hook on every parameter that requires a gradient and has no hook yet."""
        if not self._listening:
            return
        for p in (p for group in self.param_groups for p in group["params"] if p.requires_grad and id(p) not in self._hooks):
            hooks = (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
            if any(isinstance(getattr(hook, "__self__", None), BackwardOptimizer) for hook in hooks):
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is updated by another optimizer of step_in_backward already, and both would "
                    "update it; call the other's stop() first"
                )
            self._hooks[id(p)] = (p, p.register_post_accumulate_grad_hook(self._on_gradient))

    def stop(self) -> None:
        """Remove all hooks. From now on `step()` makes the updates, as in an ordinary optimizer."""
        self._listening = False
        for _, hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    @property
    def frees_gradients(self) -> bool:
        """True while `backward()` uses the gradients, so that none is left after a step."""
        return self._listening

    @torch._disable_dynamo  # a compiled training step may run this hook inside backward()
    def _on_gradient(self, p: Tensor) -> None:
        """Use the complete gradient of `p`, and free it."""
        with self._lock, torch.no_grad():
            place = self._iteration().get(id(p))
            if place is None:  # the parameter was removed from its group
                return
            name = place[2].entry.name
            if id(p) in self._updated:
                _refuse_second(name)
            try:
                work, sharded = self._ready([place])
            except NonFiniteGradient as error:
                raise NonFiniteGradient(
                    f"the gradient of {name} holds NaN or infinity and was not used, but {len(self._updated)} parameters whose gradients "
                    "came before it in this backward() have been updated. Resume from a checkpoint, or build with nonfinite='skip', which "
                    "leaves such parameters out of the step"
                ) from error
            self._updated.add(id(p))
            self._update(work, sharded)
            p.grad = None

    def _check_last_iteration(self) -> None:
        """Read the flags of the last iteration."""
        try:
            self.check()
        except NonFiniteGradient as error:
            raise NonFiniteGradient(
                f"{error}. Parameters whose gradients came before it in that backward() had been updated by then: resume from a checkpoint"
            ) from error

    def _iteration(self) -> dict[int, Place]:
        """Group and row of every parameter, by id. Looked up once per iteration."""
        if self._places is None:
            self._check_last_iteration()
            self._places = {id(place[1]): place for place in self._planned_parameters()}
            self._refreshing = [group["refresh"] for group in self.param_groups]
        return self._places

    # ------------------------------------------------------------------------------------------------------------------ step

    @torch._disable_dynamo
    def _advance(self) -> None:
        """End the iteration. Parameters that still have a gradient, because it was set by hand, are updated now."""
        places = self._iteration()
        for key in self._updated & places.keys():
            if places[key][1].grad is not None:
                _refuse_second(places[key][2].entry.name)
        # Distributed parameters take part on every rank, since another rank may have a gradient.
        shardings = self._shardings()
        left = [place for key, place in places.items() if key not in self._updated and (place[1].grad is not None or key in shardings)]
        work, sharded = self._ready(left)
        self._count_empty_steps(bool(self._updated or sharded) or any(place[1].grad is not None for place in left))
        for group, taken in zip(self.param_groups, self._refreshing, strict=True):
            group["refresh"] = group["refresh"] and not taken  # a refresh asked for during this iteration is for the next one
        self._places, self._updated = None, set()
        self._listen()  # a parameter may have been frozen before and require a gradient now
        self._update(work, sharded)

    # ----------------------------------------------------------------------------------------------------------------- copies

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "an optimizer of step_in_backward has hooks on its own parameters and cannot be copied or pickled; make another for the copy "
            "of the model, and load this one's state_dict() into it"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._places = None


def _refuse_second(name: str) -> NoReturn:
    raise RuntimeError(
        f"'{name}' got a second gradient before step(); the first has been used and freed, so gradients cannot be accumulated over several "
        "backward() calls. Call step() after each backward(), or sum the losses before one backward(), or accumulate with the ordinary "
        "optimizer (subspace_opt.build)"
    )


def step_in_backward(
    model: nn.Module | Params,
    spec: SpecLike = "cosmos",
    *,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> BackwardOptimizer:
    """An optimizer that updates every parameter during `backward()`, as soon as its gradient is complete, and then frees the gradient.

    Training loops and schedulers stay as they are: `step()` ends the iteration. The weights equal those of `build` with
    `stacking="never"` to the bit, since matrices of several parameters cannot be computed together here. An update uses the learning rate
    and weight decay at the time of `backward()`.

    - Gradients cannot be accumulated over several `backward()` calls: a second gradient before `step()` raises.
    - `clip_grad_norm_` and `GradScaler` come too late, since the gradients are freed by then. The first does nothing and returns 0. The
      rule `rms_clip` bounds each matrix by itself.
    - With `nonfinite="raise"`, parameters whose gradients came earlier have been updated when the error is raised.

    Example:
        >>> import torch, subspace_opt
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 16), torch.nn.Linear(16, 100))
        >>> optimizer = subspace_opt.step_in_backward(model, "cosmos", lr=2e-3, overrides={"matrix.selector.rank": 8})
        >>> model(torch.arange(100)).square().mean().backward()
        >>> optimizer.step()

    See `SubspaceOptimizer` for the options.

    Raises:
        ValueError: The model is wrapped in DistributedDataParallel, which averages gradients too late, or another optimizer of this kind
            has one of the parameters.
    """
    if isinstance(model, nn.Module) and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "DistributedDataParallel averages gradients after this optimizer would use them; use the ordinary "
            "optimizer (subspace_opt.build)"
        )
    params, known = named_parameters(model)
    return BackwardOptimizer(params, spec, lr=lr, weight_decay=weight_decay, overrides=overrides, **{**known, **options})
