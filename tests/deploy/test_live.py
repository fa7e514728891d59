"""Prometheus watches a cluster that serves: every rule, alert and panel has data, and a dead pool is told of."""

import asyncio
from collections.abc import Iterator

import pytest

from deploy.grafana.panels import queries
from splitserve.client import AsyncClient
from splitserve.core.request import SamplingParams
from tests.deploy.live import Live, eventually, live
from tests.deploy.rules import hurried, names_in, rules

# What has no series while nothing goes wrong: whose label says what went wrong, and what a router without a plan lacks.
EMPTY = {
    "splitserve_worker_kv_dropped_messages_total": "no message was dropped yet: there is no kind to name",
    "splitserve_workload_drift": "the router was given no plan",
}
# What says no more than that this machine is busy with other tests: it compares with milliseconds.
BUSY = {"SplitserveLatePushes"}
_LONG = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("live")) as started:
        eventually(lambda: started.load.answered > 50, lambda: "50 requests answered")
        asyncio.run(_move_a_request(started))
        eventually(lambda: _all_up(started), lambda: f"all targets up: {started.prometheus.targets()}")
        eventually(lambda: not started.prometheus.firing(), lambda: f"no alert: {started.prometheus.firing()}")
        started.settled()
        yield started


def _all_up(started: Live) -> bool:
    """Router, three workers and the gateway."""
    health = list(started.prometheus.targets().values())
    return health == ["up"] * 5


async def _move_a_request(started: Live) -> None:
    """So that there is a migration to show."""
    async with AsyncClient(started.up.address) as client:
        async for chunk in client.generate((400,) * 64, _LONG, request_id="to-move"):
            if chunk.index:
                await client.migrate("to-move")
                return


def expected_empty(expression: str) -> bool:
    return bool(names_in(expression) & set(EMPTY))


def test_every_recording_rule_has_data(watched: Live) -> None:
    recorded = [rule.name for rule in rules() if not rule.alert]
    _all_have_data(watched, [(name, name) for name in recorded])


def test_every_panel_has_data(watched: Live) -> None:
    _all_have_data(watched, [(title, shown(expression)) for title, expression in queries()])


def test_whatever_an_alert_reads_is_there(watched: Live) -> None:
    read = {(rule.name, name) for rule in rules() if rule.alert for name in names_in(rule.expression)}
    _all_have_data(watched, sorted(read))


def test_no_alert_has_fired_on_a_healthy_cluster(watched: Live) -> None:
    """Since its first scrapes: before them there is no router."""
    for alert in (rule for rule in rules() if rule.alert):
        watched.prometheus.query(hurried(alert.expression))  # each can be evaluated
    fired = watched.prometheus.query(f'max_over_time(ALERTS{{alertstate="firing"}}[{watched.settled_for_s}s])')
    assert {alert["metric"]["alertname"] for alert in fired} <= BUSY


def test_alerts_fire_when_a_pool_and_then_all_workers_are_killed(watched: Live) -> None:
    watched.up.kill("prefill-0")
    _fire(watched, "SplitservePoolEmpty", "SplitserveTargetDown")
    assert watched.prometheus.firing()["SplitservePoolEmpty"]["labels"]["pool"] == "prefill"
    assert "SplitserveNoWorker" not in watched.prometheus.firing()
    watched.load.slo_class = "batch"
    watched.up.kill("decode-0")
    watched.up.kill("decode-1")
    _fire(
        watched, "SplitserveNoWorker", "SplitserveRequestsFailing", "SplitserveSloBurnFast", "SplitserveGatewayErrors"
    )
    for alert in watched.prometheus.firing().values():
        assert "<no value>" not in "".join(alert["annotations"].values()), alert["labels"]["alertname"]
    watched.up.kill("router")
    _fire(watched, "SplitserveNoRouter")


def shown(expression: str) -> str:
    """As Grafana sends it, with everything selected."""
    scoped = expression.replace("$cluster", ".*").replace("$namespace", ".*")
    return scoped.replace("$__rate_interval", "10s")


def _all_have_data(watched: Live, expressions: list[tuple[str, str]]) -> None:
    """Within the time it takes: windows fill, and rules are evaluated one after the other."""
    missing = [(title, expression) for title, expression in expressions if not expected_empty(expression)]

    def none_is_missing() -> bool:
        missing[:] = [(title, expression) for title, expression in missing if not watched.prometheus.query(expression)]
        return not missing

    eventually(none_is_missing, lambda: f"no data: {missing}")
    for _, expression in expressions:
        watched.prometheus.query(expression)  # those that are empty are right nevertheless


def _fire(watched: Live, *alerts: str) -> None:
    eventually(
        lambda: set(alerts) <= set(watched.prometheus.firing()),
        lambda: f"{set(alerts)} should fire; these do: {set(watched.prometheus.firing())}",
    )
