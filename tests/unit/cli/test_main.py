"""The command line as a user meets it: what it says when something is wrong, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from splitserve import __version__
from tests.unit.cli.console import Run

WAIT_S = 60


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["up"],
        ["router"],
        ["worker"],
        ["generate"],
        ["status"],
        ["drain"],
        ["migrate"],
        ["pool"],
        ["demo"],
        ["plan"],
        ["simulate"],
        ["profile"],
        ["workload"],
    ],
)
def test_every_command_explains_itself(splitserve: Run, command: list[str]) -> None:
    done = splitserve(*command, "--help")
    assert done.code == 0
    assert "Usage" in done.out


def test_the_version_is_the_packages(splitserve: Run) -> None:
    assert splitserve("--version").out.strip() == __version__


def test_the_module_is_the_console_script() -> None:
    command = [sys.executable, "-m", "splitserve", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert done.stdout.strip() == __version__


def test_help_imports_neither_grpc_nor_an_engine() -> None:
    probe = "import splitserve.cli.main, sys; print([m for m in ('grpc', 'torch', 'vllm', 'nixl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["router", "--listen", "nowhere"], "options: listen: must be host:port"),
        (["router", "--config", "/nonexistent.yaml"], "/nonexistent.yaml: No such file"),
        (["worker", "--engine", "sim"], "options: pool: Field required"),
        (["worker", "--pool", "middle"], "options: pool: Input should be 'prefill' or 'decode'"),
        (["worker", "--pool", "decode", "--engine", "tpu"], "options: engine:"),
        (["up", "--prefill", "0", "--decode", "0"], "options: pools: no workers"),
        (["up", "--listen", "localhost"], "options: router.listen: must be host:port"),
        (["generate", "x", "--file", "y"], "give a PROMPT or a file, not both"),
        (["generate", "--file", "/nonexistent"], "No such file"),
        (["generate", "x", "--system", "y"], "only with --chat"),
        (["pool", "decode-0", "middle"], "'middle' is no pool"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_two(splitserve: Run, arguments: list[str], says: str) -> None:
    done = splitserve(*arguments)
    assert done.code == 2
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert done.out == ""


@pytest.mark.parametrize(
    "command", [["status"], ["generate", "x"], ["drain", "w"], ["migrate", "r"], ["pool", "w", "decode"]]
)
def test_without_a_router_the_user_hears_where_and_what_to_do(splitserve: Run, command: list[str]) -> None:
    done = splitserve(*command, "--router", "127.0.0.1:1")
    assert done.code == 1
    assert done.err.strip().splitlines()[-1] == (
        "no router answers at 127.0.0.1:1: start one with `splitserve up`, or name another with --router"
    )


def test_a_malformed_cluster_file_is_named_with_the_path_of_its_key(splitserve: Run, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps({"pools": {"decode": {"wokers": 2}}}))
    done = splitserve("up", str(file))
    assert done.code == 2
    assert f"{file}: pools.decode.wokers: unknown key" in done.err
