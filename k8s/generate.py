"""Writes what schema.yaml says of the chart's values (values.yaml, values.schema.json, README.md's table) and copies
deploy/'s Prometheus rules and Grafana dashboard into the chart. `--check` writes nothing and fails if a file differs.
"""

import argparse
import importlib
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

import splitserve

HERE = Path(__file__).parent
CHART = HERE / "splitserve"
README = HERE / "README.md"
COPIES = {  # of files that have their home elsewhere
    CHART / "files/rules.yml": HERE.parent / "deploy/prometheus/rules.yml",
    CHART / "files/overview.json": HERE.parent / "deploy/grafana/overview.json",
}
BEGIN, END = "<!-- values: written by generate.py -->\n", "<!-- values end -->\n"
WIDTH = 118
HEAD = """\
# Written by k8s/generate.py from k8s/schema.yaml; not to be edited. A key that is not here is refused.
"""

Schema = dict[str, Any]


def written() -> dict[Path, str]:
    """Each file and what it should hold."""
    values = Values(yaml.safe_load((HERE / "schema.yaml").read_text()))
    files = {
        CHART / "values.yaml": HEAD + "".join(values.commented()),
        CHART / "values.schema.json": json.dumps(values.json_schema(), indent=1) + "\n",
        README: _with_table(README.read_text(), values.table()),
        CHART / "Chart.yaml": _with_version((CHART / "Chart.yaml").read_text()),
    }
    return files | {copy: source.read_text() for copy, source in COPIES.items()}


class Values:
    """schema.yaml, with what it includes put in its place."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        self._definitions = said["definitions"]
        self._json: Schema = {}
        self.root = self._whole({"properties": said["properties"]})

    def _whole(self, node: Mapping[str, Any]) -> Schema:
        whole = dict(node)
        properties: Schema = dict(whole.get("properties", {}))
        if "include" in properties:
            whole["include"] = properties.pop("include")
        if "include" in whole:
            without = whole.pop("without", ())
            included = self._whole(self._definition(whole.pop("include")))["properties"]
            kept = {name: value for name, value in included.items() if name not in without}
            merged = {name: {**kept.get(name, {}), **own} for name, own in properties.items()}
            properties = {name: own for name, own in merged.items() if name not in kept} | kept | merged
        if properties:
            whole["properties"] = {name: self._whole(value) for name, value in properties.items()}
        if "each" in whole:
            whole["each"] = self._whole(self._definition(whole["each"]))
        return whole

    def _definition(self, name: str) -> Schema:
        """Its properties; `include` and `description` of an object of them may stand beside."""
        said = dict(self._definitions[name])
        included = said.pop("include", None)
        return {"properties": said, **({"include": included} if included else {})}

    # values.yaml -----------------------------------------------------------------------------------------------------
    def commented(self) -> Iterator[str]:
        for name, node in self.root["properties"].items():
            yield "\n"
            yield from _commented(name, node, 0)

    # values.schema.json ----------------------------------------------------------------------------------------------
    def json_schema(self) -> Schema:
        self._json = {}
        root = self._as_json(self.root)
        root["properties"]["global"] = {
            "type": "object",
            "description": "Helm's own, where this chart is a dependency.",
        }
        return {"$schema": "http://json-schema.org/draft-07/schema#", **root, "definitions": self._json}

    def _as_json(self, node: Schema) -> Schema:
        described = {"description": node["description"]} if "description" in node else {}
        if "settings" in node:
            return {**described, **self._settings(node["settings"], node.get("without", ()))}
        if "kubernetes" in node:
            return {**described, **_passed_on(node["kubernetes"])}
        if "each" in node:
            names = {"propertyNames": node["propertyNames"]} if "propertyNames" in node else {}
            each = {**self._as_json(node["each"]), "required": node["required"]}
            return {**described, "type": "object", **names, "additionalProperties": each}
        if "properties" in node:
            properties = {name: self._as_json(value) for name, value in node["properties"].items()}
            return {**described, "type": "object", "additionalProperties": False, "properties": properties}
        return {key: value for key, value in node.items() if key not in ("default", "examples")}

    def _settings(self, classes: list[str], without: tuple[str, ...]) -> Schema:
        """The union of what these classes of settings take; none of it is required."""
        properties: Schema = {}
        for name in classes:
            said = _model(name).model_json_schema()
            self._json |= {key: _plain(value) for key, value in said.get("$defs", {}).items()}
            for key, value in said["properties"].items():
                if key not in without:
                    properties[key] = _either(properties.get(key), _plain(value))
        return {"type": "object", "additionalProperties": False, "properties": properties}

    # README.md -------------------------------------------------------------------------------------------------------
    def table(self) -> str:
        rows = [f"| `{path}` | {_cell(node)} | {_sentence(node)} |" for path, node in leaves(self.root)]
        return "\n".join(["| value | default | |", "|---|---|---|", *rows, ""])


def leaves(node: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every value that a user says by itself, with its path."""
    for name, child in node["properties"].items():
        here = f"{path}.{name}" if path else name
        if "properties" in child:
            yield from leaves(child, here)
        else:
            yield here, child


def _commented(name: str, node: Schema, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for line in textwrap.wrap(node["description"], WIDTH - len(indent) - 2):
        yield f"{indent}# {line}\n"
    if "properties" in node:
        yield f"{indent}{name}:\n"
        for child, value in node["properties"].items():
            yield from _commented(child, value, depth + 1)
        return
    yield textwrap.indent(_line(name, node["default"]), indent)


def _line(name: str, default: Any) -> str:
    """A long mapping has a line for each key."""
    if isinstance(default, dict) and len(json.dumps(default)) > WIDTH // 2:
        return yaml.safe_dump({name: default}, sort_keys=False, default_flow_style=None, width=999)
    if isinstance(default, dict | list):
        return f"{name}: {yaml.safe_dump(default, sort_keys=False, default_flow_style=True, width=999)}"
    return f"{name}: {json.dumps(default)}\n"


def _passed_on(kind: str) -> Schema:
    if kind == "map":
        return {"type": "object"}
    if kind.startswith("[]"):
        return {"type": "array", "items": {"type": "object"}}
    return {"type": "object"}


def _model(name: str) -> type[BaseModel]:
    for module in ("splitserve.core.config", "splitserve.gateway.config"):
        found = getattr(importlib.import_module(module), name, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    sys.exit(f"schema.yaml: settings {name}: splitserve has no such class")


def _plain(said: Any) -> Any:
    """pydantic's schema as draft 7 and without defaults; null is Helm's word for leaving a key out."""
    if isinstance(said, list):
        return [_plain(one) for one in said]
    if not isinstance(said, dict):
        return said.replace("#/$defs/", "#/definitions/") if isinstance(said, str) else said
    plain = {
        key: {name: _plain(one) for name, one in value.items()} if key == "properties" else _plain(value)
        for key, value in said.items()
        if key not in ("title", "default", "discriminator")
    }
    choices = [one for one in plain.get("anyOf", []) if one != {"type": "null"}]
    if len(choices) == 1:
        del plain["anyOf"]
        plain = {**choices[0], **plain} if "$ref" not in choices[0] else {**plain, "allOf": choices}
    elif choices:
        plain["anyOf"] = choices
    return plain


def _either(one: Schema | None, other: Schema) -> Schema:
    if one is None or one == other:
        return other
    said = [{key: value for key, value in schema.items() if key != "description"} for schema in (one, other)]
    unlike = [said[0]] if said[0] == said[1] else said
    return {"description": one.get("description", other.get("description", "")), "anyOf": unlike}


def _cell(node: Schema) -> str:
    text = json.dumps(node["default"])
    return f"`{text}`" if len(text) < 50 else "see values.yaml"


def _sentence(node: Schema) -> str:
    kind = node.get("kubernetes")
    kinds = [kind] if kind and kind != "map" else node.get("settings", [])
    said = f" ({' or '.join(kinds)})" if kinds else ""
    choices = " " + ", ".join(f"`{one}`" for one in node["enum"]) + "." if "enum" in node else ""
    return f"{node['description']}{choices}{said}".replace("|", "\\|")


def _with_table(readme: str, table: str) -> str:
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"README.md has no place for the table of values, between {BEGIN!r} and {END!r}")
    return before + BEGIN + "\n" + table + "\n" + END + after


def _with_version(chart: str) -> str:
    lines = [
        f'appVersion: "{splitserve.__version__}"' if line.startswith("appVersion:") else line
        for line in chart.splitlines()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for file, text in written().items():
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        elif not file.is_file() or file.read_text() != text:
            sys.exit(
                f"{file.relative_to(HERE.parent)} is not what k8s/schema.yaml and deploy/ say; run k8s/generate.py"
            )


if __name__ == "__main__":
    main()
