"""Hugging Face Trainer: does its optimizer follow the training arguments, and does a run resume to the bit?"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vision  # noqa: F401 -- before libraries that import torchvision
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from accelerated import allow_fsdp, one_of_several
from pool import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from subspace_opt import SpecError, SubspaceOptimizer, build
from subspace_opt.integrations.transformers import OptimizerFactory, SubspaceMetrics, SubspaceMixin, SubspaceTrainer, optimizer_for

LIBRARY = "transformers"
NOT: dict[str, str] = {}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate"),
]
SMALL = {"matrix.selector.rank": 4}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def sentences(count: int = 32) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(1, 40, (count, 8), generator=draw)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return TrainingArguments(**{**given, **options})


def trainer_of(folder: Path, spec: Any = "cosmos", *, model: nn.Module | None = None, callbacks: Any = None, **options: Any) -> Any:
    return SubspaceTrainer(
        model=model or llama(),
        args=arguments(folder, **options),
        train_dataset=sentences(),
        spec=spec,
        optimizer_options={"overrides": SMALL},
        callbacks=callbacks,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.shows("builds", "names", "decay groups")
def test_names_roles_and_decay_groups_are_those_of_trainer(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    opt = trainer.create_optimizer()
    decayed, kept = opt.param_groups
    assert set(decayed["param_names"]) == set(trainer.get_decay_parameter_names(trainer.model))
    assert kept["param_names"] == [name for name, _ in trainer.model.named_parameters() if "norm" in name]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {group["lr"] for group in opt.param_groups} == {1e-2}, "learning_rate, not the spec's 2e-3"
    rows = opt.plan.by_name
    assert rows["model.embed_tokens.weight"].role.name == "embedding"
    assert (rows["lm_head.weight"].pipeline, rows["model.layers.0.mlp.up_proj.weight"].pipeline) == ("other", "matrix")


class OwnDecay(SubspaceMixin, Trainer):
    """A trainer with a list of its own, made ready by the mixin."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return ["lm_head.weight"]


def test_a_trainers_own_list_of_decayed_parameters_is_used(tmp_path: Path) -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    opt = OwnDecay(model=model, args=arguments(tmp_path), spec="adamw").create_optimizer()
    assert opt.param_groups[0]["param_names"] == ["lm_head.weight"]
    assert "model.embed_tokens.weight" not in opt.param_groups[1]["param_names"], "Trainer leaves frozen parameters out"


def test_adam_arguments_change_the_spec_only_if_they_are_given(tmp_path: Path) -> None:
    usual = optimizer_for(llama(), arguments(tmp_path), "cosmos").spec
    assert usual.pipelines["other"].complement[0].beta1 == 0.95
    given = optimizer_for(llama(), arguments(tmp_path, adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-6), "cosmos").spec
    assert [getattr(given.pipelines["other"].complement[0], field) for field in ("beta1", "beta2", "eps")] == [0.8, 0.7, 1e-6]
    assert (given.pipelines["matrix"].inside[0].beta2, given.pipelines["matrix"].momentum[0].beta) == (0.7, 0.95)
    plain = {"name": "plain", "pipelines": {"all": {"complement": "sign"}}, "routes": [{"use": "all"}]}
    with pytest.raises(ValueError, match=r"^adam_beta1=0.8: no rule of spec 'plain' has such a field; leave it out$"):
        optimizer_for(llama(), arguments(tmp_path, adam_beta1=0.8), plain)


def test_optim_args_are_options_of_other_optimizers_and_dotted_paths(tmp_path: Path) -> None:
    text = "rank=3, update_proj_gap=50, scale=0.5, other.complement.beta2=0.9, rounding=stochastic, state_dtype=bf16"
    opt = optimizer_for(llama(), arguments(tmp_path, optim_args=text), "galore")
    matrix = opt.spec.pipelines["matrix"]
    assert (matrix.selector.rank, matrix.selector.every, matrix.mix.inside) == (3, 50, 0.5)
    assert opt.spec.pipelines["other"].complement[0].beta2 == 0.9
    assert opt._options.rounding == "stochastic"
    assert matrix.state_dtype == {"exp_avg": "bf16", "exp_avg_sq": "bf16"}
    later = optimizer_for(llama(), arguments(tmp_path, optim_args=text), "galore", overrides={"matrix.selector.rank": 2})
    assert later.spec.pipelines["matrix"].selector.rank == 2, "overrides in code come first"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("rnak=3", TypeError, "^'rnak' is no option; did you mean 'rank'"),
        ("lr=3", TypeError, "^'lr' is no option"),
        ("matrix.selector.rnak=3", SpecError, "override 'matrix.selector.rnak'"),
        ("ns_steps=3", TypeError, "'ns_steps' has no counterpart in spec 'galore'"),
        ("rank", SpecError, "'rank' in 'rank': give key=value, separated by commas"),
        ("rank=3,rank=4", SpecError, "sets matrix.selector.rank twice"),
        ("rank=[3", SpecError, "the value cannot be read"),
    ],
)
def test_unknown_keys_in_optim_args_are_errors(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimizer_for(llama(), arguments(tmp_path, optim_args=text), "galore")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "adafactor"}, "^optim='adafactor' chooses another optimizer than the spec; leave it out$"),
        ({"optim_target_modules": ["mlp"]}, "^optim_target_modules is not used"),
    ],
)
def test_arguments_that_would_be_ignored_are_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_for(llama(), arguments(tmp_path, **options), "cosmos")


def test_two_optimizers_and_missing_arguments_are_errors(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"^the trainer is given a spec and another optimizer"):
        SubspaceTrainer(model=model, args=arguments(tmp_path), spec="cosmos", optimizers=(build("adamw", model), None))
    with pytest.raises(ValueError, match=r"^the trainer is given a spec and another optimizer"):
        SubspaceTrainer(model=model, args=arguments(tmp_path), spec="cosmos", optimizer_cls_and_kwargs=(torch.optim.SGD, {}))
    with pytest.raises(TypeError, match="needs the TrainingArguments"):
        optimizer_for(model)
    with pytest.raises(ValueError, match=r"^process_group divides the state over ranks, and Trainer saves it on one rank only"):
        optimizer_for(model, arguments(tmp_path), process_group=object())


# ----------------------------------------------------------------------------------------------------------- a plain Trainer


def plain(folder: Path, cls: Any, options: dict[str, Any]) -> Trainer:
    return Trainer(model=llama(), args=arguments(folder), train_dataset=sentences(), optimizer_cls_and_kwargs=(cls, options))


def test_the_factory_makes_the_optimizer_of_the_mixin(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    trainer = plain(tmp_path, OptimizerFactory, {"args": args, "spec": "cosmos", "overrides": SMALL})
    trainer.train()
    other = trainer_of(tmp_path)
    other.train()
    assert trainer.optimizer.optimizer.explain().to_dict() == other.optimizer.optimizer.explain().to_dict()
    assert same(weights(trainer.model), weights(other.model))


def test_a_trainer_without_factories_is_told(tmp_path: Path) -> None:
    """Older versions call the factory as the class of an optimizer."""
    with pytest.raises(
        TypeError, match="this version of transformers knows no factories of optimizers; upgrade it, or use SubspaceTrainer"
    ):
        OptimizerFactory([{"params": list(llama().parameters())}], args=arguments(tmp_path))


def test_the_class_alone_finds_names_through_the_model_or_refuses(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"these parameter groups have no names, .* Pass the model too: model=model$"):
        plain(tmp_path, SubspaceOptimizer, {"spec": "cosmos"}).create_optimizer()
    trainer = plain(tmp_path, SubspaceOptimizer, {"spec": "cosmos", "lr": 1e-2})
    trainer.optimizer_cls_and_kwargs[1]["model"] = trainer.model
    opt = trainer.create_optimizer()
    assert opt.plan.by_name["model.embed_tokens.weight"].role.name == "embedding"
    assert {row.pipeline for row in opt.plan} == {"matrix", "other"}


# ------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.shows("resume bit-equal", "schedulers")
@pytest.mark.parametrize(
    ("spec", "options", "dtype"),
    [
        ("cosmos", {}, torch.float32),
        (
            "galore",
            {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2, "optim_args": "update_proj_gap=3"},
            torch.float32,
        ),
        ("dion", {"bf16": True}, torch.float32),
        ("cosmos", {}, torch.bfloat16),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, spec: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "max_grad_norm": 0.5, **options}
    whole = trainer_of(tmp_path / "whole", spec, model=llama(dtype), **options)
    whole.train()
    half = trainer_of(tmp_path / "half", spec, model=llama(dtype), **options)
    half.add_callback(StopAt(4))
    half.train()
    assert half.state.global_step == 4
    again = trainer_of(tmp_path / "half", spec, model=llama(dtype), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    assert same(weights(whole.model), weights(again.model))
    assert not same(weights(whole.model), weights(half.model))
    rates = [entry["learning_rate"] for entry in again.state.log_history if "learning_rate" in entry]
    assert rates == [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert len(set(rates)) >= 7, "the schedule moves the learning rate"
    assert float(again.optimizer.param_groups[0]["lr"]) == again.lr_scheduler.get_last_lr()[0]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer sees at each update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append({name: p.grad.clone() for name, p in model.named_parameters()})


@pytest.mark.shows("clipping", "accumulation")
def test_clipping_and_accumulation_come_before_the_step(tmp_path: Path) -> None:
    seen = {}
    for name, options in {
        "large": {"per_device_train_batch_size": 4},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "clipped": {"per_device_train_batch_size": 4, "max_grad_norm": 0.01},
    }.items():
        trainer = trainer_of(tmp_path, callbacks=[gradients := Gradients()], **{"max_steps": 2, "max_grad_norm": 0.0, **options})
        trainer.train()
        seen[name] = gradients.seen
        assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {2.0}
    torch.testing.assert_close(seen["accumulated"][0], seen["large"][0], rtol=1e-4, atol=1e-6)
    size = torch.stack([grad.norm() for grad in seen["clipped"][0].values()]).norm()
    assert float(size) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.shows("AMP")
def test_mixed_precision_keeps_weights_and_state_in_float32(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, bf16=True)
    dtypes = set()
    trainer.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, given, out: dtypes.add(out.dtype))
    before = weights(trainer.model)
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {value.dtype for slots in trainer.optimizer.state.values() for value in slots.values()} == {torch.float32}
    assert not any(torch.equal(before[name], p) for name, p in weights(trainer.model).items())


# -------------------------------------------------------------------------------------------------------------------- metrics


class Replay(TrainerCallback):
    """Computes the measurements of pipeline `matrix` anew, from gradients, bases and copies of the weights."""

    def __init__(self) -> None:
        self.energies: list[float] = []
        self.sizes: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = weights(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        energies, change, size = [], 0.0, 0.0
        params = dict(model.named_parameters())
        for row in (row for row in optimizer.optimizer.plan if row.pipeline == "matrix"):
            p, before = params[row.entry.name], self.before[row.entry.name]
            basis = optimizer.optimizer.state[p]["selector.basis"]
            g = p.grad.T if row.splits[0][1].turned else p.grad
            energies.append(float((g @ basis).square().sum() / g.square().sum()))
            change += float((p.detach() - before).square().sum())
            size += float(before.square().sum())
        self.energies.append(sum(energies) / len(energies))
        self.sizes.append((change / size) ** 0.5)


@pytest.mark.parametrize("own", [True, False], ids=["SubspaceTrainer", "Trainer"])
def test_metrics_are_in_the_logs(tmp_path: Path, own: bool) -> None:
    args = {"logging_steps": 2, "max_steps": 6}
    callbacks = [replay := Replay(), SubspaceMetrics(), reader := Reader()]
    if own:
        trainer = trainer_of(tmp_path, callbacks=callbacks, **args)
        trainer.callback_handler.callbacks.insert(0, first := Reader())  # as Trainer's own reports
    else:
        kwargs = {"args": arguments(tmp_path), "spec": "cosmos", "overrides": SMALL}
        trainer = Trainer(
            model=llama(),
            args=arguments(tmp_path, **args),
            train_dataset=sentences(),
            optimizer_cls_and_kwargs=(OptimizerFactory, kwargs),
            callbacks=callbacks,
        )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    for entry, energy, size in zip(logged, replay.energies[1::2], replay.sizes[1::2], strict=True):
        assert entry["captured_energy/matrix"] == pytest.approx(energy, rel=1e-4)
        assert entry["update_size/matrix"] == pytest.approx(size, rel=1e-4)
        assert 0.2 < energy < 1
        assert entry["update_size/other"] > 0
        assert "captured_energy/other" not in entry
    assert len(reader.seen) == 3
    if own:
        assert first.seen == reader.seen


class Reader(TrainerCallback):
    """Keeps the logged measurements, as a reporting callback does."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen += [logs["captured_energy/matrix"]] if "captured_energy/matrix" in logs else []


def test_metrics_refuse_what_they_cannot_measure(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callbacks=[SubspaceMetrics()], logging_strategy="epoch")
    with pytest.raises(ValueError, match=r"^logging_strategy is 'epoch', so say which updates to measure: SubspaceMetrics\(every=10\)$"):
        trainer.train()
    with pytest.raises(ValueError, match="every is 0"):
        SubspaceMetrics(every=0)
    trainer = Trainer(model=llama(), args=arguments(tmp_path), train_dataset=sentences(), callbacks=[SubspaceMetrics()])
    with pytest.raises(TypeError, match="SubspaceMetrics measures a SubspaceOptimizer, and the trainer has AdamW"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------------------- many ranks


def resumed_on_ranks(folder: str, layout: str) -> tuple[str, list[bool], dict[str, float]]:
    """Train, and train again from the checkpoint in the middle. Returns the kind of parameter, and what equals."""
    with one_of_several():
        options: dict[str, Any] = {
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 2,
            "ddp_find_unused_parameters": False,
        }
        if layout != "DDP":
            how = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": layout}
            options |= {"fsdp": True, "fsdp_config": how}

        def run(checkpoint: str | None) -> tuple[Any, dict[str, Tensor]]:
            args = arguments(Path(folder), **options)
            assert args.device.type == "cpu"  # makes Accelerate's state, which Trainer then finds
            if layout != "DDP":
                allow_fsdp()
            trainer = SubspaceTrainer(
                model=llama(),
                args=args,
                train_dataset=sentences(),
                spec="cosmos",
                optimizer_options={"overrides": SMALL},
                callbacks=[SubspaceMetrics(energy=layout == "DDP")],
            )
            trainer.train(resume_from_checkpoint=checkpoint)
            return trainer, {name: whole(p) for name, p in trainer.model.named_parameters()}

        first, there = run(None)
        _, here = run(f"{folder}/checkpoint-3")
        logged = [entry for entry in first.state.log_history if "loss" in entry][-1]
        kind = type(next(first.model.parameters())).__name__
        return kind, [torch.equal(there[name], here[name]) for name in there], {k: v for k, v in logged.items() if "/" in k}


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


@pytest.mark.slow
@pytest.mark.shows("FSDP2")
@pytest.mark.parametrize("layout", ["DDP", "SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_run_on_two_ranks_resumes_to_the_bit(tmp_path: Path, layout: str) -> None:
    (kind, equal, logged), other = run_ranks(2, resumed_on_ranks, str(tmp_path), layout)
    assert kind == ("Parameter" if layout == "DDP" else "DTensor")
    assert len(equal) == 21
    assert all(equal)
    assert other == (kind, equal, logged)
    assert logged["update_size/matrix"] > 0
    assert ("captured_energy/matrix" in logged) == (layout == "DDP")


# ------------------------------------------------------------------------------------------------------------------ libraries


@pytest.mark.parametrize("library", ["transformers", "accelerate"])
def test_a_missing_or_old_library_gives_one_message(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.delitem(sys.modules, "subspace_opt.integrations.transformers")
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=rf"needs {library}, which is not installed: pip install 'subspace-opt\[transformers\]'$"):
            importlib.import_module("subspace_opt.integrations.transformers")
    found = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.9.1" if name == library else found(name))
    with pytest.raises(ImportError, match=rf"needs {library} .* or newer, and 0.9.1 is installed: .* --upgrade$"):
        importlib.import_module("subspace_opt.integrations.transformers")
