"""`splitserve plan` and `simulate` as a user meets them. The search is stood in for where its answer doesn't matter."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from splitserve.core.request import Timings, Usage
from splitserve.planner.plan import read_plan, write_plan
from splitserve.planner.question import Question
from splitserve.planner.result import SearchResult
from splitserve.planner.search import search as searching
from splitserve.telemetry.metrics import RouterMetrics
from tests.unit.cli.console import Done, Run
from tests.unit.planner.fixtures.results import INPUTS, nothing, plan, result

ASKED = ("--model", "opt-66b", "--gpus", "a100-80g:1x8", "--ttft", "400ms", "--tpot", "0.1")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """The search finds what was made by hand; gives the questions that it was asked."""
    asked: list[Question] = []

    def search(question: Question, progress: Callable[[str, float], None]) -> SearchResult:
        asked.append(question)
        progress("done", 1.0)
        return result()

    monkeypatch.setattr(searching, "search", search)
    return asked


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    write_plan(plan(INPUTS.model_copy(update={"workload": "prompt=300,output=100"})), tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


@pytest.mark.parametrize(
    "command",
    [["plan"], ["plan", "explain"], ["plan", "compare"], ["plan", "report"], ["plan", "watch"], ["simulate"]],
)
def test_every_command_explains_itself_with_an_example(splitserve: Run, command: list[str]) -> None:
    done = splitserve(*command, "--help")
    assert done.code == 0
    assert "Example" in done.out


def test_the_answer_is_the_first_line(splitserve: Run, found: list[Question]) -> None:
    done = splitserve("plan", *ASKED)
    assert done.code == 0
    assert done.out.startswith("1 prefill TP4 + 1 decode TP2 PP2 on a100-80g (8 GPUs) serve 3.2 requests/s")
    assert found[0].slo.ttft_s == pytest.approx(0.4)


def test_a_model_and_gpus_are_enough(splitserve: Run, found: list[Question]) -> None:
    done = splitserve("plan", "--model", "opt-66b", "--gpus", "a100-80g:1x8")
    assert done.code == 0
    assert "no TTFT objective was given" in done.out


def test_a_question_may_be_a_file(splitserve: Run, found: list[Question], tmp_path: Path) -> None:
    file = tmp_path / "question.yaml"
    file.write_text("model: opt-66b\ngpus: a100-80g:1x8\nttft: 250ms\ntpot: 0.2\n")
    assert splitserve("plan", str(file), "--tpot", "0.1", "--price", "a100=3.5").code == 0
    assert (found[0].slo.ttft_s, found[0].slo.tpot_s) == (0.25, 0.1)
    assert found[0].machines.nodes[0].gpu.price_per_hour == 3.5


def test_all_files_are_written(splitserve: Run, found: list[Question], tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("plan.yaml", "report.html", "cluster.yaml", "values.yaml")}
    options = zip(("--out", "--report", "--cluster", "--values"), map(str, files.values()), strict=True)
    done = splitserve("plan", *ASKED, *(part for option in options for part in option))
    assert done.code == 0
    assert read_plan(files["plan.yaml"]).inputs.model == "opt-66b"
    assert files["report.html"].read_text().startswith("<!doctype html>")
    assert yaml.safe_load(files["cluster.yaml"].read_text())["pools"]["prefill"]["workers"] == 1
    assert yaml.safe_load(files["values.yaml"].read_text())["slo"]["ttftSeconds"] == 0.4
    assert f"wrote {files['plan.yaml']}" in done.out


def test_json_is_the_plan_and_nothing_else(splitserve: Run, found: list[Question]) -> None:
    done = splitserve("plan", *ASKED, "--json")
    assert json.loads(done.out)["chosen"]["goodput_rps"]["mean"] == 3.2


@pytest.mark.parametrize("as_json", [False, True])
def test_infeasible_ends_with_code_3(splitserve: Run, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(searching, "search", lambda question, progress: nothing())
    done = splitserve("plan", *ASKED, *(["--json"] if as_json else []))
    assert done.code == 3
    if as_json:
        assert json.loads(done.out)["infeasible"]["nearest_ttft_s"] == 0.21
    else:
        assert "--ttft 0.21" in done.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--model", "opt-66b"), "options: gpus: is missing"),
        (("--model", "opt-67b", "--gpus", "h100:8"), "opt-67b"),
        (("--model", "opt-66b", "--gpus", "h900:8"), "h900"),
        (("--model", "opt-66b", "--gpus", "h100"), "'h100' is not KIND:NODESxGPUS"),
        (("--model", "opt-66b", "--gpus", "a100-80g:1"), "needs at least 2 a100-80g"),
        ((*ASKED, "--ttft", "-1"), "options: ttft"),
        ((*ASKED, "--attainment", "1"), "options: attainment"),
        ((*ASKED, "--link", "200"), "options: link"),
        ((*ASKED, "--price", "a100"), "--price: 'a100' is not KIND=PER_HOUR"),
        ((*ASKED, "--workload", "nowhere.jsonl"), "nowhere.jsonl"),
        (("nowhere.yaml",), "nowhere.yaml"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(splitserve: Run, arguments: tuple[str, ...], complaint: str) -> None:
    done = splitserve("plan", *arguments)
    assert done.code == 2
    assert complaint in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_explain_says_why(splitserve: Run, plan_file: Path) -> None:
    assert "Why the others lost" in splitserve("plan", "explain", str(plan_file)).out
    sections = json.loads(splitserve("plan", "explain", str(plan_file), "--json").out)
    assert sections[0]["title"] == "Answer"


def test_compare_lists_what_differs(splitserve: Run, plan_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    write_plan(plan(), other)
    done = splitserve("plan", "compare", str(plan_file), str(other))
    assert "prompt=300,output=100" in done.out
    said = json.loads(splitserve("plan", "compare", str(plan_file), str(other), "--json").out)
    assert said["inputs"][0]["what"] == "workload"
    assert said["beyond_intervals"] is False


def test_a_report_is_made_of_a_plan_file(splitserve: Run, plan_file: Path, tmp_path: Path) -> None:
    html = tmp_path / "out.html"
    assert splitserve("plan", "report", str(plan_file), "--report", str(html)).code == 0
    assert "</html>" in html.read_text()


def test_simulate_takes_any_rate_and_workload(splitserve: Run, plan_file: Path) -> None:
    few = ("--requests", "50", "--seeds", "2")
    done = splitserve("simulate", "--plan", str(plan_file), *few)
    assert done.code == 0
    assert "at 3.2 requests/s of prompt=300,output=100" in done.out
    said = json.loads(
        splitserve("simulate", "--plan", str(plan_file), "--rate", "0.5", "--workload", "sharegpt", *few, "--json").out
    )
    assert (said["rate_rps"], said["workload"], said["requests"]) == (0.5, "sharegpt", 100)


def test_simulate_refuses_a_rate_of_nothing(splitserve: Run, plan_file: Path) -> None:
    done = splitserve("simulate", "--plan", str(plan_file), "--rate", "0")
    assert (done.code, done.err.startswith("--rate: 0 is no rate")) == (2, True)


@pytest.fixture
def router() -> Iterator[tuple[str, Callable[[int, int], None]]]:
    """Serves metrics; each reading counts as many requests of such a length as was said last."""
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    then = [0, 1]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            for _ in range(then[0]):
                metrics.ended("OK")
                metrics.finished(
                    "standard",
                    Usage(prompt_tokens=then[1], output_tokens=100),
                    Timings(0, 0, 0, 0.1, 0.02, "p", "d", 0, 0, 1),
                )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(generate_latest(registry))

        def log_message(self, *arguments: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def count(requests: int, prompt_tokens: int) -> None:
        then[:] = [requests, prompt_tokens]

    yield f"127.0.0.1:{server.server_port}", count
    server.shutdown()
    thread.join()
    server.server_close()


Router = tuple[str, Callable[[int, int], None]]


def _watch(splitserve: Run, plan_file: Path, address: str, *more: str) -> Done:
    return splitserve("plan", "watch", str(plan_file), "--metrics", address, "--every", "1ms", "--once", *more)


def test_watch_without_traffic_says_so(splitserve: Run, plan_file: Path, router: Router) -> None:
    done = _watch(splitserve, plan_file, router[0])
    assert done.code == 0
    assert "as planned: 0 requests/s, too few requests yet" in done.out


def test_watch_asks_this_machine_without_the_environments_proxy(
    splitserve: Run, monkeypatch: pytest.MonkeyPatch, plan_file: Path, router: Router
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert _watch(splitserve, plan_file, router[0]).code == 0


def test_watch_plans_anew_where_traffic_drifted(
    splitserve: Run, found: list[Question], plan_file: Path, router: Router, tmp_path: Path
) -> None:
    router[1](400, 3000)
    done = _watch(splitserve, plan_file, f"http://{router[0]}/metrics", "--out", str(tmp_path / "new.yaml"))
    assert done.code == 4
    assert "drifted:" in done.out
    assert "  1 prefill TP4 on a100-80g" in done.out
    assert found[0].rate_rps is not None
    assert read_plan(tmp_path / "new.yaml").inputs.workload.startswith("prompt:p10=")


def test_watch_says_that_nothing_serves_what_comes(
    splitserve: Run, monkeypatch: pytest.MonkeyPatch, plan_file: Path, router: Router
) -> None:
    monkeypatch.setattr(searching, "search", lambda question, progress: nothing())
    router[1](400, 300)
    done = _watch(splitserve, plan_file, router[0])
    assert done.code == 3
    assert "no placement reads a prompt" in done.out
    router[1](400, 300)
    said = json.loads(_watch(splitserve, plan_file, router[0], "--json").out)
    assert said["infeasible"]["binding"] == "ttft"


def test_watch_speaks_json(splitserve: Run, plan_file: Path, router: Router) -> None:
    said = json.loads(_watch(splitserve, plan_file, router[0], "--json").out)
    assert (said["reasons"], said["change"]) == ([], None)


@pytest.mark.parametrize(
    ("address", "code", "complaint"),
    [
        ("127.0.0.1:1", 1, "is the router up?"),
        ("http://", 2, "is no address"),
        ("file:///plan.yaml", 2, "is no address"),
    ],
)
def test_watch_says_which_address_is_wrong(
    splitserve: Run, plan_file: Path, address: str, code: int, complaint: str
) -> None:
    done = _watch(splitserve, plan_file, address)
    assert done.code == code
    assert complaint in done.err
