"""What `splitserve status` shows people."""

from dataclasses import replace
from io import StringIO
from math import inf

from rich.console import Console

from splitserve.cli.fleet_view import view
from splitserve.core.fleet import ClassStatus, Decision, Explanation, FleetStatus, Health, WorkerStatus
from splitserve.core.worker import Pool
from tests.unit.router.scripted import load_of, worker_info
from tests.unit.router.test_late import COST

CHAT = ClassStatus("chat", 1.0, 0.0005, 0.05, inf, 200, 187, 0.6233)
DECISION = Decision("d0", "p0", False, True, 0.0514, 3, 0.948, 0.2, 0.211, 0.2136, 12.34, "")
EXPLANATION = Explanation("r7", "chat", -10, 400, 23, 12.4, 1.2, 0.05, inf, 0, "", (DECISION,))


def shown(seen: FleetStatus | Explanation) -> list[str]:
    """Lines, each with single spaces and without rules."""
    out = StringIO()
    Console(file=out, width=160, color_system=None).print(view(seen))
    return [" ".join(line.split()) for line in out.getvalue().splitlines() if any(c.isalnum() for c in line)]


def worker(name: str, *, measured: bool, health: Health = Health.READY) -> WorkerStatus:
    info = worker_info(name, Pool.DECODE, step_cost=COST if measured else None)
    return WorkerStatus(info, Pool.DECODE, health, load_of(info), 0.1, 0.1, 0, 0)


def fleet(*workers: WorkerStatus, classes: tuple[ClassStatus, ...] = (CHAT,)) -> FleetStatus:
    return FleetStatus("demo", workers, 4, 5, "router", classes)


def test_a_class_shows_its_objectives_and_how_it_did() -> None:
    assert "chat 1 s + 0.5 ms/token 0.05 s - 200 93.5% 0.62" in shown(fleet(worker("d0", measured=True)))


def test_a_class_is_shown_if_it_has_objectives_or_requests() -> None:
    idle = ClassStatus("idle", inf, 0.0, inf, inf, 0, 0, 0.0)
    even = replace(idle, name="even", itl_p99_s=0.2)
    busy = replace(idle, name="busy", ended=3, met=3, goodput_rps=0.01)
    lines = shown(fleet(worker("d0", measured=True), classes=(idle, even, busy)))
    assert "even - - 0.2 s 0 - 0.00" in lines
    assert "busy - - - 3 100.0% 0.01" in lines
    assert not any(line.startswith("idle") for line in lines)
    lines = shown(fleet(worker("d0", measured=True), classes=(idle,)))
    assert not any("SLO class" in line or "scheduling" in line for line in lines)


def test_it_says_whether_requests_go_by_what_is_predicted() -> None:
    on = shown(fleet(worker("d0", measured=True), worker("d1", measured=False, health=Health.DRAINING)))
    assert on[-1].startswith("scheduling: requests with objectives go by what they are predicted to take")
    off = shown(fleet(worker("d0", measured=True), worker("d1", measured=False), worker("d2", measured=False)))
    assert off[-1].startswith("scheduling: by pools alone, since what a step takes is not known of d1, d2")
    assert not any("scheduling" in line for line in shown(fleet()))


def test_an_explanation_shows_what_was_predicted_and_what_came_of_it() -> None:
    lines = shown(EXPLANATION)
    assert lines[0] == (
        "r7: 400 prompt and 23 output tokens, 12.400 s since it came; class chat, priority -10, "
        "objectives TTFT 1.2 s, TPOT 0.05 s"
    )
    assert lines[-1] == "p0 d0 predicted 0.051 3 0.948 0.200 0.211 0.214 12.3"


def test_it_shows_every_attempt_and_how_it_ended() -> None:
    alone = replace(DECISION, decode_worker="d1", prefill_worker="", predicted=False, left_s=inf, first_token_s=-1.0)
    failed = replace(alone, ended="worker d1 is gone: it was killed")
    moved = replace(alone, decode_worker="d2", moved=True)
    lines = shown(replace(EXPLANATION, ttft_s=inf, tpot_s=inf, decisions=(failed, DECISION, moved)))
    assert lines[0].endswith("no objectives")
    assert lines[-4:] == [
        "d1 d1 pools 0.051 3 - - - - 12.3",
        "p0 d0 predicted 0.051 3 0.948 0.200 0.211 0.214 12.3",
        "KV from before d2 moved 0.051 3 - - - - 12.3",
        "d1: worker d1 is gone: it was killed",
    ]


def test_a_waiting_request_shows_its_place() -> None:
    lines = shown(replace(EXPLANATION, decisions=(), place=3, waits_for="for those ahead of it to go"))
    assert lines[1:] == ["waits at place 3 for those ahead of it to go"]
