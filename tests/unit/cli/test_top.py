"""`splitserve top`: what it shows of one look and of two, and its options."""

import json
from dataclasses import replace
from io import StringIO
from math import inf
from typing import Any

import pytest
from rich.console import Console

from splitserve.cli.top import Look, looks_at
from splitserve.cli.top_view import GONE_FOR_S, Change, Memory, top_view
from splitserve.core.errors import Unavailable
from splitserve.core.fleet import (
    ClassStatus,
    FleetStatus,
    Health,
    LinkStatus,
    Percentiles,
    Phase,
    RecentOutputs,
    RunningRequest,
    RunningRequests,
    WorkerStatus,
)
from splitserve.core.worker import Pool
from tests.unit.cli.console import Run
from tests.unit.cli.test_operate import address, told
from tests.unit.router.scripted import load_of, worker_info
from tests.unit.router.test_late import COST

__all__ = ["address"]  # a fixture

RECENT = RecentOutputs(8, 6, Percentiles(0.1, 0.25, 1.5), Percentiles(0.0095, 0.02, 0.03))
CHAT = ClassStatus("chat", 1.0, 0.0005, 0.05, inf, 100, 93, 0.31, RECENT)
QUIET = ClassStatus("quiet", 1.0, 0.0, 0.05, inf, 5, 5, 0.01)
LONG_ID = "0123456789abcdef0123456789abcdef"


def worker(name: str, pool: Pool = Pool.DECODE, tokens: int = 0, **changes: Any) -> WorkerStatus:
    info = worker_info(name, pool, step_cost=COST)
    load = load_of(info, free_blocks=48, running=3, produced_tokens=tokens, slowdown=1.25, prefill_tokens=77)
    return replace(WorkerStatus(info, pool, Health.READY, load, 0.5, 0.1, 1, 2, 0.0123), **changes)


def look(at: float, *workers: WorkerStatus, router: str = "router", running: RunningRequests | None = None) -> Look:
    links = (LinkStatus("p0", "d0", 3, 1, 5 << 20, 4 << 20), LinkStatus("", "", 9, 0, 0, 0))
    fleet = FleetStatus("demo", workers, 4, 5, router, (CHAT, QUIET), links)
    return Look(at, fleet, running or RunningRequests())


def shown(seen: Look, change: Change | None = None, width: int = 80) -> list[str]:
    """Lines, each with single spaces."""
    out = StringIO()
    Console(file=out, width=width, color_system=None).print(top_view(seen, change or Change()))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_a_worker_shows_load_health_blocks_step_and_slowdown() -> None:
    lines = shown(look(0, worker("d0"), worker("p0", Pool.PREFILL, health=Health.SILENT)), Change({"uuid-d0": 123.4}))
    rows = [line for line in lines if line.startswith(("d0 ", "p0 prefill"))]
    assert rows == [
        "p0 prefill silent 3/8 25% 64 77 12.3 1.25 - 0.5",
        "d0 decode ready 3/8 25% 64 77 12.3 1.25 123 0.5",
    ]
    assert lines[0] == "demo 1 of 2 workers ready, 5 running, 4 waiting, 123 tokens/s router"


def test_what_was_never_measured_is_a_dash() -> None:
    unknown = worker("d0", step_s=-1.0)
    unknown = replace(unknown, worker=replace(unknown.worker, step_cost=None))
    assert "d0 decode ready 3/8 25% 64 77 - - - 0.5" in shown(look(0, unknown))


def test_a_class_shows_percentiles_in_ms_beside_its_objectives() -> None:
    lines = shown(look(0, worker("d0")))
    assert "chat 8 75% 100 250 1500 1000+ 9.5 20 30 50" in lines
    assert not any(line.startswith("quiet") for line in lines), "nothing of it ended in the last minute"


def test_links_and_requests_are_listed_and_long_ids_cut() -> None:
    running = RunningRequests(
        (
            RunningRequest(LONG_ID, "chat", Phase.DECODE, 40, 7, 1.51, "p0", "d0"),
            RunningRequest("r", "chat", Phase.WAITING, 40, 0, 0.04, "", ""),
        ),
        7,
    )
    lines = shown(look(0, worker("d0"), running=running))
    assert "p0 → d0 3 1 5.0 80%" in lines
    assert "all others 9 0 0.0 -" in lines
    assert "Requests in flight, the newest 2 of 7" in lines
    assert f"{LONG_ID[:11]}… chat decode p0 → d0 40 7 1.5" in lines
    assert "r chat waiting - 40 0 0.0" in lines


def test_an_empty_fleet_is_said_in_words() -> None:
    lines = shown(look(0))
    assert "no workers have joined this router" in lines


def test_nothing_is_cut_on_eighty_columns() -> None:
    workers = [worker(f"prefill-{at}", Pool.PREFILL, at * 100_000) for at in range(3)]
    running = RunningRequests(
        (RunningRequest(LONG_ID, "interactive", Phase.PREFILL, 99_999, 9_999, 99.9, "prefill-0", "decode-12"),), 1
    )
    change = Change({"uuid-prefill-0": 12_345.6})
    lines = shown(look(0, *workers, running=running), change)
    assert not any("…" in line.replace(f"{LONG_ID[:11]}…", "") for line in lines)


# Two looks -----------------------------------------------------------------------------------------------------------
def test_tokens_a_second_are_those_between_two_looks() -> None:
    memory = Memory()
    assert memory.take(look(10.0, worker("d0", tokens=100))) == Change()
    change = memory.take(look(12.0, worker("d0", tokens=400), worker("d1", tokens=9000)))
    assert change == Change({"uuid-d0": 150.0}), "of d1 only one look is known"


def test_who_leaves_is_named_for_a_minute() -> None:
    memory = Memory()
    memory.take(look(0.0, worker("d0"), worker("d1")))
    assert memory.take(look(1.0, worker("d0"))).gone == ("d1",)
    assert memory.take(look(GONE_FOR_S + 1.0, worker("d0"))).gone == ("d1",)
    assert memory.take(look(GONE_FOR_S + 1.1, worker("d0"))).gone == ()
    assert "gone in the last minute: d1" in shown(look(1.0, worker("d0")), Change(gone=("d1",)))


def test_another_routers_figures_are_no_continuation() -> None:
    memory = Memory()
    memory.take(look(0.0, worker("d0", tokens=100), worker("d1")))
    assert memory.take(look(1.0, worker("d0", tokens=50), router="restarted")) == Change()


def test_it_looks_once_or_for_ever() -> None:
    fleet = look(0.0).fleet
    assert len(list(looks_at(lambda: fleet, RunningRequests, 0.0, once=True))) == 1
    forever = looks_at(lambda: fleet, RunningRequests, 0.0, once=False)
    assert len([next(forever) for _ in range(3)]) == 3


def test_a_router_that_goes_away_is_waited_for() -> None:
    fleet, answers = look(0.0, worker("d0", tokens=100)).fleet, iter([None, Unavailable("gone"), None])

    def asked() -> FleetStatus:
        error = next(answers)
        if error is not None:
            raise error
        return fleet

    looks = looks_at(asked, RunningRequests, 0.0, once=False)
    seen = [next(looks) for _ in range(3)]
    assert [each.error for each in seen] == ["", "gone", ""]
    assert seen[1].fleet is fleet, "what it said last"
    memory = Memory()
    assert [memory.take(each).gone for each in seen] == [(), (), ()]
    assert "the router does not answer: gone; below is what it said last" in shown(seen[1])


def test_a_router_that_was_never_there_is_an_error() -> None:
    def asked() -> FleetStatus:
        raise Unavailable("gone")

    with pytest.raises(Unavailable):
        next(looks_at(asked, RunningRequests, 0.0, once=False))


# The command ---------------------------------------------------------------------------------------------------------
def test_a_running_router_is_shown(splitserve: Run, address: str) -> None:
    done = splitserve("top", "--router", address, "--once")
    assert done.code == 0
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0].startswith("model 1 of 1 workers ready, 1 running, 0 waiting")
    assert any(line.startswith("r interactive decode d0 3 1 ") for line in lines)


def test_as_json_it_is_the_fleet_with_its_requests(splitserve: Run, address: str) -> None:
    seen = told(splitserve("top", "--router", address, "--once", "--json").out)
    assert [worker["worker"]["name"] for worker in seen["workers"]] == ["d0"]
    (request,) = seen["requests"]
    assert (request["request_id"], request["phase"], seen["requests_total"]) == ("r", "decode", 1)
    assert seen["classes"][1]["ttft_s"] is None


def test_a_router_that_is_not_there_is_named(splitserve: Run) -> None:
    done = splitserve("top", "--router", "127.0.0.1:1", "--once")
    assert done.code == 1
    assert "no router answers at 127.0.0.1:1" in done.err


def test_an_interval_of_nothing_is_refused(splitserve: Run) -> None:
    assert splitserve("top", "--interval", "0", "--once").code == 2


def test_json_has_no_infinity() -> None:
    from splitserve.cli.live import plain

    assert json.dumps(plain({"a": (inf, [1.0, -inf])}), allow_nan=False) == '{"a": [null, [1.0, null]]}'
