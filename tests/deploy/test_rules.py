"""deploy/prometheus, the dashboard and the table of metrics: what can be said of them without a cluster."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.generate import PROCESSES, metrics
from deploy.grafana.dashboard import dashboard
from deploy.grafana.panels import queries
from tests.deploy.rules import DEPLOY, PROMETHEUS, RULES, RULES_TEST, family_of, load, names_in, rules
from tests.deploy.tools import ROOT, promtool

# What Prometheus and its client library say of any process.
NOT_OURS = {"up", "process_cpu_seconds_total"}


def ours() -> set[str]:
    return {name for _, _, kind in PROCESSES for name, *_ in metrics(kind)}


def test_promtool_accepts_rules_and_configuration() -> None:
    for command in (("check", "rules", "rules.yml"), ("check", "config", "prometheus.yml")):
        checked = promtool(*command, directory=PROMETHEUS)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    tested = promtool("test", "rules", RULES_TEST.name, directory=PROMETHEUS)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("splitserve:transfers_failed:ratio_rate5m > 0.02", "splitserve:transfers_failed:ratio_rate5m > 0.5"),
        ("splitserve:kv_quarantined:ratio > 0.1", "splitserve:kv_quarantined:ratio > 0.01"),
    ],
)
def test_an_alert_with_another_threshold_fails_its_test(tmp_path: Path, right: str, wrong: str) -> None:
    text, tests = RULES.read_text(), load(RULES_TEST)
    assert right in text
    (tmp_path / "rules.yml").write_text(text.replace(right, wrong))
    named = {"SplitserveTransfersFailing", "SplitserveKvQuarantine"}
    tests["tests"] = [test for test in tests["tests"] if test["name"] in named]
    (tmp_path / RULES_TEST.name).write_text(yaml.safe_dump(tests))
    assert promtool("test", "rules", RULES_TEST.name, directory=tmp_path).returncode != 0


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases = {test["name"]: test for test in load(RULES_TEST)["tests"]}
    for alert in (rule for rule in rules() if rule.alert):
        case = cases[alert.name]
        given = {match for series in case["input_series"] for match in re.findall(r'cluster="(\w+)"', series["series"])}
        first = case["promql_expr_test"][0]
        assert alert.name in first["expr"]
        firing = {
            match for sample in first["exp_samples"] for match in re.findall(r'cluster="(\w+)"', sample["labels"])
        }
        assert firing, f"{alert.name} fires nowhere"
        assert given - firing, f"{alert.name} fires everywhere"


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    sections = re.split(r"^#+ (.+)$", (DEPLOY / "README.md").read_text(), flags=re.MULTILINE)
    runbook = {anchor(title): text for title, text in zip(sections[1::2], sections[2::2], strict=True)}
    for alert in (rule for rule in rules() if rule.alert):
        assert alert.labels["severity"] in ("critical", "warning"), alert.name
        assert alert.annotations["summary"], alert.name
        assert len(alert.annotations["description"]) > 60, alert.name
        page, _, heading = alert.annotations["runbook_url"].partition("#")
        assert page == "deploy/README.md", alert.name
        assert f"`{alert.name}`" in runbook[heading], f"{heading} says nothing of {alert.name}"


def anchor(title: str) -> str:
    """As a heading is linked to."""
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def test_rules_and_dashboard_name_only_what_is_there() -> None:
    known = ours() | {rule.name for rule in rules() if not rule.alert} | NOT_OURS
    for name, expression in ((rule.name, rule.expression) for rule in rules()):
        assert {family_of(each) for each in names_in(expression)} <= known, name
    for title, expression in queries():
        assert {family_of(each) for each in names_in(expression)} <= known, title


def test_every_recorded_series_is_used_by_an_alert_or_the_dashboard() -> None:
    recorded = {rule.name for rule in rules() if not rule.alert}
    read = {name for rule in rules() for name in names_in(rule.expression)}
    assert recorded <= read | {name for _, expression in queries() for name in names_in(expression)}


def test_the_dashboard_and_the_table_of_metrics_are_what_their_sources_say() -> None:
    command = [sys.executable, str(DEPLOY / "generate.py"), "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr


def test_every_metric_of_a_worker_or_router_is_on_the_dashboard_or_in_a_rule() -> None:
    read = {family_of(name) for _, expression in queries() for name in names_in(expression)}
    read |= {family_of(name) for rule in rules() for name in names_in(rule.expression)}
    seen_elsewhere = {
        "splitserve_http_request_seconds",  # the router's own times say the same without the HTTP
        "splitserve_worker_kv_overlap_ratio",  # kv_moved_before_prefill_ended counts the bytes
        "splitserve_worker_kv_writes_total",  # transfer_writes says how many each transfer took
    }
    assert ours() - read == seen_elsewhere


def test_panels_do_not_overlap_and_each_says_what_it_shows() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"], panel["title"]
