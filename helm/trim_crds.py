"""Makes tests/deploy/schemas/crds.json from files of CustomResourceDefinitions: `trim_crds.py FILE...`.

What is kept is what a manifest can be checked by: names, types, bounds. Names that aren't there are refused, as the API
server would drop them. Pods' templates are left out: they are checked as templates of the core.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).parents[1] / "tests" / "deploy" / "schemas" / "crds.json"
KEPT = ("type", "enum", "pattern", "minimum", "maximum", "minLength", "minItems", "maxItems", "required")
POD_TEMPLATE = "template"
CORE_OBJECTS = ("serveService", "headService")
"""Whole objects of the core within others: left open."""

Schema = dict[str, Any]


def trimmed(schema: Schema) -> Schema:
    """What is kept of a schema."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {name: schema[name] for name in KEPT if name in schema}
    if not _is_python(kept.get("pattern", "")):
        del kept["pattern"]
    if "properties" in schema:
        kept["properties"] = {name: _property(name, each) for name, each in schema["properties"].items()}
        kept["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = trimmed(schema["additionalProperties"])
    if isinstance(schema.get("items"), dict):
        kept["items"] = trimmed(schema["items"])
    return kept


def _is_python(pattern: str) -> bool:
    """Go's regular expressions have forms that Python's lack."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _property(name: str, schema: Schema) -> Schema:
    if name in CORE_OBJECTS or (name == POD_TEMPLATE and "spec" in schema.get("properties", {})):
        return {"type": "object"}
    return trimmed(schema)


def main(paths: list[str]) -> None:
    """Writes the schemas of the versions that are stored, by `group/version/kind`."""
    found: Schema = {}
    for path in paths:
        definition = yaml.safe_load(Path(path).read_text())["spec"]
        version = next(each for each in definition["versions"] if each["storage"])
        schema = trimmed(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        schema["properties"].pop("status", None)
        found[f"{definition['group']}/{version['name']}/{definition['names']['kind']}"] = schema
    OUT.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
