"""Adapters of peft, trained by trl's SFTTrainer: ranks on matrices with a short side of 8, state, accumulation, bf16 and resume."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from subspace_opt import Entry, build, load_spec, make_plan
from subspace_opt.plan import Role

LIBRARY = "peft"
NOT = {
    "decay groups": "adapters have neither norms nor biases; groups of trainers are on their pages",
    "FSDP2": "a trainer shards the model, not peft; see accelerate and transformers",
}
PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "peft.md"
RANK = 8

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # transformers, of its own names
    pytest.mark.filterwarnings(r"ignore:.*pin_memory.*:UserWarning"),
]


def model(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1))
    return get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", **options))


def trainer(net: PeftModel, optimizer: torch.optim.Optimizer, folder: Path, **arguments: Any) -> SFTTrainer:
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(30))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")
    data = Dataset.from_dict({"text": [" ".join(f"w{(i * 7 + k * 3) % 30}" for k in range(8)) for i in range(32)]})
    usual = {"per_device_train_batch_size": 8, "max_steps": 6, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    config = SFTConfig(output_dir=str(folder), logging_strategy="no", disable_tqdm=True, seed=0, **{**usual, **arguments})
    return SFTTrainer(model=net, args=config, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, None))


def adapters(net: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------------------ the plan


@pytest.mark.shows("builds", "names")
def test_adapters_are_hidden_matrices_and_the_rest_has_no_state() -> None:
    net = model(use_dora=True, modules_to_save=["lm_head"])
    rows = {row.entry.name: row for row in build("cosmos", net).plan.rows}
    for name, row in rows.items():
        trained = ".lora_" in name or "modules_to_save" in name
        assert row.entry.frozen != trained, name
        assert (row.state_bytes > 0) == trained, name
        if ".lora_A." in name or ".lora_B." in name:
            assert (row.role.name, row.pipeline, row.ranks) == ("hidden", "matrix", [RANK]), name
        if "lora_magnitude_vector" in name:
            assert row.role.name == "vector"
        if "modules_to_save" in name:
            assert row.role.name == "head"


def table() -> str:
    """State of a pair of adapters of 8 x 4096 by preset, as the page shows it."""
    shapes = {"lora_A": (8, 4096), "lora_B": (4096, 8)}
    entries = [Entry(name=name, shape=shape, dtype=torch.float32, role=Role("hidden", "test")) for name, shape in shapes.items()]
    quarter = {"matrix.selector.rank": 2}
    usual = make_plan(load_spec("adamw"), entries).total_bytes
    lines = ["| preset | rank of the basis | state, compared to AdamW |", "| --- | --- | --- |"]
    for preset, overrides in (
        *(("cosmos", {}), ("cosmos", quarter), ("galore", {}), ("galore", quarter), ("fira", quarter), ("apollo", {})),
        *(("dion", {}), ("muon", {}), ("soap-one-sided", {}), ("soap", {})),
    ):
        plan = make_plan(load_spec(preset, overrides), entries)
        shown = f"`{preset}`" + (", `matrix.selector.rank: 2`" if overrides else "")
        rank = "/".join(str(rank) for rank in plan.rows[0].ranks) or "no basis"
        lines.append(f"| {shown} | {rank} | {plan.total_bytes / usual:.2f} x |")
    return "\n".join(lines)


def test_the_page_shows_the_ranks_and_the_state() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), f"put this table into {PAGE.name}:\n\n{table()}"


def test_a_full_basis_leaves_nothing_to_the_complement() -> None:
    nets = [model(), model()]
    for net, gamma in zip(nets, (0.0, 1.0), strict=True):
        optimizer = build("cosmos", net, lr=1e-2, overrides={"matrix.mix.complement": gamma})
        for step in range(2):
            tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    ends = [adapters(net) for net in nets]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# --------------------------------------------------------------------------------------------------------------- SFTTrainer


@pytest.mark.slow
@pytest.mark.shows("schedulers", "clipping")
def test_training_changes_the_adapters_alone(tmp_path: Path) -> None:
    net = model()
    frozen = {name: p.detach().clone() for name, p in net.named_parameters() if not p.requires_grad}
    before = adapters(net)
    optimizer = build("cosmos", net, lr=1e-2, overrides={"matrix.selector.rank": 2})
    run = trainer(net, optimizer, tmp_path, max_grad_norm=1e-3, lr_scheduler_type="cosine")
    run.train()
    assert all(torch.equal(p, frozen[name]) for name, p in net.named_parameters() if name in frozen)
    assert all(not torch.equal(p, before[name]) for name, p in adapters(net).items())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9), "the cosine has ended"
    assert {row.ranks[0] for row in optimizer.plan.rows if "lora_A" in row.entry.name} == {2}


@pytest.mark.slow
@pytest.mark.shows("accumulation")
def test_accumulated_batches_equal_one(tmp_path: Path) -> None:
    ends = []
    for size, times in ((8, 1), (4, 2)):
        net = model()
        optimizer = build("galore", net, lr=1e-2)
        trainer(net, optimizer, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=times, max_steps=3).train()
        ends.append(adapters(net))
    start = adapters(model())
    for name, p in ends[0].items():
        assert (p - ends[1][name]).abs().max() < 0.01 * (p - start[name]).abs().max(), name


@pytest.mark.slow
@pytest.mark.shows("resume bit-equal", "AMP")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_is_bit_equal(bf16: bool, tmp_path: Path) -> None:
    ends = []
    for resumed in (False, True):
        net = model()
        optimizer = build("cosmos", net, lr=1e-2, overrides={"matrix.selector.rank": 2})
        trainer(net, optimizer, tmp_path, bf16=bf16, save_strategy="steps", save_steps=3).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resumed else None
        )
        ends.append(adapters(net))
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_page_names_presets_that_exist() -> None:
    names = re.findall(r"^\| `([\w-]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert names
    assert all(load_spec(name).name == name for name in names)
