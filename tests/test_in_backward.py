"""Updates during `backward()`: do they give the ordinary bits in less memory, and are impossible settings refused?"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import PRESETS, flat, small
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.functional import cross_entropy

from subspace_opt import BackwardOptimizer, NonFiniteGradient, SubspaceOptimizer, build, load_spec, step_in_backward
from subspace_opt.lab.run.measure import peak_temporaries

WORDS, WIDTH, STEPS = 13, 12, 8
Make = Callable[..., SubspaceOptimizer]


class Net(nn.Module):
    """A model with an embedding, a stack of experts, layers of two orientations, a norm and a scalar. With `tied`, the head is the
    embedding.
    """

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.experts = nn.Parameter(torch.empty(2, WIDTH, WIDTH))
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.ones(()))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / WIDTH**0.5
        self.to(dtype)

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.embedding(words))
        x = x + self.down(self.up(x).relu())
        mixed = torch.stack([x @ self.experts[0], x @ self.experts[1]]).sum(0)
        logits: Tensor = self.head(x + self.scale * mixed)
        return logits


def loss_of(model: nn.Module, step: int) -> Tensor:
    words = torch.randint(WORDS, (32,), generator=torch.Generator().manual_seed(step))
    return cross_entropy(model(words).float(), (words * 5 + 1) % WORDS)


def ordinary(model: Any, spec: Any, **options: Any) -> SubspaceOptimizer:
    return build(spec, model, stacking="never", **options)


def in_backward(model: Any, spec: Any, **options: Any) -> SubspaceOptimizer:
    return step_in_backward(model, spec, stacking="never", **options)


BOTH = {"ordinary": ordinary, "in backward": in_backward}


def everything(model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()} | {k: v.clone() for k, v in flat(opt)}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])] == []


def trained(make: Make, run: Callable[[nn.Module, SubspaceOptimizer], None], spec: Any, tied: bool = False, **options: Any) -> Any:
    model = Net(tied, options.pop("dtype", torch.float32))
    opt = make(model, spec, **options)
    run(model, opt)
    return everything(model, opt)


def plainly(model: nn.Module, opt: torch.optim.Optimizer, steps: range = range(STEPS)) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.step()


# ---------------------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("preset", PRESETS)
def test_the_weights_are_those_of_the_ordinary_optimizer(preset: str) -> None:
    assert_same(*(trained(make, plainly, small(preset), weight_decay=0.1) for make in BOTH.values()))


@pytest.mark.parametrize("preset", ["cosmos", "galore", "adamw", "muon"])
@pytest.mark.parametrize(
    "options",
    [
        {"tied": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3},
        {"dtype": torch.bfloat16, "rounding": "kahan"},
        {"maximize": True},
        {"lr": torch.tensor(1e-3)},
        {"state_dtype": "bf16"},
    ],
    ids=str,
)
def test_so_they_are_with_every_option(preset: str, options: dict[str, Any]) -> None:
    assert_same(*(trained(make, plainly, small(preset), **options) for make in BOTH.values()))


@pytest.mark.parametrize("preset", ["cosmos", "galore", "adamw"])
def test_with_parameters_that_are_frozen_and_thawed(preset: str) -> None:
    def run(model: nn.Module, opt: SubspaceOptimizer) -> None:
        for step in range(9):
            model.up.weight.requires_grad_(step >= 3)  # from the beginning, so that its first gradient comes late
            model.down.weight.requires_grad_(not 4 <= step < 6)
            plainly(model, opt, range(step, step + 1))
            opt.zero_grad()

    found = []
    for make in BOTH.values():
        model = Net()
        model.up.weight.requires_grad_(False)
        opt = make(model, small(preset))
        run(model, opt)
        found.append(everything(model, opt))
        assert float(opt.state[model.up.weight]["step"]) == 6
    assert_same(*found)


@pytest.mark.filterwarnings("ignore:spec .* routes parameters by role")
@pytest.mark.parametrize("preset", ["cosmos", "galore", "muon"])
def test_with_groups_and_a_schedule(preset: str) -> None:
    found = []
    for make in BOTH.values():
        model = Net()
        groups = [
            {"params": [("up", model.up.weight), ("experts", model.experts)], "lr": 0.02, "weight_decay": 0.5},
            {"params": [("head", model.head.weight)], "use": "other", "maximize": True},
        ]
        opt = make(groups, small(preset))
        opt.add_param_group({"params": [("down", model.down.weight)]})
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=[0.02, 0.01, 0.03], total_steps=STEPS + 1, cycle_momentum=False)
        rates = []
        for step in range(STEPS):
            plainly(model, opt, range(step, step + 1))
            model.zero_grad()
            schedule.step()
            rates.append([group["lr"] for group in opt.param_groups])
        found.append(everything(model, opt) | {"rates": torch.tensor(rates)})
    assert_same(*found)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_cut_goes_on_to_the_bit_and_checkpoints_are_the_same(preset: str) -> None:
    """Each kind of optimizer loads the other's checkpoint."""
    model = Net()
    opt = in_backward(model, small(preset))
    plainly(model, opt, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    plainly(model, opt, range(4, STEPS))
    for make in BOTH.values():
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = Net()
        twin = make(again, small(preset))
        plainly(again, twin, range(2))
        again.load_state_dict(saved["model"])
        twin.load_state_dict(saved["optimizer"])
        plainly(again, twin, range(4, STEPS))
        assert_same(everything(again, twin), everything(model, opt))


def test_torchs_distributed_checkpoint_reads_and_fills_it() -> None:
    """It sets gradients by hand and steps, in order to fill a fresh optimizer."""
    model, again = Net(), Net()
    opt, twin = step_in_backward(model, small("cosmos")), step_in_backward(again, small("cosmos"))
    plainly(model, opt, range(4))
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, twin, get_optimizer_state_dict(model, opt))
    plainly(model, opt, range(4, 7))
    plainly(again, twin, range(4, 7))
    assert_same(everything(again, twin), everything(model, opt))


@pytest.mark.parametrize("when", ["before backward", "before step", "after step"])
def test_a_refresh_that_was_asked_for_is_made_once(when: str) -> None:
    """The refresh runs in the next backward, also if it was requested after one."""
    model = Net()
    opt = step_in_backward(model, load_spec(small("galore"), {"matrix.selector.every": 100}))
    seen = []
    for step in range(6):
        if step == 3 and when == "before backward":
            opt.refresh_bases()
        loss_of(model, step).backward()
        if step == 2 and when == "before step":
            opt.refresh_bases()
        opt.step()
        if step == 2 and when == "after step":
            opt.refresh_bases()
        seen.append(opt.state[model.up.weight]["selector.basis"].clone())
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [False, False, True, False, False]


def test_a_closure_is_an_iteration() -> None:
    def run(model: nn.Module, opt: SubspaceOptimizer) -> None:
        for step in range(4):

            def closure(step: int = step) -> float:
                opt.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return float(loss.detach())

            assert opt.step(closure) > 0

    assert_same(*(trained(make, run, small("cosmos")) for make in BOTH.values()))


def test_gradients_set_by_hand_are_used_by_step() -> None:
    def run(model: nn.Module, opt: SubspaceOptimizer) -> None:
        for step in range(3):
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.1 * (step + i + 1))
            opt.step()
            assert all(p.grad is not None for p in model.parameters())  # as an ordinary optimizer leaves them

    assert_same(*(trained(make, run, small("muon")) for make in BOTH.values()))


def test_explain_is_that_of_the_ordinary_optimizer() -> None:
    a, b = (make(Net(), "cosmos").explain() for make in BOTH.values())
    assert str(a) == str(b)


# ------------------------------------------------------------------------------------------------------------------------ memory


def test_no_gradient_is_left_after_backward() -> None:
    model = Net()
    opt = step_in_backward(model, "cosmos")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n == "up.weight")  # it has been used
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt.step()
    assert_same(after, {n: p.detach() for n, p in model.named_parameters()})


@pytest.mark.parametrize("preset", ["cosmos", "galore", "adamw", "muon"])
def test_gradients_never_exist_together(preset: str) -> None:
    """In sixteen equal layers, the memory of a step beside weights and state falls by nearly all gradients."""
    layers, width = 16, 128
    gradients = layers * width * width * 4
    held = {}
    for name, make in BOTH.items():
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        opt = make(model, load_spec(preset, {"matrix.selector.rank": 8} if preset in ("cosmos", "galore") else None))
        x = torch.ones(2, width)

        def step(model: nn.Module = model, opt: SubspaceOptimizer = opt, x: Tensor = x) -> None:
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()

        step()
        held[name] = peak_temporaries(step, torch.device("cpu"))
    assert held["ordinary"] > gradients
    assert held["in backward"] < held["ordinary"] - 0.8 * gradients


# ---------------------------------------------------------------------------------------------------------------------- refusals


def test_a_second_gradient_is_refused() -> None:
    model = Net()
    opt = step_in_backward(model, "cosmos")
    loss_of(model, 0).backward()
    after = everything(model, opt)
    with pytest.raises(
        RuntimeError, match=r"'head.weight' got a second gradient before step\(\).*cannot be accumulated.*subspace_opt.build"
    ):
        loss_of(model, 1).backward()
    assert_same(after, everything(model, opt))
    with pytest.raises(RuntimeError, match=r"'head.weight' got a second gradient"):  # it is still there
        opt.step()
    opt.zero_grad()
    opt.step()
    loss_of(model, 2).backward()
    opt.step()
    assert float(opt.state[model.head.weight]["step"]) == 2


def test_losses_summed_before_one_backward_are_an_accumulation() -> None:
    def run(model: nn.Module, opt: SubspaceOptimizer) -> None:
        for step in range(3):
            opt.zero_grad()
            (loss_of(model, 2 * step) + loss_of(model, 2 * step + 1)).backward()
            opt.step()

    assert_same(*(trained(make, run, small("cosmos")) for make in BOTH.values()))


def test_a_gradient_that_is_no_number_is_told_with_what_was_done() -> None:
    model = Net()
    opt = step_in_backward(model, "cosmos")
    plainly(model, opt, range(2))
    before = everything(model, opt)
    model.up.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(
        NonFiniteGradient, match=r"the gradient of up.weight holds NaN.* but \d+ parameters .* have been updated.*nonfinite='skip'"
    ):
        loss_of(model, 2).backward()
    assert torch.equal(before["up.weight"], model.up.weight)
    assert not torch.equal(before["head.weight"], model.head.weight)


def test_skip_leaves_one_parameter_alone() -> None:
    def run(model: nn.Module, opt: SubspaceOptimizer) -> None:
        hook = model.up.weight.register_hook(lambda grad: grad * float("nan") if model.scale.requires_grad else grad)
        plainly(model, opt, range(2))
        hook.remove()
        plainly(model, opt, range(2, 5))
        assert opt.skipped == {"up.weight": 2}

    assert_same(*(trained(make, run, small("cosmos"), nonfinite="skip") for make in BOTH.values()))


def test_clipping_by_the_norm_of_all_gradients_sees_none() -> None:
    """The documentation says so."""
    model = Net()
    opt = step_in_backward(model, "cosmos")
    loss_of(model, 0).backward()
    assert float(nn.utils.clip_grad_norm_(model.parameters(), 1e-6)) == 0.0
    opt.step()


def test_two_of_them_on_one_model_are_refused_until_the_first_stops() -> None:
    model = Net()
    first = step_in_backward(model, "cosmos")
    with pytest.raises(ValueError, match=r"is updated by another optimizer of step_in_backward already.*call the other's stop\(\) first"):
        step_in_backward(model, "galore")
    first.stop()
    second = step_in_backward(model, "galore")
    loss_of(model, 0).backward()
    assert not first.state
    assert second.state


def test_stopped_it_is_an_ordinary_optimizer() -> None:
    def run(model: nn.Module, opt: SubspaceOptimizer) -> None:
        plainly(model, opt, range(3))
        if isinstance(opt, BackwardOptimizer):
            opt.stop()
        opt.zero_grad()
        loss_of(model, 3).backward()
        assert model.up.weight.grad is not None
        loss_of(model, 4).backward()
        opt.step()

    assert_same(*(trained(make, run, small("cosmos")) for make in BOTH.values()))


def test_it_cannot_be_copied() -> None:
    opt = step_in_backward(Net(), "cosmos")
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled; make another for the copy of the model"):
            copied(opt)


def test_a_copy_of_the_model_has_nothing_to_do_with_it() -> None:
    model = Net()
    opt = step_in_backward(model, "cosmos")
    twin = copy.deepcopy(model)
    loss_of(twin, 0).backward()
    assert twin.up.weight.grad is not None
    assert not opt.state


def test_a_model_whose_gradients_are_averaged_later_is_refused() -> None:
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.module = Net()

    with pytest.raises(ValueError, match="DistributedDataParallel averages gradients after this optimizer would use them"):
        step_in_backward(Wrapped(), "cosmos")
