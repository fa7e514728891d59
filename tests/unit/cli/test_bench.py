"""`splitserve bench`: what it refuses, and what it makes of saved runs. Real clusters: tests/cluster/test_bench.py."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitserve.bench.findings import Saved
from splitserve.bench.open_loop import Progress
from splitserve.cli.bench.asked import named_targets
from splitserve.cli.bench.measuring import command
from splitserve.cli.bench.progress import Patience, Voice
from splitserve.cli.bench.runs import Kept, keep
from splitserve.cli.main import app
from splitserve.core.errors import ConfigError, Unavailable
from tests.unit.bench.saved_runs import saved, swept
from tests.unit.cli.console import Run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    directory = tmp_path / "runs"
    kept = Kept(directory)
    kept.read()
    for each in swept():
        kept.add(each)
    return directory


def report(*arguments: object) -> str:
    return CliRunner().invoke(app, ["bench", "report", *map(str, arguments)], catch_exceptions=False).output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--ttft", "3x"], "--ttft: '3x' is no time"),
        (["run", "--itl-p99", "-1"], "--itl-p99: "),
        (["run", "--ttft-per-token", "x"], "--ttft-per-token: "),
        (["run", "--attainment", "90"], "--attainment: '90' is no share"),
        (["run", "--rate", "0"], "--rate: '0' is no rate above 0"),
        (["run", "--rate", "fast"], "--rate: 'fast' is no rate above 0"),
        (["run", "--requests", "5", "--duration", "5"], "--duration: says how many requests"),
        (["run", "--warm-up", "-1"], "--warm-up: "),
        (["run", "--wait", "no"], "--wait: 'no' is no time"),
        (["run", "--late", "0"], "--late: "),
        (["run", "--workload", "sharegtp"], "sharegtp"),
        (["run", "--form", "words"], "--form: 'words' is none of ids, text, chat"),
        (["run", "--target", "ftp://a:1"], "ftp:// is unknown"),
        (["run", "--out", "run.txt"], "--out: run.txt must end in .jsonl or .parquet"),
        (["run", "--plot", "run.gif"], "--plot: run.gif must end in .svg or .png"),
        (["run", "--report", "nowhere/run.html"], "--report: nowhere is not a directory"),
        (["run", "--ca", "nowhere.pem"], "nowhere.pem"),
        (["sweep", "--rates", "1,two"], "--rates: 'two' is no rate above 0"),
        (["sweep", "--start", "-1"], "--start: '-1' is no rate above 0"),
        (["sweep", "--step", "2"], "--step: '2' is no share"),
        (["sweep", "--step", "0.001"], "--step: "),
        (["compare", "127.0.0.1:1"], "targets: a comparison needs two"),
        (["compare", "127.0.0.1:1", "grpc://127.0.0.1:1"], "targets: two are called 127.0.0.1:1; name them"),
        (["report", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_sent(
    splitserve: Run, arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = splitserve("bench", *arguments)
    assert done.code == 2
    assert sentence in done.err
    assert done.out == ""


def test_a_run_that_would_be_all_warm_up_is_refused(splitserve: Run) -> None:
    load = ("--workload", "prompt=5,output=5", "--rate", "1", "--requests", "1", "--warm-up", "10", "--seed", "0")
    done = splitserve("bench", "run", *load)
    assert done.code == 2
    assert "--warm-up: at 1 requests/s all 11 requests are due within the 10 s of warm-up" in done.err


@pytest.mark.parametrize("name", ["run", "sweep", "compare", "report"])
def test_help_teaches_by_example(name: str) -> None:
    output = CliRunner().invoke(app, ["bench", name, "--help"]).output
    assert f"splitserve bench {name}" in output
    assert "Example" in output


def test_exit_codes_are_in_the_help() -> None:
    output = " ".join(CliRunner().invoke(app, ["bench", "--help"]).output.split())
    assert "5 the load generator itself was overloaded" in output


def test_saved_runs_are_judged_again_under_other_objectives(runs: Path) -> None:
    own, loose, tight = (
        json.loads(report(runs, "--json", *options)) for options in ([], ["--ttft", "2"], ["--ttft", "300ms"])
    )
    assert own["slo"] == {"ttft_s": 0.4, "tpot_s": 0.05, "attainment": 0.9}
    goodputs = [said["systems"][0]["goodput"]["rps"] for said in (tight, own, loose)]
    assert goodputs == sorted(goodputs)
    assert goodputs[0] < goodputs[2]


def test_a_report_is_written_with_its_figures(runs: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "a.html", tmp_path / "a.png"
    text = report(runs, "--report", page, "--plot", picture)
    assert "4 runs of 120 requests" in " ".join(text.split())
    assert f"wrote {page}" in text.replace("\n", "")
    assert "<svg" in page.read_text()
    assert picture.read_bytes()[1:4] == b"PNG"


def test_a_file_of_parquet_is_read_too(tmp_path: Path) -> None:
    keep(saved(1.0), tmp_path / "run.parquet")
    assert json.loads(report(tmp_path / "run.parquet", "--json"))["kind"] == "run"


def test_runs_of_two_systems_are_compared(tmp_path: Path) -> None:
    for name, slots in (("fast", 6), ("slow", 3)):
        for each in swept(name, slots=slots):
            keep(each, tmp_path / f"{name}-{each.facts.rate_rps:g}.jsonl")
    said = json.loads(report(tmp_path, "--json"))
    assert [system["name"] for system in said["systems"]] == ["fast", "slow"]
    assert said["pairs"][0]["goodput_ratio"]["value"] > 1.0


def test_an_objective_that_a_run_can_not_be_judged_by_is_said(splitserve: Run, tmp_path: Path) -> None:
    one = saved(1.0)
    keep(Saved(one.facts, replace(one.run, chunks=replace(one.run.chunks, dropped=1))), tmp_path / "run.jsonl")
    done = splitserve("bench", "report", str(tmp_path / "run.jsonl"), "--itl-p99", "50ms")
    assert done.code == 2
    assert "itl_p99_s can't be judged" in done.err


def test_an_overloaded_generator_is_exit_code_five(splitserve: Run, tmp_path: Path) -> None:
    one = saved(1.0)
    keep(Saved(one.facts, replace(one.run, sent_s=one.run.scheduled_s + 0.5)), tmp_path / "run.jsonl")
    done = splitserve("bench", "report", str(tmp_path / "run.jsonl"))
    assert done.code == 5
    assert "INVALID" in done.out
    assert "the run is INVALID: the load generator was overloaded" in done.err


def test_a_run_without_one_served_request_is_exit_code_one(splitserve: Run, tmp_path: Path) -> None:
    keep(saved(50.0, count=40, slots=0, patience_s=0.5), tmp_path / "run.jsonl")
    done = splitserve("bench", "report", str(tmp_path / "run.jsonl"))
    assert done.code == 1
    assert "pd served no request: Overloaded: the queue is full" in done.err


def test_an_empty_directory_is_named(splitserve: Run, tmp_path: Path) -> None:
    done = splitserve("bench", "report", str(tmp_path))
    assert done.code == 2
    assert "has no runs" in done.err


def test_a_directory_is_gone_on_from_only_with_the_same_load(runs: Path) -> None:
    kept = Kept(runs)
    kept.read()
    known = kept.of("pd")
    assert [each.facts.rate_rps for each in known] == [1.0, 2.0, 3.0, 4.0]
    facts = known[0].facts
    kept.check(facts)
    for changed, option in (
        (replace(facts, workload="sharegpt"), "--workload"),
        (replace(facts, amount="5 s"), "--requests"),
        (replace(facts, warm_up_s=9.0), "--warm-up"),
    ):
        with pytest.raises(ConfigError, match=f"--out: .* with {option} "):
            kept.check(changed)
    kept.check(replace(facts, name="another", workload="sharegpt"))


def test_targets_are_called_by_their_address_or_as_said() -> None:
    one, other = named_targets(["127.0.0.1:50051", "vllm=http://10.0.0.6:8000"])
    assert (one.name, one.target.name) == ("127.0.0.1:50051", "grpc://127.0.0.1:50051")
    assert (other.name, other.target.name) == ("vllm", "http://10.0.0.6:8000/v1")


def test_a_saved_command_does_not_tell_the_key() -> None:
    typed = ["/usr/bin/splitserve", "bench", "run", "--api-key", "s3cret", "--api-key=s3cret", "--ttft", "1 s"]
    assert command(typed) == "splitserve bench run --api-key ... --api-key=... --ttft '1 s'"


def progress(at_s: float, tokens: int = 0, failed: int = 0) -> Progress:
    return Progress(at_s, 100, 50, 5, 40, failed, tokens, 0.001, "Unavailable: gone")


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_a_terminal_has_one_line_that_changes_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    screen = Screen(terminal=True)
    voice = Voice(screen)
    voice.begin("pd at 2/s")
    for at_s in (0.5, 1.0, 2.0, 2.5):
        voice.tell(progress(at_s, tokens=100))
    shown = screen.getvalue()
    assert shown.count("\r") == 2
    assert "\n" not in shown
    assert "pd at 2/s: 2 s, 50/100 sent, 5 in flight, 40 done, 50 tokens/s, p99 1 ms late" in shown
    voice.end()
    assert screen.getvalue().endswith("\r\x1b[K")


def test_the_line_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    screen = Screen(terminal=True)
    voice = Voice(screen)
    voice.begin("a name that is long")
    voice.tell(progress(5.0))
    assert len(screen.getvalue().strip("\r").removesuffix("\x1b[K")) == 39


def test_elsewhere_there_is_a_line_every_ten_seconds() -> None:
    screen = Screen(terminal=False)
    voice = Voice(screen)
    voice.begin("pd at 2/s")
    for tenth in range(1, 251):
        voice.tell(progress(tenth / 10))
    voice.end()
    assert [line.split(",")[0] for line in screen.getvalue().splitlines()] == ["pd at 2/s: 10 s", "pd at 2/s: 20 s"]


def test_a_target_that_is_gone_ends_the_run_and_a_slow_one_does_not() -> None:
    patience = Patience("grpc://a:1")
    for at_s in range(30):
        patience.judge(progress(at_s, tokens=at_s, failed=at_s * 5))  # tokens still come
    for at_s in range(30, 60):
        patience.judge(progress(at_s, tokens=29, failed=145))  # all wait, none fails
    with pytest.raises(
        Unavailable, match=r"grpc://a:1 has stopped answering: no token came for .* \(Unavailable: gone\)"
    ):
        patience.judge(progress(61, tokens=29, failed=160))
