"""Packages with kinds and presets: those in `plugins/`, generated skeletons, and broken ones."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from launch import context

from subspace_opt import SpecError, load_spec
from subspace_opt.cli.scaffold import Kind, ScaffoldError, new_plugin
from subspace_opt.registry import RegistryError
from subspace_opt.spec import preset_names, presets

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
PLAIN = "pipelines: {all: {complement: sgd}}\nroutes: [{use: all}]\n"


def dist_info(site: Path, name: str, version: str, entry_points: Mapping[str, Mapping[str, str]]) -> None:
    """Write the metadata that an installer writes for a package: name, version and entry points."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [line for group, points in entry_points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run_its_tests(package: Path, site: Path) -> None:
    """Run a package's own tests in a process in which it is installed."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    dist_info(site, project["name"], project["version"], project["entry-points"])
    source = package / "src" if (package / "src").exists() else package
    arguments = ["-q", "-p", "no:cacheprovider", "-W", "error", "-c", str(package / "pyproject.toml"), str(package / "tests")]
    process = context.Process(target=_run_pytest, args=(site, [str(ROOT), str(source), str(site)], arguments), daemon=False)
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    said = (site / "output").read_text()
    assert process.exitcode == 0, said[-6000:]
    assert re.search(r"^\d+ passed", said, re.MULTILINE), said


def _run_pytest(site: Path, path: list[str], arguments: list[str]) -> None:
    """Run pytest in this process, which a server that has imported torch has forked, with the folders of `path` on the import path."""
    os.chdir(site)
    output = os.open(site / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[:0] = path
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    torch.set_num_threads(1)
    sys.exit(pytest.main(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_passes_its_own_tests(package: Path, tmp_path: Path) -> None:
    run_its_tests(package, tmp_path)


def test_there_is_a_package_for_a_selector_a_rule_and_presets() -> None:
    groups = {next(iter(tomllib.loads((p / "pyproject.toml").read_text())["project"]["entry-points"])) for p in PACKAGES}
    assert groups == {"subspace_opt.plugins", "subspace_opt.presets"}
    assert len(PACKAGES) >= 3


# --------------------------------------------------------------------------------------------------------------- skeletons


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["selector", "rule", "preset"])
def test_a_skeleton_passes_its_own_tests(kind: Kind, tmp_path: Path) -> None:
    folder = new_plugin(f"some-{kind}s", tmp_path / "here", kind)
    assert folder == tmp_path / "here" / f"subspace-opt-some-{kind}s"
    assert "@" not in "".join(file.read_text() for file in folder.rglob("*.toml"))
    run_its_tests(folder, tmp_path / "site")


def test_a_skeleton_tells_what_it_cannot_be_called(tmp_path: Path) -> None:
    for name, kind, message in (
        ("Svd", "selector", "'Svd' is not a valid name: use lower-case letters"),
        ("a/b", "rule", "'a/b' is not a valid name"),
        ("lambda", "rule", "'lambda' is not a valid name"),
        ("svd", "selector", "the selector 'svd' exists: subspace_opt.selectors.svd.Svd"),
        ("kron-eigen", "selector", "the selector 'kron_eigen' exists"),
        ("cosmos", "preset", "the preset 'cosmos' exists"),
        ("step", "rule", "the class name 'Step' is used by the library"),
        ("some", "preconditioner", "a plugin must be one of selector, rule, weight_rule, preset, not 'preconditioner'"),
    ):
        with pytest.raises(ScaffoldError) as caught:
            new_plugin(name, tmp_path, kind)  # type: ignore[arg-type]
        assert message in str(caught.value)
    assert not list(tmp_path.iterdir())
    new_plugin("svd", tmp_path, "preset")
    with pytest.raises(RegistryError, match="exists; remove it"):
        new_plugin("subspace-opt-svd", tmp_path, "preset")


# ----------------------------------------------------------------------------------------------------------------- presets


class Site:
    """A folder on the import path, for packages of presets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, files: Mapping[str, str] | None) -> None:
        """A package with these files; None for one whose module cannot be imported."""
        dist_info(self.folder, name, "1.0", {presets.GROUP: {name: name.replace("-", "_")}})
        if files is not None:
            module = self.folder / name.replace("-", "_")
            module.mkdir()
            (module / "__init__.py").write_text("")
            for file, text in files.items():
                (module / file).write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(presets, "_searched", {})
    monkeypatch.setattr(presets, "_failures", {})
    monkeypatch.syspath_prepend(tmp_path)
    return Site(tmp_path)


def test_a_package_brings_presets_by_their_file_names(site: Site) -> None:
    site.add(
        "preset-pack-one", {"mine-a.yaml": "name: mine-a\n" + PLAIN, "mine-b.yaml": "name: mine-b\n" + PLAIN, "notes.txt": "no preset"}
    )
    assert load_spec("mine-a").name == "mine-a"
    assert load_spec("mine-b", {"all.complement": "sign"}).pipelines["all"].complement[0].model_dump() == {"kind": "sign"}
    assert {"mine-a", "mine-b", "cosmos"} <= set(preset_names())
    assert not {"mine-a", "mine-b"} & set(preset_names(installed=False))
    with pytest.raises(SpecError, match="no preset 'mine-c'; did you mean 'mine-"):
        load_spec("mine-c")


def test_packages_are_not_looked_at_for_a_built_in_preset(site: Site) -> None:
    site.add("preset-pack-lazy", {"lazy.yaml": PLAIN})
    load_spec("cosmos")
    assert not presets._searched
    assert "preset_pack_lazy" not in sys.modules
    load_spec("lazy")
    assert "preset_pack_lazy" in sys.modules


def test_a_broken_package_is_named_and_breaks_nothing(site: Site) -> None:
    site.add("preset-pack-gone", None)
    site.add("preset-pack-empty", {})
    site.add("preset-pack-fine", {"fine.yaml": "name: fine\n" + PLAIN})
    with pytest.warns(RuntimeWarning) as told:
        assert load_spec("fine").name == "fine"
    warnings = " ".join(str(w.message) for w in told)
    assert "preset package 'preset-pack-gone' (from preset-pack-gone 1.0) failed and is left out: ModuleNotFoundError" in warnings
    assert "preset package 'preset-pack-empty' (from preset-pack-empty 1.0) failed and is left out" in warnings
    assert "'preset_pack_empty' has no .yaml file" in warnings
    assert set(presets.failures()) == {"preset-pack-gone", "preset-pack-empty"}
    with pytest.raises(SpecError, match=r"no preset 'fin'; did you mean 'fine'.*; preset package 'preset-pack-empty' failed"):
        load_spec("fin")  # it does not warn again


def test_a_broken_file_of_a_package_is_told_where_it_is_broken(site: Site) -> None:
    site.add(
        "preset-pack-typo", {"good.yaml": PLAIN, "typo.yaml": "name: typo\npipelines: {all: {complment: sgd}}\nroutes: [{use: all}]\n"}
    )
    assert load_spec("good")
    with pytest.raises(SpecError, match=r"typo\.yaml:2:19: pipelines\.all\.complment: unknown key 'complment'; did you mean 'complement'"):
        load_spec("typo")


def test_two_packages_with_one_name_are_both_named(site: Site) -> None:
    site.add("preset-pack-left", {"twice.yaml": PLAIN, "left.yaml": PLAIN})
    site.add("preset-pack-right", {"twice.yaml": PLAIN})
    assert load_spec("left")
    with pytest.raises(SpecError, match=r"two packages have a preset 'twice': preset-pack-left 1\.0 .* and preset-pack-right 1\.0"):
        load_spec("twice")


def test_what_is_built_in_wins(site: Site) -> None:
    site.add("preset-pack-shadow", {"cosmos.yaml": "name: impostor\n" + PLAIN, "other-one.yaml": PLAIN})
    with pytest.warns(RuntimeWarning, match=r"the preset 'cosmos' of preset-pack-shadow 1\.0 .* is hidden by the built-in one"):
        load_spec("other-one")
    assert load_spec("cosmos").name == "cosmos"
