"""Configurations of omegaconf, Hydra, jsonargparse and Optuna as specs, options and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import subspace_opt
from subspace_opt import SpecError, build, load_spec

omegaconf = pytest.importorskip("omegaconf")
OmegaConf = omegaconf.OmegaConf

SPEC = """
name: mine
pipelines:
  matrix:
    selector: {kind: svd, rank: "${rank}"}
    inside: [adam, {kind: scale, by: keller}]
    complement: {kind: muon}
  other: {complement: adam}
routes:
  - {role: [hidden, conv], use: matrix}
  - {use: other}
"""
SELECTOR = "optimizer.spec.pipelines.matrix.selector"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def node(rank: Any = 4) -> Any:
    return OmegaConf.create({"rank": rank, "optimizer": {"spec": OmegaConf.create(SPEC), "lr": 1e-2}})


# ---------------------------------------------------------------------------------------------------------------- omegaconf


def test_a_dict_config_is_a_spec_with_interpolations_resolved() -> None:
    spec = node().optimizer.spec
    assert load_spec(spec) == load_spec(OmegaConf.to_container(spec, resolve=True))
    assert build(spec, model()).plan.rows[0].ranks == [4]
    assert OmegaConf.to_container(spec)["pipelines"]["matrix"]["selector"]["rank"] == "${rank}", "the configuration is unchanged"


def test_options_may_be_nodes_too() -> None:
    overrides = OmegaConf.create(
        {"matrix.selector.rank": 2, "matrix.inside": ["adam"], "routes": [{"role": ["bias"], "use": "other"}, {"use": "matrix"}]}
    )
    optimizer = build(node().optimizer.spec, model(), overrides=overrides, roles=OmegaConf.create({"1.*": "hidden"}))
    assert [row.pipeline for row in optimizer.plan.rows] == ["matrix", "other", "matrix", "matrix"]
    assert (optimizer.plan.rows[0].ranks, len(optimizer.spec.pipelines["matrix"].inside)) == ([2], 1)


def test_saved_files_are_specs(tmp_path: Path) -> None:
    OmegaConf.save(node().optimizer.spec, tmp_path / "spec.yaml", resolve=False)
    with pytest.raises(SpecError, match=r"spec.yaml:\d+:\d+: pipelines.matrix.selector.rank"):
        load_spec(tmp_path / "spec.yaml")  # the interpolation is text in a file
    OmegaConf.resolve(config := node())
    OmegaConf.save(config.optimizer.spec, tmp_path / "spec.yaml")
    assert load_spec(tmp_path / "spec.yaml") == load_spec(node().optimizer.spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (f"{SELECTOR}.kind=svdd", r"the given mapping: pipelines.matrix.selector: unknown selector kind 'svdd'; did you mean 'svd'\?"),
        (f"{SELECTOR}.rnk=3", "the given mapping: pipelines.matrix.selector.rnk: unknown key 'rnk'; did you mean 'rank'"),
        ("rank=many", "the given mapping: pipelines.matrix.selector.rank: should be"),
    ],
)
def test_errors_name_the_field(change: str, message: str) -> None:
    config = OmegaConf.merge(node(), OmegaConf.from_dotlist([change]))
    with pytest.raises(SpecError, match=message):
        load_spec(config.optimizer.spec)


def test_a_missing_value_is_omegaconfs_error() -> None:
    with pytest.raises(
        omegaconf.errors.InterpolationToMissingValueError,
        match=r"Missing mandatory value: rank\n.*optimizer.spec.pipelines.matrix.selector.rank",
    ):
        load_spec(node("???").optimizer.spec)


# -------------------------------------------------------------------------------------------------------------------- Hydra


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "config.yaml").write_text("defaults: [{optimizer: preset}, _self_]\nrank: 4\n")
    preset = "_target_: subspace_opt.build\nspec: cosmos\nlr: 1e-2\noverrides:\n  matrix.selector.rank: ${rank}\n"
    (tmp_path / "optimizer" / "preset.yaml").write_text(preset)
    indented = SPEC.replace("\n", "\n  ").rstrip()
    (tmp_path / "optimizer" / "mine.yaml").write_text(f"_target_: subspace_opt.build\nlr: 1e-2\nspec:{indented}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "name", "rank"),
    [
        ([], "cosmos", 4),
        (["rank=2"], "cosmos", 2),
        (["optimizer.overrides={matrix.selector.rank: 3}"], "cosmos", 3),
        (["optimizer=mine", "rank=3"], "mine", 3),
        (["optimizer=mine", f"{SELECTOR}.rank=5"], "mine", 5),
    ],
)
def test_hydra_instantiates_build(configs: Path, changes: list[str], name: str, rank: int) -> None:
    hydra = pytest.importorskip("hydra")
    net = model()
    with hydra.initialize_config_dir(str(configs), version_base=None):
        optimizer = hydra.utils.instantiate(hydra.compose("config", changes).optimizer, model_or_params=net)
    assert isinstance(optimizer, subspace_opt.SubspaceOptimizer)
    assert (optimizer.spec.name, optimizer.plan.rows[0].ranks, optimizer.param_groups[0]["lr"]) == (name, [rank], 1e-2)
    assert optimizer.param_groups[0]["params"][0] is net[0].weight
    assert optimizer.plan.rows[0].role.why == "module Linear"


def test_nested_overrides_say_what_is_wrong(configs: Path) -> None:
    hydra = pytest.importorskip("hydra")
    with hydra.initialize_config_dir(str(configs), version_base=None):
        config = hydra.compose("config", ["+optimizer.overrides.matrix.selector.rank=3"])
    with pytest.raises(
        hydra.errors.InstantiationException, match=r"override 'matrix': pipelines.matrix.selector: a selector needs a `kind`"
    ):
        hydra.utils.instantiate(config.optimizer, model_or_params=model())


# -------------------------------------------------------------------------------------------------- jsonargparse and Optuna


def test_jsonargparse_reads_the_arguments_of_build(tmp_path: Path) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(build, "optimizer", skip={"model_or_params"})
    (tmp_path / "run.yaml").write_text(
        "optimizer:\n  lr: 1e-2\n  spec:" + SPEC.replace('"${rank}"', "3").replace("\n", "\n    ").rstrip() + "\n"
    )
    given = parser.parse_args(["--config", str(tmp_path / "run.yaml"), "--optimizer.lr", "1e-3"])
    optimizer = build(model_or_params=model(), **vars(parser.instantiate(given).optimizer))
    assert (optimizer.spec.name, optimizer.plan.rows[0].ranks, optimizer.param_groups[0]["lr"]) == ("mine", [3], 1e-3)
    given = parser.parse_args(["--optimizer.spec", "cosmos", "--optimizer.overrides", '{"matrix.selector.rank": 2}'])
    optimizer = build(model_or_params=model(), **vars(parser.instantiate(given).optimizer))
    assert (optimizer.spec.name, optimizer.plan.rows[0].ranks) == ("cosmos", [2])


def test_a_study_of_optuna_sets_overrides() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranks = []

    def objective(trial: Any) -> float:
        optimizer = build("cosmos", model(), overrides={"matrix.selector.rank": trial.suggest_int("rank", 1, 5)})
        ranks.append(optimizer.plan.rows[0].ranks[0])
        return abs(ranks[-1] - 3.0)

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=8)
    assert ranks == [trial.params["rank"] for trial in study.trials]
    assert len(set(ranks)) > 2
