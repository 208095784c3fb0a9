"""Write the pages that describe the package from the package itself, so that they cannot become outdated.

`spec.md` comes from the JSON schema of a spec, `presets/` from the YAML files of the package, `contributing.md` and `changelog.md` from the
files in the root of the repository. mkdocs calls `on_config` and `on_files`.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from subspace_opt.algebra.frame import Frame
from subspace_opt.plan.costs import flops
from subspace_opt.spec import Spec, json_schema, load_spec, preset_names
from subspace_opt.spec.picture import hidden_pipeline, pipeline_svg
from subspace_opt.spec.presets import BUILT_IN

Schema = dict[str, Any]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace each folder in `nav` by its pages."""
    written = {"presets/": ["presets/index.md", *(f"presets/{name}.md" for name in preset_names(installed=False))]}
    nav = []
    for entry in config.nav or []:
        ((title, target),) = entry.items()
        if isinstance(target, str) and target.endswith("/"):
            on_disk = sorted((Path(config.docs_dir) / target).glob("*.md"))
            target = written.get(target) or [target + page.name for page in on_disk]
        if target:
            nav.append({title: target})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those on disk."""
    presets = {name: load_spec(name) for name in preset_names(installed=False)}
    pages = {"spec.md": spec_page(json_schema()), "presets/index.md": preset_index(presets)}
    pages |= {f"presets/{name}.md": preset_page(name, spec) for name, spec in presets.items()}
    pages |= {page: root_page(file) for page, file in ROOT_PAGES.items()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def root_page(file: str) -> str:
    """A file of the repository's root as a page: links into `docs/` and to other such files lead to pages of the site."""
    text = (Path(__file__).parent.parent / file).read_text(encoding="utf-8").replace("](docs/", "](")
    for page, other in ROOT_PAGES.items():
        text = text.replace(f"]({other})", f"]({page})")
    return text


# --- the spec reference

SECTIONS = {"Pipeline": "A pipeline", "Mix": "Mix", "Route": "A route", "Defaults": "Defaults"}
FAMILIES = {"selector": "Selectors", "rule": "Rules", "weight_rule": "Weight rules"}


def spec_page(schema: Schema) -> str:
    """The page of the spec: one table of fields for the spec, for each of its parts and for each kind."""
    defs = schema["$defs"]
    parts = [
        "# Spec reference\n\n"
        "A spec is a YAML or JSON file with these fields. An unknown field is an error. The models that check a spec generate "
        "this page. `subspace-opt schema` prints the JSON schema for an editor.\n",
        fields(schema),
    ]
    for name, title in SECTIONS.items():
        parts.append(f"## {title} {{#{name}}}\n\n{defs[name].get('description', '')}\n\n{fields(defs[name])}")
    parts.append(
        '## A schedule {#schedule}\n\n<a id="Ramp"></a><a id="Piecewise"></a>A number that changes with the count of updates, '
        "in place of a number; see [schedules](schedules.md).\n"
    )
    parts += [f"{defs[name]['description']}\n\n{fields(defs[name])}" for name in ("Ramp", "Piecewise")]
    for family, title in FAMILIES.items():
        one = title.lower().removesuffix("s")
        parts.append(f"## {title} {{#{family}}}\n\nA {one} is the name of a kind, or a mapping with `kind` and the fields of that kind.\n")
        for names, kind in by_class(family, defs):
            heading = ", ".join(f"`{name}`" for name in names)
            anchors = "".join(f'<a id="{family}.{name}"></a>' for name in names[1:])
            parts.append(f"### {heading} {{#{family}.{names[0]}}}\n\n{anchors}{kind.get('description', '')}\n\n{fields(kind)}")
    return "\n\n".join(parts)


def by_class(family: str, defs: Schema) -> list[tuple[list[str], Schema]]:
    """Kinds sorted by name; kinds that differ only by name share one entry."""
    groups: list[tuple[list[str], Schema]] = []
    for key in sorted(key for key in defs if key.startswith(f"{family}.")):
        name, kind = key.removeprefix(f"{family}."), dict(defs[key])
        kind["properties"] = {field: node for field, node in kind["properties"].items() if field != "kind"}
        for names, known in groups:
            if known == kind:
                names.append(name)
                break
        else:
            groups.append(([name], kind))
    return groups


def fields(node: Schema) -> str:
    """A table of the fields of one part of a spec."""
    rows = [
        f"| `{name}` | {cell(type_of(field))} | {cell(default_of(field, name in node.get('required', ())))} "
        f"| {cell(field.get('description', ''))} |"
        for name, field in node.get("properties", {}).items()
    ]
    return "\n".join(["| field | value | default | |", "| --- | --- | --- | --- |", *rows]) if rows else "No fields.\n"


def default_of(field: Schema, required: bool) -> str:
    """The cell of a field's default."""
    if required or "default" not in field:
        return "required" if required else ""
    default = field["default"]
    if default in ("", [], {}):
        return "empty"
    return "none" if default is None else f"`{default if isinstance(default, str) else compact(default)}`"


def compact(value: Any) -> str:
    """A default value in YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {compact(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(compact(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def type_of(node: Schema) -> str:
    """The type of a field in words: a number with its limits, the allowed words, or a link to the table of a part."""
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[1]
        return f"[{name.lower().replace('_', ' ')}](#{name})"
    if "anyOf" in node:
        # The next column shows a default of null or an empty list, so this one leaves null out.
        nothing = {"type": "null"} if node.get("default") in (None, []) else None
        given = [choice for choice in node["anyOf"] if choice != nothing]
        return " or ".join(dict.fromkeys(type_of(choice) for choice in given))
    if "enum" in node:
        return " or ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if node.get("type") == "array":
        return f"list of {type_of(node['items'])}" if "items" in node else "list"
    if node.get("type") == "object":
        inner = node.get("additionalProperties")
        return f"mapping of names to {type_of(inner)}" if isinstance(inner, dict) else "mapping"
    words = {"string": "text", "boolean": "`true` or `false`", "null": "`null`"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {node[key]:g}" for key, sign in signs.items() if key in node)
    kind = node.get("type", "any")
    return f"{words.get(kind, kind)} {limits}".strip()


def cell(text: str) -> str:
    """Escape text for one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


# --- the presets


def preset_index(presets: dict[str, Spec]) -> str:
    """The page that lists the presets."""
    rows = [f"| [{name}]({name}.md) | {cell(spec.about)} | {cell(sources(spec))} |" for name, spec in presets.items()]
    return "\n".join(
        [
            "# Presets\n",
            "A preset is a spec file that comes with the package. It is an algorithm as its authors published it. If paper and "
            "code differ, there may be a preset for each. [Fidelity](../fidelity.md) shows how each was checked.\n",
            "| preset | what it does | source |",
            "| --- | --- | --- |",
            *rows,
        ]
    )


def preset_page(name: str, spec: Spec) -> str:
    """The page of one preset."""
    text = (BUILT_IN / f"{name}.yaml").read_text(encoding="utf-8")
    body = text[text.index("defaults:") :]  # the page shows the prose above it separately
    parts = [
        f"# {name}",
        f"Source: {sources(spec)}" if spec.source else "",
        spec.about,
        pipeline_svg(hidden_pipeline(spec), name),
        f'```yaml title="subspace_opt/spec/presets/{name}.yaml"\n{body}```',
        f'```python\nfrom subspace_opt import build\n\noptimizer = build("{name}", model)\n```',
        "## Cost of a matrix\n\n" + cost_table(spec),
        "## Published settings\n\n" + "\n".join(f"- {line}" for line in spec.published) if spec.published else "",
        "## Against its sources\n\n" + spec.notes + "\n\nMeasured parity: [fidelity](../fidelity.md)." if spec.notes else "",
        "To change the preset, save the spec as a file of your own, edit it, and give `build` the path. "
        "The [spec reference](../spec.md) explains every field.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


MATRICES = ((512, 512), (1376, 512), (2048, 2048), (5461, 2048), (4096, 11008))


def gigaflop(operations: float) -> str:
    """Operations in units of 1e9, with three significant digits."""
    billions = operations / 1e9
    return f"{billions:,.0f}" if billions >= 100 else f"{billions:.3g}"


def cost_table(spec: Spec) -> str:
    """State and operations of the pipeline that hidden matrices use, for some shapes."""
    pipeline = hidden_pipeline(spec)
    rows = ["| matrix | rank | state, entries / mn | GFLOP an update | GFLOP a refresh |", "| --- | --- | --- | --- | --- |"]
    for m, n in MATRICES:
        frame = Frame.of(pipeline, m, n)
        entries = sum(prod(slot.shape) for slot in frame.slots.values())
        cost = flops(frame)
        update, refresh = (gigaflop(number) if number else "elementwise" for number in cost)
        refresh = refresh if frame.opens and cost[1] else "none"
        rows.append(f"| {m} x {n} | {frame.rank or ''} | {entries / (m * n):.3f} | {update} | {refresh} |")
    return "\n".join(rows)


def sources(spec: Spec) -> str:
    """The sources of a preset, with links to the paper and to the commit of the code."""
    links = []
    for source in spec.source:
        if paper := re.fullmatch(r"arXiv:(\d+\.\d+)", source):
            links.append(f"[{source}](https://arxiv.org/abs/{paper[1]})")
        elif code := re.fullmatch(r"(github\.com/[^/\s]+/[^/\s]+)(?: at ([0-9a-f]+))?", source):
            tree = f"/tree/{code[2]}" if code[2] else ""
            links.append(f"[{source}](https://{code[1]}{tree})")
        else:
            links.append(source)
    return ", ".join(links)
