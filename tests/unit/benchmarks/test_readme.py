"""What documents say of benchmarks is there: commands with their arguments, files of results."""

import re
from pathlib import Path

import pytest

from tests.unit.benchmarks.commands import ROOT, benchmarks, splitserves, take_benchmark, take_splitserve

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
HEAVY = {"benchmarks.gpu.push": ("torch", "nixl")}
SEVERAL = """\
Between backticks, `.venv/bin/python -m benchmarks.migration --moves 200`, and here, wrapped: `python
-m benchmarks.router`;

    python -m benchmarks.routers --routers 4 \\
        --json > routers.json     # a comment
    splitserve status --router there:50051 | less
    splitserve up             # another
"""


def commands() -> list[tuple[str, ...]]:
    found = {tuple(words) for document in DOCUMENTS for words in benchmarks(document.read_text())}
    return sorted(found)


def results(document: Path) -> set[Path]:
    """Files of results that a document links to or names."""
    text = document.read_text()
    linked = {document.parent / path for path in re.findall(r"\]\(([^)#\s]+)\)", text) if "results/" in path}
    named = {ROOT / path for path in re.findall(r"\bbenchmarks/results/[\w./-]*\w", text)}
    return linked | named


def test_commands_are_found_in_prose_and_in_code() -> None:
    assert benchmarks(SEVERAL) == [
        ["benchmarks.migration", "--moves", "200"],
        ["benchmarks.router"],
        ["benchmarks.routers", "--routers", "4", "--json"],
    ]
    assert splitserves(SEVERAL) == [["status", "--router", "there:50051"], ["up"]]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_benchmark_that_a_document_names_takes_the_arguments_named_there(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in HEAVY.get(words[0], ()):
        pytest.importorskip(package)
    take_benchmark(list(words), monkeypatch)


@pytest.mark.parametrize(
    "wrong", [["benchmarks.none"], ["benchmarks.router", "--no-such"], ["benchmarks.migration", "--moves", "many"]]
)
def test_a_wrong_command_would_be_found(wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        take_benchmark(wrong, monkeypatch)


@pytest.mark.parametrize("wrong", [["ascend"], ["up", "--no-such"], ["plan", "explain"], ["worker", "--ready-fd", "x"]])
def test_a_wrong_splitserve_command_would_be_found(wrong: list[str]) -> None:
    with pytest.raises(AssertionError):
        take_splitserve(wrong)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_results_that_a_document_names_is_there(document: Path) -> None:
    assert not [path for path in results(document) if not path.exists()]


def test_every_file_of_results_is_in_the_table_of_figures() -> None:
    table = (ROOT / "benchmarks" / "README.md").read_text()
    kept = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert {name for name in kept if f"results/{name}" not in table} == set()
