"""Questions about a spec in a real optimizer. Each is a function that raises `ConformanceError`. Some of them also check components."""

from __future__ import annotations

import copy
import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..algebra.pipeline import Pipeline
from ..engine.flags.watch import NonFiniteGradient
from ..optimizer import SubspaceOptimizer, build
from ..spec import Spec
from .models import Shapes, Small, stack
from .probe import ConformanceError

RANK, EVERY = 3, 3  # larger ranks and periods of a spec are reduced to these
UPDATES = 7  # three refreshes, at updates 1, 4 and 7


@dataclass(frozen=True)
class Trial:
    """A spec, and a function that makes the model to train with it."""

    spec: Spec
    model: Callable[[], nn.Module]

    def start(self, **options: Any) -> Run:
        """A fresh model and optimizer."""
        model = self.model()
        return Run(model, build(self.spec, model, **options))


@dataclass
class Run:
    """A model, its optimizer, and the number of steps so far."""

    model: nn.Module
    optimizer: SubspaceOptimizer
    count: int = 0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def step(self, *, missing: Sequence[str] = (), spoiled: Sequence[str] = (), noise: float = 0.0) -> None:
        """Make one update from gradients that depend on names and counts alone.

        Args:
            missing: Parameters without a gradient.
            spoiled: Parameters with a NaN in their gradient.
            noise: Relative noise of all gradients.
        """
        self.count += 1
        for name, p in self.parameters.items():
            p.grad = None if name in missing else _gradient(name, self.count, p)
            if noise and p.grad is not None:
                p.grad.addcmul_(p.grad, _gradient(f"{name}/noise", self.count, p), value=noise)
            if name in spoiled and p.grad is not None:
                p.grad.view(-1)[-1] = torch.nan
        self.optimizer.step()

    def picture(self) -> dict[str, Tensor]:
        """A copy of every parameter and state tensor."""
        found = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            found |= {f"{name}: {key}": value.clone() for key, value in self.optimizer.state.get(p, {}).items()}
        return found


def _gradient(name: str, count: int, like: Tensor) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(f"{name}/{count}".encode()).digest()[:4], "little")
    return stack(tuple(like.shape), like.dtype, seed)


def spec_of(pipeline: Pipeline) -> Spec:
    """The spec that sends every parameter through one pipeline."""
    return Spec.model_validate({"name": "trial", "pipelines": {"all": pipeline.model_dump()}, "routes": [{"use": "all"}]})


def of_pipeline(pipeline: Pipeline) -> Trial:
    """A trial of a pipeline on parameters of several shapes."""
    return Trial(spec_of(pipeline), Shapes)


def of_spec(spec: Spec) -> Trial:
    """A trial of a spec on a small model."""
    return Trial(spec, Small)


def shrunk(spec: Spec) -> Spec:
    """The spec with ranks and periods so small that a small model has a residual and sees several refreshes."""
    data = spec.model_dump(mode="json")
    for pipeline in data["pipelines"].values():
        _shrink(pipeline["selector"])
    try:
        return Spec.model_validate(data)
    except ValidationError:  # a selector may refuse these values; its spec stays unchanged
        return spec


def _shrink(selector: dict[str, Any]) -> None:
    for name, most in (("rank", RANK), ("every", EVERY), ("at", EVERY + 1)):
        value = selector.get(name)
        if isinstance(value, int | float) and value > most:
            selector[name] = most
    for part in selector.values():
        if isinstance(part, dict) and "kind" in part:
            _shrink(part)


def _unlike(a: dict[str, Tensor], b: dict[str, Tensor]) -> str | None:
    """The name of the first tensor in which two pictures differ; None if they are equal."""
    for name in sorted(set(a) ^ set(b)):
        return f"{name} (only one of the two has it)"
    return next((name for name in a if not torch.equal(a[name].nan_to_num(), b[name].nan_to_num())), None)


# ----------------------------------------------------------------------------------------------------------------- questions


def check_plan(trial: Trial) -> None:
    """The bytes of a plan made on the meta device are those of the allocated state, for each parameter and for all storages together."""
    run = trial.start()
    run.step()
    storages: dict[int, int] = {}
    planned = build(trial.spec, trial.model().to("meta")).plan
    for name, p in run.parameters.items():
        row = planned.by_name[name]
        tensors = {key: value for key, value in run.optimizer.state[p].items() if isinstance(value, Tensor)}
        allocated = sum(value.numel() * value.itemsize for value in tensors.values())
        storages |= {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in tensors.values()}
        if allocated != row.state_bytes:
            shown = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
            raise ConformanceError(f"'{name}' {row.entry.shape}: {row.state_bytes} bytes planned, {allocated} allocated: {shown}")
    total = sum(row.state_bytes for row in planned.rows)
    if sum(storages.values()) != total:
        raise ConformanceError(f"{total} bytes planned, {sum(storages.values())} allocated by the storages of the state")


def check_resume(trial: Trial) -> None:
    """A run that is saved after any update and continued by a new optimizer gives the same bits.

    The first cut goes through a file and runs to the end. Later ones run for two updates, because equal weights and state continue equally.
    All weights and all state are then compared.
    """
    whole = trial.start()
    saved, pictures = [], [whole.picture()]
    for _ in range(UPDATES):
        saved.append(copy.deepcopy({"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()}))
        whole.step()
        pictures.append(whole.picture())
    file = io.BytesIO()
    torch.save(saved[0], file)
    saved[0] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = trial.start()
    for cut, state in enumerate(saved):
        resumed.model.load_state_dict(state["model"])
        resumed.optimizer.load_state_dict(state["optimizer"])
        resumed.count = cut
        end = UPDATES if cut == 0 else min(cut + 2, UPDATES)
        for _ in range(cut, end):
            resumed.step()
        what = _unlike(pictures[end], resumed.picture())
        if what:
            raise ConformanceError(
                f"a run resumed after update {cut} ends with a different {what}; keep everything that outlives an update in a slot"
            )


def check_stacking(trial: Trial) -> None:
    """Matrices of one shape get the same updates together as one by one."""
    single, together, shaken = trial.start(stacking="never"), trial.start(stacking="always"), trial.start(stacking="never")
    for _ in range(UPDATES):
        single.step()
        together.step()
        shaken.step(noise=torch.finfo(next(trial.model().parameters()).dtype).eps)
    start = dict(trial.model().named_parameters())
    for name, p in single.parameters.items():
        gap = (p - together.parameters[name]).detach().abs().max()
        # Round-off alone may cause a large gap: it decides the eigenvectors of a covariance without full rank. `shaken` measures it.
        allowed = torch.finfo(p.dtype).eps ** 0.5 * (p - start[name]).abs().max() + 10 * (p - shaken.parameters[name]).abs().max()
        if not gap <= allowed + 1e-12:
            raise ConformanceError(
                f"'{name}' differs by {float(gap):.1e} when matrices of its shape are computed together; reduce over the last two "
                "dimensions only"
            )


@contextmanager
def _generators_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise ConformanceError("an update draws from the global random number generator")


def check_gradients_kept(trial: Trial) -> None:
    """A step only reads `p.grad`, and does not use the global random number generator."""
    run = trial.start()
    with _generators_untouched():
        for _ in range(4):
            run.step()
            for name, p in run.parameters.items():
                if p.grad is None or not torch.equal(p.grad, _gradient(name, run.count, p)):
                    raise ConformanceError(f"update {run.count} writes to the gradient of '{name}'")


def check_missing(trial: Trial) -> None:
    """A parameter without a gradient keeps its value and its state, and its next update is finite."""
    run = trial.start()
    names = list(run.parameters)[::2]
    for missing in (names, (), names, ()):
        before = run.picture()
        run.step(missing=missing)
        for key, value in run.picture().items():
            if key.partition(":")[0] in missing and not torch.equal(before[key].nan_to_num(), value.nan_to_num()):
                raise ConformanceError(f"'{key}' changes although its parameter has no gradient")
    for key, value in run.picture().items():
        if not value.isfinite().all():
            raise ConformanceError(f"'{key}' is not finite after updates in which its parameter had no gradient")


# ------------------------------------------------------------------------------------------------------------------ specs only


def check_loss(trial: Trial) -> None:
    """The loss of a small model falls at the spec's own learning rate."""
    run = trial.start(nonfinite="propagate")
    assert isinstance(run.model, Small)
    losses = []
    for _ in range(60):
        run.optimizer.zero_grad()
        loss = run.model.loss()
        loss.backward()
        run.optimizer.step()
        losses.append(float(loss.detach()))
    if not sum(losses[-5:]) / 5 < losses[0]:
        raise ConformanceError(f"the loss goes from {losses[0]:.4g} to {losses[-1]:.4g} in {len(losses)} updates; lower `defaults.lr`")


def check_nonfinite(trial: Trial) -> None:
    """A NaN in a gradient raises before anything changes; with `nonfinite: skip` only that parameter gets no update."""
    run = trial.start()
    run.step()
    spoiled = [next(iter(run.parameters))]
    before = run.picture()
    try:
        run.step(spoiled=spoiled)
    except NonFiniteGradient:
        if what := _unlike(before, run.picture()):
            raise ConformanceError(f"a NaN in a gradient raises after '{what}' was changed") from None
    else:
        raise ConformanceError("a NaN in a gradient raises no error")
    run = trial.start(nonfinite="skip")
    run.step()
    before = run.picture()
    run.step(spoiled=spoiled)
    after = run.picture()
    for key, value in after.items():
        if key.partition(":")[0] == spoiled[0] and not torch.equal(before[key], value):
            raise ConformanceError(f"with nonfinite='skip', '{key}' changes although its gradient holds NaN")
        if not value.isfinite().all():
            raise ConformanceError(f"with nonfinite='skip', '{key}' is not finite after a gradient with NaN")


def check_plan_as_it_is(trial: Trial) -> None:
    """The planned bytes are the allocated bytes, with the spec's own ranks and with small ones."""
    check_plan(trial)
    check_plan(_small(trial))


def _small(trial: Trial) -> Trial:
    return Trial(shrunk(trial.spec), trial.model)


def _when_small(question: Callable[[Trial], None]) -> Callable[[Trial], None]:
    """The same question about the spec with small ranks and periods."""

    @functools.wraps(question)
    def ask(trial: Trial) -> None:
        question(_small(trial))

    return ask


QUESTIONS: dict[str, Callable[[Trial], None]] = {
    "planned": check_plan_as_it_is,
    "resumed": _when_small(check_resume),
    "stacked": _when_small(check_stacking),
    "gradients_kept": _when_small(check_gradients_kept),
    "missing_gradients": _when_small(check_missing),
    "nonfinite_gradients": _when_small(check_nonfinite),
    "loss_falls": check_loss,
}
