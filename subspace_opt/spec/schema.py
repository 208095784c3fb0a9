"""The JSON schema of a spec, for editors."""

from __future__ import annotations

from typing import Any

from ..registry import FAMILIES, kinds
from .model import Spec

LISTED = [{"$ref": "#/$defs/rule"}, {"$ref": "#/$defs/weight_rule"}]  # families whose places hold one component or a list


def json_schema() -> dict[str, Any]:
    """The JSON schema of a spec file, with every kind that is registered or installed."""
    schema = Spec.model_json_schema()
    defs: dict[str, Any] = schema.setdefault("$defs", {})
    for family in FAMILIES:
        known = kinds(family)
        for name, cls in known.items():
            own = cls.model_json_schema()
            defs |= own.pop("$defs", {})
            own["properties"]["kind"] = {"const": name, "title": "Kind", "type": "string"}
            own["required"] = sorted({*own.get("required", []), "kind"})
            defs[f"{family}.{name}"] = own
        refs = [{"$ref": f"#/$defs/{family}.{name}"} for name in known]
        defs[family] = {"anyOf": [{"enum": list(known), "type": "string"}, {"type": "null"}, *refs]}
    schema = _with_families(schema)
    schema["required"] = ["pipelines"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _with_families(node: Any) -> Any:
    """Replace the mark `x-family` by a reference to the union of the family's kinds, and let one rule replace a list of rules."""
    if isinstance(node, list):
        return [_with_families(v) for v in node]
    if not isinstance(node, dict):
        return node
    if "x-family" in node:
        return {"$ref": f"#/$defs/{node['x-family']}", **{k: v for k, v in node.items() if k != "x-family"}}
    out = {k: _with_families(v) for k, v in node.items()}
    if out.get("type") == "array" and out.get("items") in LISTED:
        one = out.pop("items")
        del out["type"]
        out["anyOf"] = [one, {"type": "array", "items": one}]
    return out
