"""`splitserve profile` on the simulated engine, whose steps cost what its settings say."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitserve.cli.main import app
from splitserve.core.errors import ConfigError
from splitserve.latency.profile import read

CLUSTER = """
engine: {kind: sim, max_model_len: 512, max_num_batched_tokens: 128, max_num_seqs: 9, total_blocks: 256,
         step_s: 0.001, prefill_token_s: 0.00001, decode_token_s: 0.00005}
"""


def run(*arguments: str) -> str:
    return CliRunner().invoke(app, ["profile", *arguments], catch_exceptions=False).output


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(CLUSTER)
    return file


def test_a_profile_says_what_was_measured_and_how_wrong_its_fit_is(cluster: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    told = json.loads(run(str(cluster), "--out", str(out), "--repeats", "1", "--json"))
    profile = read(out)
    assert told["samples"] == len(profile.samples) > 20
    assert set(told["held_out_error"]) == {"prefill", "decode", "mixed"}
    assert (profile.hardware, profile.kv_tokens) == ("cpu", 256 * 16)
    assert profile.settings["max_batched_tokens"] == 128


def test_one_that_was_stopped_goes_on_where_it_was(cluster: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    run(str(cluster), "--out", str(out), "--repeats", "1")
    whole = json.loads(out.read_text())
    stopped = {**whole, "samples": whole["samples"][:-5]}
    stopped["settings"] = {**whole["settings"], "measured": whole["settings"]["measured"][:-1]}
    out.write_text(json.dumps(stopped))
    run(str(cluster), "--out", str(out), "--repeats", "1")
    again = json.loads(out.read_text())
    assert again["samples"][: len(stopped["samples"])] == stopped["samples"]
    assert again["settings"]["measured"] == whole["settings"]["measured"]


def test_another_workers_profile_is_not_continued(cluster: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    run(str(cluster), "--out", str(out), "--repeats", "1")
    cluster.write_text(CLUSTER.replace("128", "64"))
    before = out.read_text()
    with pytest.raises(ConfigError, match="another worker"):
        run(str(cluster), "--out", str(out))
    assert out.read_text() == before


def test_hardware_is_one_of_the_datasheets(cluster: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="h100"):
        run(str(cluster), "--out", str(tmp_path / "p.json"), "--hardware", "gpu-of-my-dreams")
