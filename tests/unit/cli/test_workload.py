"""`splitserve workload`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitserve.cli.main import app
from splitserve.core.errors import ConfigError


def run(*arguments: str) -> str:
    return CliRunner().invoke(app, ["workload", *arguments], catch_exceptions=False).output


def test_lengths_are_said_for_people_and_for_programs() -> None:
    assert "128" in run("prompt=512,output=128")
    said = json.loads(run("prompt=512,output=128", "--json"))
    assert (said["prompt"]["p50"], said["output"]["p99"]) == (512, 128)


def test_a_picture_is_written_where_asked(tmp_path: Path) -> None:
    picture = tmp_path / "lengths.svg"
    run("sharegpt", "--requests", "200", "--plot", str(picture))
    assert "<svg" in picture.read_text()


def test_what_is_no_workload_is_named() -> None:
    with pytest.raises(ConfigError, match="sharegpt"):
        run("sharegtp")


def test_sessions_are_said_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "sessions.svg"
    output = run("prompt=50,output=20,sessions=3", "--requests", "500", "--plot", str(picture))
    assert "turns in the mean; " in output
    assert "share of sessions with at least as many" in picture.read_text()
    assert json.loads(run("prompt=50,output=20,sessions=3", "--json"))["turns"] > 2.5
