"""Commands as documents name them, and whether the programs would take them: arguments are parsed, nothing is run."""

import importlib
import re
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from splitserve.cli.main import app

ROOT = Path(__file__).parents[3]
_BENCHMARK = re.compile(r"python -m (benchmarks\.[^`\n]*)")
_SPLITSERVE = re.compile(r"^    (?:\.venv/bin/)?splitserve ([^`\n]*)", re.MULTILINE)
_ENDS = frozenset({"|", ">", "&", "&&", ";", "||", "·"})


class _Taken(Exception):
    """The arguments were parsed."""


def benchmarks(text: str) -> list[list[str]]:
    """Module and arguments of every `python -m benchmarks.…`, in code blocks and between backticks."""
    return [_words(found) for found in _BENCHMARK.findall(_one_line_each(text))]


def splitserves(text: str) -> list[list[str]]:
    """Arguments of every `splitserve …` that begins a line of an indented code block."""
    return [_words(found) for found in _SPLITSERVE.findall(_one_line_each(text))]


def _one_line_each(text: str) -> str:
    joined = re.sub(r"\\\n\s*", " ", text)
    return re.sub(r"(?<!`)`[^`\n]+\n[^`\n]+`(?!`)", lambda wrapped: " ".join(wrapped[0].split()), joined)


def _words(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    return words[: next((at for at, word in enumerate(words) if word in _ENDS), len(words))]


def take_benchmark(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Fails unless there is such a benchmark, with a parser that takes these arguments."""
    module, *arguments = words
    parse = ArgumentParser.parse_args

    def parse_only(self: ArgumentParser, *given: Any, **named: Any) -> None:
        parse(self, *given, **named)
        raise _Taken

    patch.setattr(ArgumentParser, "parse_args", parse_only)
    patch.setattr(sys, "argv", [module, *arguments])
    main = _program(module).main
    with pytest.raises(_Taken):
        main()


def _program(module: str) -> Any:
    """What `python -m` would run."""
    spec = find_spec(module)
    assert spec is not None, f"there is no {module}"
    is_package = spec.submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if is_package else module)


def take_splitserve(words: list[str]) -> None:
    """Fails unless there is such a command, with these options."""
    command: Any = typer.main.get_command(app)
    for name in _until_options(words):
        if not isinstance(command, typer.core.TyperGroup):
            break
        assert name in command.commands, f"there is no {name} of: splitserve {' '.join(words)}"
        command, words = command.commands[name], words[1:]
    command.callback = None  # of an object made for this call
    with pytest.raises(SystemExit) as ended:
        command.main(words, prog_name="splitserve")
    assert ended.value.code == 0


def _until_options(words: list[str]) -> Iterator[str]:
    for word in words:
        if word.startswith("-"):
            return
        yield word
