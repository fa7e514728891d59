"""The command line as a user meets it: what it says when something is wrong, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from splitserve import __version__

WAIT_S = 60


def splitserve(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "splitserve", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.parametrize(
    "command", [[], ["up"], ["router"], ["worker"], ["generate"], ["status"], ["drain"], ["pool"], ["demo"]]
)
def test_every_command_explains_itself(command: list[str]) -> None:
    done = splitserve(*command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_the_version_is_the_packages() -> None:
    assert splitserve("--version").stdout.strip() == __version__


def test_help_imports_neither_grpc_nor_an_engine() -> None:
    probe = "import splitserve.cli.main, sys; print([m for m in ('grpc', 'torch', 'vllm', 'nixl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["router", "--model", "/nonexistent"], "/nonexistent: no such directory"),
        (["router", "--listen", "nowhere"], "options: listen: must be host:port"),
        (["router", "--config", "/nonexistent.yaml"], "/nonexistent.yaml: No such file"),
        (["worker", "--engine", "sim"], "options: pool: Field required"),
        (["worker", "--pool", "middle"], "options: pool: Input should be 'prefill' or 'decode'"),
        (["worker", "--pool", "decode", "--engine", "tpu"], "options: engine:"),
        (["worker", "--pool", "decode", "--engine", "sim", "--model", "/tmp"], "no config.json"),
        (["up", "--prefill", "0", "--decode", "0"], "options: pools: no workers"),
        (["up", "--listen", "localhost"], "options: router.listen: must be host:port"),
        (["generate", "x", "--file", "y"], "give a PROMPT or a file, not both"),
        (["generate", "--file", "/nonexistent"], "No such file"),
        (["generate", "x", "--system", "y"], "only with --chat"),
        (["pool", "decode-0", "middle"], "'middle' is no pool"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_two(arguments: list[str], says: str) -> None:
    done = splitserve(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("command", [["status"], ["generate", "x"], ["drain", "w"], ["pool", "w", "decode"]])
def test_without_a_router_the_user_hears_where_and_what_to_do(command: list[str]) -> None:
    done = splitserve(*command, "--router", "127.0.0.1:1")
    assert done.returncode == 1
    assert "no router answers at 127.0.0.1:1: start one with `splitserve up`" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_malformed_cluster_file_is_named_with_the_path_of_its_key(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps({"pools": {"decode": {"wokers": 2}}}))
    done = splitserve("up", str(file))
    assert done.returncode == 2
    assert f"{file}: pools.decode.wokers: unknown key" in done.stderr
