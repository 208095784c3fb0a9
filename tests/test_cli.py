"""The output of every subcommand for people and for programs, and its exit code."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from subspace_opt import Spec, build, load_spec, registry
from subspace_opt.cli import app, main, training
from subspace_opt.cli.progress import RunProgress
from subspace_opt.cli.tables import layers, split_name
from subspace_opt.lab import Ended, Evaluated, LabError, Saved, Started, Stepped, TrainConfig, make_model, meta_model
from subspace_opt.lab.run.measure import measured_bytes
from subspace_opt.spec import json_schema, parse_spec
from subspace_opt.spec.presets import built_in

Run = Callable[..., str]


class Left:
    """The exit code and the output of a command."""

    def __init__(self, status: object, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def leave(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Left]:
    """Run the command at a width and return status, stdout, stderr."""

    def leave(*arguments: str, width: int = 100) -> Left:
        monkeypatch.setenv("COLUMNS", str(width))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        return Left(caught.value.code, *capsys.readouterr())

    return leave


@pytest.fixture
def run(leave: Callable[..., Left]) -> Run:
    """Run a command that must succeed and return what it printed."""

    def run(*arguments: str, width: int = 100) -> str:
        left = leave(*arguments, width=width)
        assert left.status == 0, left.err
        return left.out

    return run


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    """A file that registers one rule. The rule is removed after the test."""
    file = tmp_path / "twice.py"
    file.write_text(
        "from typing import Literal\nfrom subspace_opt import Rule, register\n@register\nclass Twice(Rule):\n"
        '    """`2 X`, for the tests:\n\n    nothing more.\n    """\n    kind: Literal["twice"] = "twice"\n'
        "    def apply(self, x, grad, state, step): return 2 * x, {}\n"
    )
    kinds, loaded = {f: dict(t) for f, t in registry._kinds.items()}, set(registry._loaded)
    yield file
    registry._kinds.clear()
    registry._kinds.update(kinds)
    registry._loaded.clear()
    registry._loaded.update(loaded)


# --- help

COMMANDS = ["list", "show", "validate", "schema", "explain", "plan", "diff", "explain-change", "convert", "verify", "train", "inspect"]
COMMANDS += ["compare", "search", "demo", "parity", "new-plugin"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_explains_every_option(name: str, run: Run) -> None:
    text = run(name, "--help", width=80)
    assert f"Example: subspace-opt {name}" in text
    command: Any = typer.main.get_command(app)
    for parameter in command.commands[name].params:
        assert parameter.help, parameter.name
    assert max(map(len, text.splitlines())) <= 80


def test_help_lists_the_commands(run: Run) -> None:
    text = run("--help", width=80)
    assert re.findall(r"^  ([a-z-]+)  +[A-Z]", text.partition("Commands:")[2], re.M) == COMMANDS
    assert "..." not in text.partition("Commands:")[2]  # no description is cut
    assert "subspace-opt 0." in run("--version")


def test_without_arguments_it_says_how_it_is_used(leave: Callable[..., Left]) -> None:
    left = leave()
    assert left.status == 2
    assert "Usage: subspace-opt" in left.out + left.err


# --- list, show, validate, schema


@pytest.mark.parametrize("width", [80, 120])
def test_list(width: int, run: Run) -> None:
    text = run("list", width=width)
    for name in (*built_in(), *registry.kinds("rule"), *registry.kinds("selector")):
        assert re.search(rf"(^|, ){name}\b", text, re.M), name
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_list_for_programs(run: Run) -> None:
    listed = json.loads(run("list", "--json"))
    assert {preset["name"] for preset in listed["presets"]} >= set(built_in())
    assert all(preset["source"] and preset["error"] is None for preset in listed["presets"] if not preset["package"])
    for family in ("rules", "selectors", "weight_rules"):
        assert all(kind["doc"] and kind["names"] for kind in listed[family])
    assert ["identity", "sgd"] in [rule["names"] for rule in listed["rules"]]


def test_list_shows_a_plugin_file(plugin: Path, run: Run) -> None:
    text = "\n".join(line.rstrip() for line in run("list", "--plugin", str(plugin), width=200).splitlines())
    assert re.search(r"^twice +`2 X`, for the tests \[twice\.py\]$", text, re.M)
    assert re.search(rf"^twice\.py +{re.escape(str(plugin))} +twice$", text, re.M)
    listed = json.loads(run("list", "--plugin", str(plugin), "--json"))
    assert {"name": "twice.py", "package": str(plugin), "gives": ["twice"], "error": None} in listed["plugins"]


def test_show(run: Run) -> None:
    assert parse_spec(run("show", "cosmos")) == load_spec("cosmos")
    full = run("show", "cosmos", "--full")
    assert parse_spec(full) == load_spec("cosmos")
    assert "cov_beta: 0.95" in full
    assert json.loads(run("show", "cosmos", "--json")) == load_spec("cosmos").model_dump(mode="json")


def test_show_takes_overrides_and_its_output_is_a_spec(tmp_path: Path, run: Run) -> None:
    changes = {
        "matrix.selector.rank": "128",
        "matrix.complement": "{kind: muon, steps: 3}",
        "matrix.inside": "[ema, soap]",
        "name": "mine",
        "matrix.feedback": "null",
    }
    options = [part for path, value in changes.items() for part in ("--set", f"{path}={value}")]
    file = tmp_path / "mine.yaml"
    file.write_text(run("show", "cosmos", *options))
    spec = load_spec(file)
    assert spec == load_spec(
        "cosmos",
        {
            "matrix.selector.rank": 128,
            "matrix.complement": {"kind": "muon", "steps": 3},
            "matrix.inside": ["ema", "soap"],
            "name": "mine",
        },
    )
    assert spec != load_spec("cosmos")


def test_show_takes_a_plugin(plugin: Path, tmp_path: Path, run: Run, leave: Callable[..., Left]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("pipelines: {matrix: {complement: twice}}")
    assert leave("show", str(file)).status == 2
    assert "complement: twice" in run("show", str(file), "--plugin", str(plugin))


def test_validate(tmp_path: Path, run: Run, leave: Callable[..., Left]) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(load_spec("muon").to_yaml())
    bad.write_text("pipelines: {matrix: {complement: muonn}}")
    assert run("validate", str(good), "cosmos").splitlines() == [
        f"{good}: ok, muon: pipelines matrix, other; 2 routes",
        "cosmos: ok, cosmos: pipelines matrix, other; 2 routes",
    ]
    left = leave("validate", str(bad), str(good))
    assert left.status == 2
    assert left.out == f"{good}: ok, muon: pipelines matrix, other; 2 routes\n"
    assert left.err.startswith(f"Error: {bad}:1:22: pipelines.matrix.complement: unknown rule kind 'muonn'")
    left = leave("validate", str(bad), str(good), "--json")
    assert left.status == 2
    found = json.loads(left.out)
    assert [(result["file"], result["valid"]) for result in found] == [(str(bad), False), (str(good), True)]
    assert "unknown rule kind" in found[0]["error"]


def test_schema(run: Run) -> None:
    assert json.loads(run("schema")) == json_schema()


# --- explain, plan


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("spec", ["cosmos", "soap"])
def test_explain_has_one_row_a_parameter(spec: str, width: int, run: Run) -> None:
    text = run("explain", spec, "--model", "60m", width=width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    plan = build(spec, meta_model("60m")).plan
    rows = [line for line in text.splitlines() if re.search(r" (?:routes\.)?\d+\s*$", line)]
    assert len(rows) == len(plan)
    for row, line in zip(plan, rows, strict=True):
        name = row.entry.name if width == 120 else split_name(row.entry.name)[1]
        assert name in line
        assert f"{row.state_bytes:,}" in line
        assert row.pipeline in line
    for why in {row.why.partition(";")[0] for row in plan}:
        assert why in text
    for row in plan:
        assert row.role.why in text
    assert f"{plan.total_bytes:,}" in text


def test_explain_for_programs(run: Run) -> None:
    told = json.loads(run("explain", "galore", "--model", "tiny", "--vocab", "256", "--set", "matrix.selector.rank=0.25", "--json"))
    rows = {row["name"]: row for row in told["parameters"]}
    query = rows["model.layers.0.self_attn.q_proj.weight"]
    assert (query["shape"], query["pipeline"], query["rank"]) == ([64, 64], "matrix", [16])
    assert rows["lm_head.weight"]["why"] == "routes.1: everything else; head by model get_output_embeddings()"
    assert told["state_bytes"] == sum(row["state_bytes"] for row in told["parameters"])


@pytest.mark.parametrize("spec", ["cosmos", "galore", "soap", "trion", "adamw"])
def test_plan_is_what_is_allocated(spec: str, run: Run) -> None:
    """The bytes of each layer and in total are those of the model that `train` makes."""
    told = json.loads(run("plan", spec, "--model", "tiny", "--vocab", "256", "--json"))
    model = make_model("tiny")
    optimizer = build(spec, model)
    for _ in range(2):
        for p in model.parameters():
            p.grad = p.detach() + 1e-3
        optimizer.step()
    assert told["state_bytes"] == measured_bytes(optimizer)
    assert told["state_bytes"] == sum(layer["state_bytes"] for layer in told["layers"])
    assert told["adamw_bytes"] == sum(layer["adamw_bytes"] for layer in told["layers"])
    assert sum(layer["parameters"] for layer in told["layers"]) == sum(p.numel() for p in model.parameters())


def test_plan_of_70b_needs_no_memory(run: Run) -> None:
    text = run("plan", "cosmos", "--model", "70b", "--dtype", "bfloat16", width=80)
    assert text.startswith("cosmos on 70b: 68,976,648,192 parameters in bfloat16\n")
    assert re.search(r"^model\.layers\.0-79 +80 +855,654,400 ", text, re.M)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_plan_names_the_tables_that_layers_share(run: Run) -> None:
    assert re.search(r"^tables +16,384 +16\.0 KiB +shared by layers, not saved", run("plan", "trion", "--model", "tiny"), re.M)
    assert "tables" not in run("plan", "cosmos", "--model", "tiny")


def stored_model(folder: Path) -> str:
    """A safetensors file that holds a header alone."""
    shapes = {"embed_tokens.weight": [500, 64], "layers.0.up_proj.weight": [256, 64], "layers.1.up_proj.weight": [256, 64]}
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return str(path)


def test_plan_fits_a_budget(tmp_path: Path, run: Run, leave: Callable[..., Left]) -> None:
    """The spec that is written keeps the budget; a budget that is too small is bad input."""
    model, out = stored_model(tmp_path), tmp_path / "mine.yaml"
    text = run("plan", "galore", "--model", model, "--fit-state", "0.2MiB", "--out", str(out), width=80)
    assert re.search(r"^first moments in bf16 +[\d.]+ KiB +[\d.]+ MiB +other\.state_dtype\.exp_avg fp32", text, re.M)
    assert re.search(r"^training +[\d,]+ +[\d.]+ MiB +without activations", text, re.M)
    assert "note: roles are found from names and shapes" in text
    told = json.loads(run("plan", str(out), "--model", model, "--json"))
    assert told["state_bytes"] <= 0.2 * 2**20 < told["adamw_bytes"]
    assert told["dtype"] == "bfloat16"
    assert told["state_bytes"] == told["totals"]["state_bytes"] == sum(group["state_bytes"] for group in told["groups"])
    for options, message in (
        (["--fit-state", "1KiB"], "no variant of 'galore' fits into 0.00 MiB for the state"),
        (["--fit", "1GiB", "--ranks", "2"], "does not take --ranks"),
        (["--out", str(out)], "add a budget, for example --fit 24GiB"),
        (["--vocab", "3"], "decide the vocabulary"),
    ):
        left = leave("plan", "galore", "--model", model, *options)
        assert left.status == 2
        assert message in left.err


def test_explain_tells_how_a_parameter_is_seen(tmp_path: Path, run: Run) -> None:
    """GPT-2 stores the weights of its linear layers as (in, out)."""
    config = tmp_path / "config.json"
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config.write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 500, **ends}))
    text = run("explain", "cosmos", "--model", str(config), width=80)
    assert re.search(r"^transformer\.wte\.weight +500x64 +other +- +256,004 +1 *$", text, re.M)
    assert re.search(r"^  attn\.c_attn\.weight +64x192/3, transposed +matrix +64 +[\d,]+ +0 *$", text, re.M)


@pytest.mark.parametrize(
    ("name", "layer", "rest"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3", "self_attn.q_proj.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens", "weight"),
        ("transformer.h.0.attn.0.weight", "transformer.h.0", "attn.0.weight"),
        ("0.weight", "0", "weight"),
        ("scale", "scale", "scale"),
    ],
)
def test_a_parameter_belongs_to_a_layer(name: str, layer: str, rest: str) -> None:
    assert split_name(name) == (layer, rest)


def test_layers_keep_their_order() -> None:
    names = [layer.name for layer in layers(build("muon", meta_model("tiny")).plan)]
    assert names == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]


# --- several ranks


def test_plan_tells_what_ranks_hold_and_send(run: Run) -> None:
    told = json.loads(run("plan", "cosmos", "--model", "tiny", "--ranks", "4", "--mesh", "fsdp+tp", "--json"))
    ranks = told["on_ranks"]
    assert (ranks["mesh"], ranks["shape"], ranks["ranks"]) == ("fsdp+tp", [2, 2], 4)
    assert len(ranks["state_bytes"]) == len(ranks["sent_bytes"]) == 4
    assert sum(ranks["state_bytes"]) > told["state_bytes"]  # parameters that tensor parallelism does not shard are held twice
    assert "on_ranks" not in json.loads(run("plan", "cosmos", "--model", "tiny", "--json"))
    text = run("plan", "cosmos", "--model", "tiny", "--ranks", "4", "--mesh", "tp", width=80)
    assert re.search(r"^tp 4, each rank +smallest +mean +largest +total / ranks", text, re.M)
    assert re.search(r"^sent in a step +[\d.]+ KiB", text, re.M)
    assert re.search(r"^7 parameters are not sharded by this mesh", text, re.M)
    assert max(len(line.rstrip()) for line in text.splitlines()[:-1]) <= 80


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["plan", "muon", "--mesh", "tp"], "need the number of ranks; add it, for example --ranks 8"),
        (["plan", "muon", "--ranks", "4", "--shape", "2by2"], "--shape '2by2': give whole numbers with x between them, such as 2x4"),
        (["verify", "muon", "--ranks", "4", "--mesh", "hsdp", "--shape", "3x2"], "shape 3x2 does not fit mesh hsdp of 4 ranks"),
    ],
)
def test_a_mesh_that_is_none_is_bad_input(options: list[str], told: str, leave: Callable[..., Left]) -> None:
    left = leave(*options)
    assert left.status == 2
    assert told in left.err


@pytest.mark.slow
def test_verify_certifies(leave: Callable[..., Left]) -> None:
    left = leave("verify", "muon", "--ranks", "2", "--steps", "2", width=80)
    assert left.status == 0, left.err
    assert left.out.startswith("muon on tiny: 133,440 parameters in float64, random gradients, 2 steps\none process and fsdp 2 on cpu\n")
    assert re.search(r"^model\.layers\.1 +[\d.e+-]+ +[\d.e+-]+ +[\d.e+-]+ *$", left.out, re.M)
    rows = re.findall(r"^(\d) +([\d,]+) +([\d,]+) +([\d,]+) +([\d,]+) +[\d,]+ +[\d,]+ *$", left.out, re.M)
    assert [rank for rank, *_ in rows] == ["0", "1"]
    assert all(held == planned and sent == expected for _, held, planned, sent, expected in rows)
    assert left.out.splitlines()[-1].startswith("equal: ")


def test_verify_leaves_with_1_when_ranks_do_not_end(leave: Callable[..., Left]) -> None:
    left = leave("verify", "muon", "--ranks", "2", "--time-limit", "1")
    assert left.status == 1
    assert re.match(r"Error: not done after 1 seconds \(--time-limit\): ranks 0, 1\nrank 0 (had not started|was at\n)", left.err)


# --- train


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("to be or not to be, that is the question\n" * 40)
    return file


@pytest.fixture
def quick(text: Path) -> list[str]:
    """Arguments of a short run."""
    return ["--data", str(text), "--length", "16", "--batch-size", "2", "--eval-batches", "1"]


def test_train_takes_all_that_a_run_is_made_of() -> None:
    command: Any = typer.main.get_command(app)
    options = {parameter.name for parameter in command.commands["train"].params}
    assert set(TrainConfig.model_fields) - {"overrides"} <= options  # --set gives overrides


def test_train_tells_how_it_goes(quick: list[str], leave: Callable[..., Left]) -> None:
    left = leave("train", "cosmos", *quick, "--steps", "4", "--eval-every", "2", width=80)
    assert left.status == 0
    assert re.search(r"^cosmos +0\.002 +\d\.\d{4} +\d\.\d{3} +[\d.]+ [KM]iB +[\d.]+ +[\d.]+ +[\d,]+$", left.out, re.M)
    assert max(len(line.rstrip()) for line in left.out.splitlines()) <= 80
    lines = left.err.splitlines()
    assert lines[0].startswith("text: ")
    assert re.fullmatch(r"cosmos: 133,440 parameters on cpu, [\d.]+ MiB of optimizer state", lines[1])
    assert re.fullmatch(r"cosmos  update 0  validation \d\.\d{3} \(\d\.\d\d bits/byte\)", lines[2])
    told = r"cosmos  update 2  loss \d\.\d{3}  validation \d\.\d{3} \(\d\.\d\d bits/byte\)  [\d,]+ tokens/s  \d+:\d\d left"
    assert re.fullmatch(told, lines[3])


def test_train_for_programs(quick: list[str], leave: Callable[..., Left]) -> None:
    left = leave("train", "muon", *quick, "--steps", "2", "--lr", "0.01", "--name", "mine", "--set", "matrix.complement.steps=2", "--json")
    assert left.status == 0
    result = json.loads(left.out)
    assert (result["run"], result["status"], result["step"], result["lr"]) == ("mine", "finished", 2, 0.01)
    assert len(result["train"]) == 2


def test_train_goes_on_where_it_stopped(quick: list[str], tmp_path: Path, leave: Callable[..., Left]) -> None:
    folder = tmp_path / "run"
    constant = [*quick, "--min-lr-ratio", "1", "--warmup", "0", "--out", str(folder)]
    first = leave("train", "cosmos", *constant, "--steps", "2")
    assert first.status == 0
    assert f"checkpoint: {folder / 'last.pt'}" in first.out
    second = leave("train", "cosmos", *constant, "--steps", "4", "--resume", "--json")
    assert second.status == 0
    assert "resumed after 2 updates" in second.err
    whole = leave("train", "cosmos", *constant[:-1], str(tmp_path / "whole"), "--steps", "4", "--json")
    assert json.loads(second.out)["train"] == json.loads(whole.out)["train"]


def test_train_that_is_interrupted(quick: list[str], tmp_path: Path, leave: Callable[..., Left], monkeypatch: pytest.MonkeyPatch) -> None:
    show = RunProgress.__call__

    def interrupt(self: RunProgress, event: Any) -> None:
        show(self, event)
        if isinstance(event, Stepped) and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunProgress, "__call__", interrupt)
    left = leave("train", "cosmos", *quick, "--steps", "9", "--out", str(tmp_path / "run"))
    assert left.status == 1
    assert left.err.splitlines()[-1] == ("Error: cosmos was interrupted after 2 updates; to continue, run the same command with --resume")
    assert (tmp_path / "run" / "last.pt").exists()
    left = leave("train", "cosmos", *quick, "--steps", "9")
    assert left.err.splitlines()[-1] == "Error: cosmos was interrupted after 2 updates; nothing was saved"


def test_train_that_fails_leaves_with_1(quick: list[str], leave: Callable[..., Left]) -> None:
    """Bad input is found before a run begins. A run that fails later exits with status 1."""
    left = leave("train", "cosmos", *quick, "--steps", "9", "--lr", "1e30", "--warmup", "0", "--clip", "0")
    assert left.status == 1
    assert re.match(r"Error: cosmos: the (loss|gradient norm) is (nan|inf) after \d updates\. ", left.err.splitlines()[-1])
    assert "Traceback" not in left.err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Spec:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("subspace_opt.cli.specs.load_spec", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["show", "cosmos"])


# --- demo


@pytest.fixture
def quick_demo(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on a few words and the smallest model."""
    from subspace_opt.lab.demo import PROBLEM

    small = {"model": "tiny", "length": 16, "batch_size": 2, "eval_batches": 1, "data": (str(text),)}
    monkeypatch.setattr("subspace_opt.lab.demo.PROBLEM", PROBLEM.model_copy(update=small))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_demo")
def test_demo_ends_with_table_picture_and_what_to_try(tmp_path: Path, leave: Callable[..., Left]) -> None:
    folder = tmp_path / "demo"
    left = leave("demo", "--steps", "2", "--out", str(folder), width=80)
    assert left.status == 0, left.err
    runs = re.findall(r"^(\w+) +[\d.]+ +\d\.\d{4} ", left.out, re.M)
    assert runs == ["cosmos", "adamw", "galore", "muon"]
    assert f"picture: {folder / 'comparison.png'}" in left.out
    assert "Try next:" in left.out
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert left.err.count("text: ") == 1  # once for all runs
    told = json.loads(leave("demo", "--steps", "2", "--out", str(folder), "--json").out)
    assert [(run["run"], run["step"]) for run in told] == [(name, 2) for name in runs]
    assert told[0]["train"] == json.loads((folder / "comparison.json").read_text())[0]["train"]


def test_what_the_demo_says_to_try_works(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^  subspace-opt ([^\n]+?)(?:   |$)", training.TRY_NEXT, re.M)
    assert len(commands) == 4
    monkeypatch.setattr("subspace_opt.lab.train", lambda *_, **__: (_ for _ in ()).throw(LabError("would train")))
    for command in commands:
        if command.startswith("train"):
            with pytest.raises(SystemExit):
                main(command.split())
        else:
            assert run(*command.split())


def test_demo_that_cannot_write_says_so_first(tmp_path: Path, leave: Callable[..., Left]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    left = leave("demo", "--out", str(file / "demo"))
    assert left.status == 2
    assert left.err == f"Error: out: the folder {file / 'demo'} cannot be made: Not a directory. Choose another\n"


# --- new-plugin


def test_new_plugin(tmp_path: Path, run: Run, leave: Callable[..., Left]) -> None:
    folder = tmp_path / "subspace-opt-top-peaks"
    assert str(folder) in run("new-plugin", "top-peaks", "--in", str(tmp_path))
    assert (folder / "pyproject.toml").exists()
    left = leave("new-plugin", "top-peaks", "--in", str(tmp_path))
    assert (left.status, left.err) == (2, f"Error: the folder '{folder}' exists; remove it, or choose another name\n")


# --- live progress on a terminal


class Terminal:
    """A terminal of a given width that records its output."""

    def __init__(self, width: int) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=True, width=width, color_system=None, legacy_windows=False)

    @property
    def lines(self) -> list[str]:
        """All lines that were drawn, without the codes that move the cursor."""
        plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.file.getvalue())
        return [line.rstrip() for line in plain.replace("\r", "\n").splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_bars_tell_loss_speed_and_time_left(width: int) -> None:
    terminal = Terminal(width)
    with RunProgress(terminal.console, [("cosmos", 300), ("muon", 300)]) as progress:
        assert not progress.began
        progress(Started("cosmos", 0, 300, 133440, 1 << 20, "cpu", "some text"))
        progress(Evaluated("cosmos", 0, 5.546))
        progress(Stepped("cosmos", 150, 300, 2.345, 2e-3, 12345.6, 3725.0))
        progress(Saved("cosmos", 150, "run/last.pt"))
        assert (progress.began, progress.saved) == (True, "run/last.pt")
        terminal.console.print(progress._bars.get_renderable())
        progress(Ended("cosmos", 150, "interrupted", 61.0))
    assert "text: some text" in terminal.lines
    assert "cosmos: 133,440 parameters on cpu, 1.0 MiB of optimizer state" in terminal.lines
    rows = [line for line in terminal.lines if re.match(r"cosmos ━[━╸╺ ]+150/300 loss 2\.345  val 5\.546  ", line)]
    assert rows[0].endswith("  12,346 tokens/s  1:02:05 left")
    assert rows[-1].endswith("  interrupted in 1:01")
    assert all(len(line) <= width for line in terminal.lines)


def test_a_long_name_gives_way_to_the_numbers() -> None:
    terminal, name = Terminal(80), "online-subspace-descent"
    with RunProgress(terminal.console, [(name, 300)]) as progress:
        progress(Stepped(name, 150, 300, 2.345, 2e-3, 12345.6, 3725.0))
    assert re.fullmatch(r"online-s\S*… [━╸╺ ]+150/300 loss 2\.345  12,346 tokens/s  1:02:05 left", terminal.lines[-1])
