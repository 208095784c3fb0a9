"""State in fewer bits: is it stored as spec and plan say, does the mathematics use the stored numbers, and does a run resume?"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from common import LINEAR, PRESETS, Params, copied, flat, give, optimizer, parameters, small, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from subspace_opt import CheckpointError, SpecError, SubspaceOptimizer, build, load_spec
from subspace_opt.algebra import storage
from subspace_opt.cli.tables import show_explained
from subspace_opt.engine import lowbit
from subspace_opt.lab.run.measure import measured_bytes
from subspace_opt.plan import COUNTERS
from subspace_opt.spec import parse_spec

every_preset = pytest.mark.parametrize("preset", PRESETS)
fewer_bits = pytest.mark.parametrize("word", ["bf16", "8bit", "4bit"])
SOME = ["cosmos", "galore", "adamw", "muon", "trion", "ldadam", "adam-snsm"]

# Moments large enough for codes, experts in one parameter, and two that stay uncoded: too few entries, and a number that blocks do not
# divide.
LARGE = {"tall": (96, 64), "wide": (64, 96), "mate": (96, 64), "experts": (2, 64, 64), "uneven": (65, 64), "bias": (64,)}
SPECS = {"rank": 64, "every": 3}


def kept(opt: torch.optim.Optimizer, params: Params) -> dict[str, Tensor]:
    """Copies of parameters and state; for codes, their inner tensors."""
    out = {name: p.detach().clone() for name, p in params.items()}
    for key, value in flat(opt):
        inner = value.__tensor_flatten__()[0] if lowbit.found(value) else ()
        out |= {f"{key}/{name}": getattr(value, name).clone() for name in inner} or {key: value.clone()}
    return out


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def made(preset: str, params: Params, word: Any, **options: Any) -> SubspaceOptimizer:
    return optimizer(small(preset, **SPECS), params, state_dtype=word, **options)


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------------------------------------ stored


@every_preset
@fewer_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_planned_bytes_are_allocated_bytes(preset: str, word: Any, dtype: torch.dtype) -> None:
    params = parameters(LARGE, dtype)
    opt = made(preset, params, word)
    train(opt, params, range(4))
    assert measured_bytes(opt) == opt.plan.total_bytes
    full = made(preset, params, None).plan
    assert sum(bool(row.codes) for row in opt.plan) >= (3 if word in storage.BITS and full.total_bytes > 3e5 else 0)


@every_preset
def test_bases_counters_and_indices_stay(preset: str) -> None:
    params = parameters(LARGE)
    opt, full = made(preset, params, "4bit"), made(preset, params, None)
    for row, plain in zip(opt.plan, full.plan, strict=True):
        for key, (_, dtype) in plain.state.items():
            if key in COUNTERS or ".selector." in f".{key}" or not dtype.is_floating_point or key.endswith("rotation"):
                assert key not in row.codes
                assert row.state[key][1] == dtype


@fewer_bits
def test_a_slot_is_stored_as_its_name_says_and_others_are_not(word: Any) -> None:
    params = parameters(LARGE)
    opt = made("adamw", params, {"exp_avg_sq": word})
    train(opt, params, range(2))
    state = opt.state[params["tall"]]
    assert type(state["complement.exp_avg"]) is Tensor
    assert state["complement.exp_avg"].dtype == torch.float32
    how = lowbit.found(state["complement.exp_avg_sq"])
    assert how == (None if word == "bf16" else lowbit.Codes(int(word[0]), signed=False))  # type: ignore[arg-type]
    if word == "bf16":
        assert state["complement.exp_avg_sq"].dtype == torch.bfloat16
        assert opt.state[params["bias"]]["complement.exp_avg_sq"].dtype == torch.bfloat16


def test_what_blocks_do_not_divide_stays_and_the_plan_says_why() -> None:
    params = parameters(LARGE)
    opt = made("adamw", params, {"exp_avg": "8bit", "exp_avg_sq": "bf16"})
    rows = opt.plan.by_name
    assert rows["tall"].to_dict()["stored"] == {"complement.exp_avg": "8bit", "complement.exp_avg_sq": "bf16"}
    assert rows["uneven"].stored["complement.exp_avg"] == "fp32 (4,160 entries, no multiple of 256)"
    assert rows["bias"].stored["complement.exp_avg"] == "fp32 (fewer than 4,096 entries)"
    assert "complement.exp_avg 8bit, complement.exp_avg_sq bf16" in str(opt.plan)
    assert "stored" not in str(made("adamw", params, None).plan)
    train(opt, params, range(1))
    assert opt.state[params["uneven"]]["complement.exp_avg"].dtype == torch.float32


def test_the_command_line_shows_it() -> None:
    from rich.console import Console

    out = Console(file=io.StringIO(), width=200)
    show_explained(made("muon", parameters(LARGE), "8bit").plan, "title", out)
    assert "complement.exp_avg fp32 (fewer than 4,096 entries)" in out.file.getvalue()  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------------------------------------------- mathematics


def stored_as(value: Tensor, word: str, signed: bool) -> Tensor:
    """A tensor after it was stored and read, by torch's and torchao's own functions."""
    if word == "bf16":
        return value.to(torch.bfloat16).to(value.dtype)
    bits, block = (8, 256) if word == "8bit" else (4, 128)
    there = lowbit.torchao_types()[bits].zeros(value.shape, signed=signed, block_size=block)
    return there.copy_(value).dequantize()


@fewer_bits
def test_adam_is_adam_on_the_stored_moments(word: Any) -> None:
    params = parameters({"w": (96, 64)})
    w, m, v = params["w"].detach().clone(), torch.zeros(96, 64), torch.zeros(96, 64)
    opt = made("adamw", params, word, lr=0.01, weight_decay=0.0)
    adam = opt.plan.rows[0].splits[0][1].pipeline.complement[0]
    for t in range(1, 6):
        give(params, t)
        g = params["w"].grad
        opt.step()
        m, v = m.lerp(g, 1 - adam.beta1), v * adam.beta2 + (1 - adam.beta2) * g * g
        w -= 0.01 * (m / (1 - adam.beta1**t)) / ((v / (1 - adam.beta2**t)).sqrt() + adam.eps)
        m, v = stored_as(m, word, True), stored_as(v, word, False)
        torch.testing.assert_close(params["w"].detach(), w, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        lowbit.whole(opt.state[params["w"]]["complement.exp_avg"]).float(), m, rtol=0, atol=0.02 * float(m.abs().max())
    )


@pytest.mark.parametrize("word", ["8bit", "4bit"])
@pytest.mark.parametrize("preset", ["muon", "trion", "cosmos"])
def test_matrices_of_one_parameter_share_no_block(preset: str, word: Any) -> None:
    """Experts end in the same bits as separate parameters."""
    together = {"experts": nn.Parameter(torch.stack([parameters({n: (64, 96)})[n].detach() for n in "ab"]))}
    apart = parameters(dict.fromkeys("ab", (64, 96)))
    own, others = (made(preset, p, word, stacking="never", seed=1) for p in (together, apart))
    for step in range(5):
        give(apart, step)
        together["experts"].grad = torch.stack([p.grad for p in apart.values()])  # type: ignore[misc]
        own.step()
        others.step()
    assert torch.equal(together["experts"], torch.stack(list(apart.values())))


@pytest.mark.parametrize("word", ["8bit", "4bit"])
@pytest.mark.parametrize("preset", SOME)
def test_stacks_of_codes_are_their_matrices(preset: str, word: Any) -> None:
    """This includes steps in which some have no gradient. Products of a stack round differently, which may change a code by one."""
    runs = []
    for stacking in ("never", "always"):
        params = parameters({f"w{i}": (96, 64) for i in range(4)})
        opt = made(preset, params, word, stacking=stacking, lr=1e-3)
        for step in range(5):
            give(params, step, missing=("w1",) if step == 2 else ())
            opt.step()
        runs.append(params)
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("word", ["8bit", "4bit"])
@pytest.mark.parametrize("shape", [(300, 64), (512, 33), (4096, 7)], ids=str)
def test_rows_in_passes_are_the_whole_matrix(shape: tuple[int, int], word: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shape[0] * shape[1] % 256 == 0
    runs = []
    for entries in (2**20, 600):
        monkeypatch.setattr("subspace_opt.engine.stacking.PASS", entries)
        monkeypatch.setitem(lowbit.RUN, "cpu", 2**17 if entries > 600 else 512)
        params = parameters({"w": shape})
        opt = made("adamw", params, word)
        assert opt.plan.rows[0].codes
        train(opt, params, range(4))
        runs.append(kept(opt, params))
    assert equal(*runs)


def test_no_kernel_writes_to_what_is_stored_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    from subspace_opt.engine import fused

    own = fused._run
    monkeypatch.setattr(fused, "_run", lambda items, *more: ran.extend(i.name for i in items) or own(items, *more))
    params = parameters(LARGE)
    train(made("adamw", params, {"exp_avg": "8bit"}), params, range(1))
    assert set(ran) == {"uneven", "bias"}  # moments that blocks do not divide stay uncoded
    ran.clear()
    train(made("adamw", params, {"exp_avg": "bf16"}), params, range(1))
    assert ran == []


# -------------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("preset", SOME)
@fewer_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_that_was_cut_goes_on_to_the_bit(preset: str, word: Any, dtype: torch.dtype) -> None:
    params = parameters(LARGE, dtype)
    opt = made(preset, params, word)
    train(opt, params, range(4))
    saved = through_a_file(opt.state_dict())
    twins = copied(params)
    twin = made(preset, dict(reversed(twins.items())), word)
    train(twin, parameters({}, dtype), range(1))
    twin.load_state_dict(saved)
    assert equal(kept(opt, params), kept(twin, twins))
    train(opt, params, range(4, 8))
    for state in saved["state"].values():  # the loaded state has its own storages
        for value in state.values():
            (value.scale if lowbit.found(value) else value).zero_()
    train(twin, twins, range(4, 8))
    assert equal(kept(opt, params), kept(twin, twins))


CHILD = """
import sys, torch
from common import copied, optimizer, parameters, train
from test_state_dtype import LARGE, kept, made
torch.set_num_threads(int(sys.argv[3]))
params = parameters(LARGE)
opt = made("cosmos", params, "8bit")
saved = torch.load(sys.argv[1], weights_only=True)
for name, p in params.items():
    p.data.copy_(saved["params"][name])
opt.load_state_dict(saved["optimizer"])
train(opt, params, range(3, 6))
torch.save(kept(opt, params), sys.argv[2])
"""


@pytest.mark.slow
def test_another_process_goes_on_to_the_bit(tmp_path: Path) -> None:
    """The optimizer is made before the load, because importing torchao then tells torch which tensors are safe to load."""
    params = parameters(LARGE)
    opt = made("cosmos", params, "8bit")
    train(opt, params, range(3))
    torch.save({"params": {n: p.detach() for n, p in params.items()}, "optimizer": opt.state_dict()}, tmp_path / "cut")
    train(opt, params, range(3, 6))
    here = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(tmp_path / "cut"), str(tmp_path / "end"), str(torch.get_num_threads())]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=here.parent, env={**os.environ, "PYTHONPATH": f"{here.parent}:{here}"}
    )
    assert done.returncode == 0, done.stderr
    assert equal(torch.load(tmp_path / "end", weights_only=True), kept(opt, params))


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ({"exp_avg": "8bit"}, None, "pipelines.matrix.state_dtype.exp_avg is only in the checkpoint"),
        (None, {"exp_avg": "bf16"}, "pipelines.matrix.state_dtype.exp_avg is only in this spec"),
        ({"exp_avg": "8bit"}, {"exp_avg": "4bit"}, "pipelines.matrix.state_dtype.exp_avg is '8bit' there and '4bit' here"),
    ],
)
def test_other_state_dtypes_are_refused(there: Any, here: Any, said: str) -> None:
    params = parameters(LARGE)
    saved = made("galore", params, there)
    train(saved, params, range(1))
    opt = made("galore", params, here)
    train(opt, params, range(1))
    before = kept(opt, params)
    with pytest.raises(CheckpointError, match=said):
        opt.load_state_dict(saved.state_dict())
    assert equal(before, kept(opt, params))


def test_codes_of_another_kind_are_refused() -> None:
    """The spec and the tensors of the file disagree."""
    params = parameters({"w": (96, 64)})
    opt, plain, four = (made("muon", params, word) for word in ("8bit", None, "4bit"))
    for each in (opt, plain, four):
        train(each, params, range(1))
    saved = opt.state_dict()
    with pytest.raises(CheckpointError, match=r"slot 'momentum.*' is stored as signed codes of 4 bits, here as signed codes of 8 bits"):
        opt.load_state_dict({**saved, "state": four.state_dict()["state"]})
    with pytest.raises(CheckpointError, match=r"'w': slot 'momentum.*' is stored as signed codes of 8 bits, here as numbers"):
        plain.load_state_dict({**plain.state_dict(), "state": saved["state"]})


def test_numbers_are_coded_when_they_are_loaded() -> None:
    """Ranks that share a parameter save plain numbers."""
    params = parameters({"w": (96, 64)})
    opt = made("muon", params, "8bit")
    train(opt, params, range(2))
    saved = opt.state_dict()
    numbers = {i: {key: lowbit.whole(v) if isinstance(v, Tensor) else v for key, v in slots.items()} for i, slots in saved["state"].items()}
    before = {name: (lowbit.found(value), lowbit.whole(value).clone()) for name, value in flat(opt) if isinstance(value, Tensor)}
    opt.load_state_dict({**saved, "state": numbers})
    for name, value in flat(opt):
        assert lowbit.found(value) == before[name][0]
        assert torch.equal(lowbit.whole(value), before[name][1])


@pytest.mark.parametrize("word", ["8bit", "4bit"])
@pytest.mark.parametrize("preset", ["cosmos", "adamw"])
@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_goes_on_to_the_bit(preset: str, word: Any, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def fresh(seed: int) -> tuple[nn.Module, Params, SubspaceOptimizer]:
        model = nn.Module()
        for name, p in parameters(LARGE, seed=seed).items():
            model.register_parameter(name, p)
        params = dict(model.named_parameters())
        return model, params, made(preset, params, word)

    model, params, opt = fresh(0)
    train(opt, params, range(4))
    saved = through_a_file(get_optimizer_state_dict(model, opt, options=options))
    again, others, twin = fresh(5)
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, twin, saved, options=options)
    assert equal(kept(opt, params), kept(twin, others))
    train(opt, params, range(4, 7))
    train(twin, others, range(4, 7))
    assert equal(kept(opt, params), kept(twin, others))


# ------------------------------------------------------------------------------------------------------------------------ the spec


def test_it_is_a_field_of_a_pipeline_and_travels_with_the_spec() -> None:
    spec = load_spec("cosmos", {"matrix.state_dtype.exp_avg_sq": "8bit", "other.state_dtype": {"exp_avg": "bf16"}})
    assert spec.pipelines["matrix"].state_dtype == {"exp_avg_sq": "8bit"}
    assert parse_spec(spec.to_yaml()) == spec
    assert "state_dtype: {exp_avg_sq: 8bit}" in spec.to_yaml()
    opt = build(spec, nn.Linear(64, 96))
    assert opt.plan.by_name["weight"].stored == {"inside.exp_avg_sq": "8bit"}


def test_a_word_stands_for_all_that_is_as_large_as_the_matrix() -> None:
    opt = made("soap", parameters(LARGE), "bf16")
    assert opt.spec.pipelines["matrix"].state_dtype == {"exp_avg": "bf16", "exp_avg_sq": "bf16"}
    own = {"version": 1, "pipelines": {"matrix": {"selector": "random", "inside": "soap", "feedback": 0.5}}}
    opt = SubspaceOptimizer(parameters({"w": (96, 64)}).items(), own, state_dtype="8bit", modules={"w": LINEAR})
    assert opt.spec.pipelines["matrix"].state_dtype == {"error": "8bit", "exp_avg_sq": "8bit"}  # but not its covariance


REFUSED = [
    ("galore", {"matrix.state_dtype.exp_avgs": "bf16"}, "pipelines.matrix.state_dtype.exp_avgs: no rule of this pipeline has a slot"),
    ("galore", {"matrix.state_dtype.exp_avgs": "bf16"}, "did you mean 'exp_avg'?"),
    ("muon", {"matrix.state_dtype.exp_avg_sq": "bf16"}, "no rule of this pipeline has a slot 'exp_avg_sq'"),
    ("galore", {"matrix.state_dtype.basis": "bf16"}, "slot 'basis' belongs to selector 'svd', .* a rounded basis is no longer orthonormal"),
    ("cosmos", {"matrix.state_dtype.covariance": "8bit"}, "slot 'covariance' belongs to selector 'eigen'"),
    ("galore", {"matrix.state_dtype.exp_avg": "16bit"}, "should be 'fp32', 'bf16', '8bit' or '4bit', not '16bit'"),
    (
        "powerstep",
        {"all.momentum.state": "int8", "all.state_dtype.momentum_buffer": "8bit"},
        "'momentum_buffer' holds a basis or whole",
    ),
]


@pytest.mark.parametrize(("preset", "overrides", "said"), REFUSED)
def test_what_cannot_be_stored_so_is_refused_where_it_stands(preset: str, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        load_spec(preset, overrides)


def test_a_rotation_of_soap_is_a_basis() -> None:
    with pytest.raises(SpecError, match="slot 'rotation' holds a basis or whole numbers"):
        load_spec("cosmos", {"matrix.selector": {"kind": "random"}, "matrix.state_dtype.rotation": "8bit"})


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("8bits", "state_dtype: '8bits' is not a state dtype; did you mean '8bit'?"),
        ({"exp_avg": "int8"}, "state_dtype: 'int8' is not a state dtype;"),
        ({"exp_avgs": "bf16"}, "no pipeline of 'galore' has a slot 'exp_avgs' with a choice of dtype; did you mean 'exp_avg'?"),
        ({"basis": "bf16"}, "no pipeline of 'galore' has a slot 'basis' with a choice of dtype"),
    ],
)
def test_the_option_is_checked(chosen: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said.replace("?", r"\?")):
        made("galore", parameters(LARGE), chosen)


def test_without_torchao_the_plan_is_there_and_the_optimizer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from subspace_opt import Entry, make_plan

    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_4bit", None)
    spec = load_spec("adamw", {"all.state_dtype.exp_avg": "8bit"})
    assert make_plan(spec, [Entry("w", (96, 64))]).rows[0].codes
    with pytest.raises(lowbit.LowBitError, match=r"need torchao.*Run: pip install 'subspace-opt\[lowbit\]'"):
        optimizer(spec, parameters(LARGE))
    optimizer(spec, parameters({"bias": (4,)}))  # none of it is stored as codes


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_that_were_read_from_codes_are_coded_as_the_same(bits: Literal[4, 8], signed: bool) -> None:
    how = lowbit.Codes(bits, signed)
    draws = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 5, 64).unsqueeze(-1)
    for values in (draws, -draws, draws.abs(), -draws.abs(), torch.zeros(64, 1024)):
        values = values if signed else values.abs()
        once = lowbit.coded(values, how)
        again = lowbit.coded(lowbit.whole(once), how)
        assert torch.equal(lowbit.whole(again), lowbit.whole(once))
