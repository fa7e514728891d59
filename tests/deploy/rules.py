"""deploy/prometheus as these tests read it, and a copy of it in which a minute is a second."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import ROOT

DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RULES, RULES_TEST = PROMETHEUS / "rules.yml", PROMETHEUS / "rules_test.yml"
_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_NAME = re.compile(r"\b(splitserve[_:][a-z0-9_:]+|up|process_[a-z_]+)\b(?!\s*=[\"~])")
_STRING = re.compile(r'"[^"]*"')


@dataclass(frozen=True, slots=True)
class Rule:
    """`name` is the record's or the alert's."""

    name: str
    expression: str
    alert: bool
    labels: dict[str, str]
    annotations: dict[str, str]


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def rules() -> list[Rule]:
    return [
        Rule(
            rule.get("alert") or rule["record"],
            rule["expr"],
            "alert" in rule,
            rule.get("labels", {}),
            rule.get("annotations", {}),
        )
        for group in load(RULES)["groups"]
        for rule in group["rules"]
    ]


def names_in(expression: str) -> set[str]:
    """Metrics and recorded series that an expression reads."""
    return set(_NAME.findall(_STRING.sub('""', expression)))


def family_of(series: str) -> str:
    """The metric that a histogram's series belongs to."""
    return re.sub(r"_(bucket|count|sum)$", "", series)


def hurried(text: str) -> str:
    """PromQL in which a minute is a second: [5m] becomes [5s]."""
    return re.sub(r"\[(\d+)([mhd])\]", lambda match: f"[{int(match[1]) * _SECONDS[match[2]] // 60}s]", text)


def hurried_rules() -> dict[str, Any]:
    """rules.yml so."""
    said = load(RULES)
    for rule in _each(said):
        rule["expr"] = hurried(rule["expr"])
        if "for" in rule:
            rule["for"] = hurried(f"[{rule['for']}]").strip("[]")
    return dict(said)


def _each(said: Any) -> Iterator[dict[str, Any]]:
    for group in said["groups"]:
        yield from group["rules"]
