"""What each worker holds, as the router knows it."""

from dataclasses import replace
from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.fleet import Health
from splitserve.core.worker import KvFormat, KvMode, Load, Pool, StepCost, WorkerInfo
from splitserve.routing.candidate import Candidate
from splitserve.routing.fleet import Fleet
from splitserve.routing.promise import Effect, Promise
from splitserve.routing.sample import SHARES, WHOLE
from tests.unit.peers import peer

INFO = WorkerInfo(
    uuid="u",
    name="d0",
    pool=Pool.DECODE,
    model="m",
    kv=KvFormat("print", "float32", 16, 4, 2, 64, 1024, KvMode.PUSH, "shm"),
    kv_peers=(peer("u"),),
    total_blocks=64,
    max_sequences=8,
    max_model_len=256,
    engine="sim",
)
DECODE = Promise(Pool.DECODE, 32, waits_for_kv=True)  # 3 blocks of 16: its context and the first token


def load(seen_jobs: int = 0, free_blocks: int = 64, produced_tokens: int = 0, **changes: object) -> Load:
    granted: dict[str, object] = {
        "free_sequences": 8,
        "prefill_tokens": 0,
        "prefill_token_limit": 512,
        "parked_limit_blocks": 32,
        "running": 0,
        "quarantined_blocks": 0,
        "pinned_blocks": 0,
        "pool": Pool.DECODE,
        "draining": False,
    }
    return Load(seen_jobs=seen_jobs, free_blocks=free_blocks, produced_tokens=produced_tokens, **granted | changes)  # type: ignore[arg-type]


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet(silent_after_s=4.0)
    fleet.join(INFO, now=0.0)
    fleet.report("u", load(), now=0.0)
    return fleet


def only(fleet: Fleet, now: float = 0.0) -> Candidate:
    (candidate,) = fleet.candidates(now)
    return candidate


def test_a_worker_gets_nothing_before_its_first_report() -> None:
    fleet = Fleet(silent_after_s=4.0)
    fleet.join(INFO, now=0.0)
    assert not only(fleet).accepting
    fleet.report("u", load(), now=0.0)
    assert only(fleet).accepting


def test_a_promise_is_taken_off_what_the_worker_grants(fleet: Fleet) -> None:
    fleet.promise("u", "j", DECODE)
    left = only(fleet).load
    assert (left.free_blocks, left.free_sequences, left.parked_limit_blocks) == (61, 7, 29)


def test_a_prefills_promise_takes_a_prefill_slot_and_no_sequence(fleet: Fleet) -> None:
    fleet.promise("u", "j", Promise(Pool.PREFILL, 32))
    left = only(fleet).load
    assert (left.free_blocks, left.free_sequences, left.prefill_tokens) == (62, 8, 32)


def test_a_promise_counts_until_a_report_has_seen_its_job(fleet: Fleet) -> None:
    fleet.promise("u", "j", DECODE)
    assert fleet.sent("u", "j") == 1
    fleet.report("u", load(seen_jobs=0), now=1.0)
    assert only(fleet).load.free_blocks == 61
    fleet.report("u", load(seen_jobs=1, free_blocks=61), now=2.0)
    assert only(fleet).load.free_blocks == 61, "counted once, by the worker itself"


def test_a_job_that_ended_before_its_worker_reported_it_still_counts(fleet: Fleet) -> None:
    fleet.promise("u", "j", DECODE)
    fleet.sent("u", "j")
    fleet.ended("u", "j")
    assert only(fleet).load.free_blocks == 61
    fleet.report("u", load(seen_jobs=1), now=1.0)
    assert only(fleet).load.free_blocks == 64


def test_a_promise_withdrawn_before_it_was_sent_is_free_at_once(fleet: Fleet) -> None:
    fleet.promise("u", "j", DECODE)
    assert fleet.withdraw("u", "j")
    assert only(fleet).load == load()


def test_a_sent_job_can_not_be_withdrawn(fleet: Fleet) -> None:
    fleet.promise("u", "j", DECODE)
    fleet.sent("u", "j")
    assert not fleet.withdraw("u", "j")
    assert fleet.status("u", 0.0).decodes == 1


def test_withdrawing_from_a_worker_that_left_does_nothing(fleet: Fleet) -> None:
    fleet.promise("u", "j", DECODE)
    fleet.leave("u")
    assert not fleet.withdraw("u", "j")


def test_a_reservation_holds_decode_memory_until_the_worker_says_it_is_free(fleet: Fleet) -> None:
    fleet.promise("u", "j", DECODE)
    fleet.sent("u", "j")
    fleet.report("u", load(seen_jobs=1, free_blocks=61), now=1.0)
    fleet.ended("u", "j")
    assert only(fleet).load.free_blocks == 61
    fleet.report("u", load(seen_jobs=1), now=2.0)
    assert only(fleet).load.free_blocks == 64


def test_a_refusal_lasts_until_the_next_report(fleet: Fleet) -> None:
    fleet.refused("u")
    assert not only(fleet).accepting
    fleet.report("u", load(), now=1.0)
    assert only(fleet).accepting


@pytest.mark.parametrize(("now", "health"), [(4.0, Health.READY), (4.1, Health.SILENT)])
def test_a_worker_is_silent_once_its_last_word_is_too_long_ago(fleet: Fleet, now: float, health: Health) -> None:
    assert only(fleet, now).health is health


def test_deltas_are_a_sign_of_life_as_reports_are(fleet: Fleet) -> None:
    fleet.heard("u", now=10.0, tokens=True)
    assert only(fleet, 12.0).health is Health.READY
    assert fleet.status("u", 12.0).seconds_since_token == 2.0


def test_workers_not_heard_of_for_too_long_are_named(fleet: Fleet) -> None:
    assert fleet.silent_since(before=0.0) == ()
    assert fleet.silent_since(before=0.5) == ("u",)


def test_a_worker_drains_by_our_word_or_by_its_own(fleet: Fleet) -> None:
    fleet.report("u", load(draining=True), now=0.0)
    assert only(fleet).health is Health.DRAINING
    fleet.report("u", load(), now=0.0)
    fleet.drain("u")
    fleet.report("u", load(), now=0.0)
    assert only(fleet).health is Health.DRAINING


def test_a_pool_set_here_holds_though_older_reports_still_name_the_old_one(fleet: Fleet) -> None:
    fleet.set_pool("u", Pool.PREFILL)
    fleet.report("u", load(pool=Pool.DECODE), now=1.0)
    assert only(fleet).pool is Pool.PREFILL
    fleet.report("u", load(pool=Pool.PREFILL), now=2.0)
    assert only(fleet).pool is Pool.PREFILL


def test_a_pool_set_by_another_router_is_followed(fleet: Fleet) -> None:
    fleet.report("u", load(pool=Pool.PREFILL), now=1.0)
    assert only(fleet).pool is Pool.PREFILL


def test_a_worker_is_active_when_its_numbers_move_not_when_it_repeats_them(fleet: Fleet) -> None:
    fleet.report("u", load(), now=5.0)
    assert fleet.active_at("u") == 0.0
    fleet.report("u", load(produced_tokens=1), now=6.0)
    assert fleet.active_at("u") == 6.0
    assert fleet.active_at("somebody else") == float("-inf")


def test_status_counts_the_jobs_by_kind(fleet: Fleet) -> None:
    fleet.promise("u", "a", DECODE)
    fleet.promise("u", "b", Promise(Pool.PREFILL, 32))
    fleet.promise("u", "c", Promise(Pool.PREFILL, 32))
    status = fleet.status("u", now=1.5)
    assert (status.prefills, status.decodes, status.seconds_since_heartbeat) == (2, 1, 1.5)
    assert status.seconds_since_token == -1.0


def test_a_worker_is_found_by_name_or_uuid(fleet: Fleet) -> None:
    assert fleet.find("d0") == fleet.find("u") == INFO
    assert fleet.find("d1") is None


JOBS = st.lists(
    st.tuples(st.builds(Promise, st.sampled_from(Pool), st.integers(1, 200), st.booleans()), st.booleans()), max_size=8
)


@given(jobs=JOBS, seen=st.integers(0, 8), granted=st.integers(0, 64))
def test_what_is_left_is_what_the_worker_itself_would_count(
    jobs: list[tuple[Promise, bool]], seen: int, granted: int
) -> None:
    fleet = Fleet(silent_after_s=4.0)
    fleet.join(INFO, now=0.0)
    sent = 0
    expected = load(seen_jobs=seen, free_blocks=granted)
    for place, (promise, is_sent) in enumerate(jobs):
        fleet.promise("u", str(place), promise)
        sent += is_sent and fleet.sent("u", str(place)) > 0
        if is_sent and sent <= seen:
            continue
        if promise.pool is Pool.PREFILL:
            expected = Effect.of(Promise(Pool.PREFILL, promise.tokens), 16).on(expected)
        else:
            expected = Effect.of(Promise(Pool.DECODE, promise.tokens, promise.waits_for_kv), 16).on(expected)
    fleet.report("u", load(seen_jobs=seen, free_blocks=granted), now=1.0)
    assert only(fleet).load == expected


# Whom a decision looks at --------------------------------------------------------------------------------------------
def large_fleet(workers: int) -> Fleet:
    fleet = Fleet(silent_after_s=4.0)
    for number in range(workers):
        pool = Pool.PREFILL if number % 2 else Pool.DECODE
        fleet.join(replace(INFO, uuid=f"u{number}", name=f"w{number}", pool=pool), now=0.0)
        fleet.report(f"u{number}", load(pool=pool), now=0.0)
    return fleet


def test_a_decision_looks_at_all_of_a_small_fleet() -> None:
    fleet = large_fleet(WHOLE)
    assert fleet.sample(0.0, Random(1)) == fleet.candidates(0.0)


@pytest.mark.parametrize("workers", [200, 2000])
def test_of_a_large_fleet_it_looks_at_workers_of_each_pool_and_at_no_more_in_a_larger_one(workers: int) -> None:
    drawn = large_fleet(workers).sample(0.0, Random(1))
    assert {candidate.pool for candidate in drawn} == set(Pool)
    assert len(drawn) <= sum(SHARES.values()) + len(SHARES) * len(Pool)


def test_room_that_has_just_appeared_is_always_seen() -> None:
    fleet = large_fleet(500)
    for seed in range(20):
        uuid = f"u{seed * 7}"
        fleet.report(uuid, load(pool=Pool.PREFILL if seed % 2 else Pool.DECODE), now=1.0)
        assert uuid in {candidate.info.uuid for candidate in fleet.sample(1.0, Random(seed))}


def test_a_worker_that_a_request_asks_for_is_always_seen_while_it_is_there() -> None:
    fleet = large_fleet(500)
    for seed in range(20):
        asked_for = f"u{seed * 7}"
        assert asked_for in {candidate.info.uuid for candidate in fleet.sample(0.0, Random(seed), [asked_for])}
    fleet.leave("u7")
    assert "u7" not in {candidate.info.uuid for candidate in fleet.sample(0.0, Random(1), ["u7"])}


def test_a_prompt_is_read_behind_those_that_were_promised_before() -> None:
    cost = StepCost(0.0, 0.0, 0.001, inf, 0.0, 0.0, 0.0, 0.0, inf, 0.0, 0.0, stages=1)
    fleet = Fleet(silent_after_s=4.0)
    fleet.join(replace(INFO, step_cost=cost), now=0.0)
    fleet.report("u", load(slowdown=2.0), now=0.0)
    fleet.reads_until("u", 9.0)
    assert fleet.read_s("u", 100, 0, now=1.0) == pytest.approx(0.2), "it reads nothing, whatever was predicted"
    fleet.report("u", load(slowdown=2.0, prefill_tokens=100), now=1.0)
    fleet.reads_until("u", 1.2)
    assert fleet.read_s("u", 100, 0, now=1.1) == pytest.approx(0.1 + 0.2)
    assert fleet.read_s("u", 100, 60, now=1.1) == pytest.approx(0.1 + 0.08)


def test_nobody_predicts_when_a_worker_reads_whose_steps_nobody_has_measured(fleet: Fleet) -> None:
    assert fleet.read_s("u", 100, 0, now=1.0) == 0.0


def test_who_left_or_changed_its_pool_is_drawn_no_more_as_what_it_was() -> None:
    fleet = large_fleet(200)
    fleet.leave("u199")
    fleet.set_pool("u197", Pool.DECODE)
    for seed in range(20):
        drawn = {candidate.info.uuid: candidate.pool for candidate in fleet.sample(0.0, Random(seed))}
        assert "u199" not in drawn
        assert drawn.get("u197", Pool.DECODE) is Pool.DECODE


def test_who_drains_or_fails_is_drawn_no_more() -> None:
    fleet = large_fleet(200)
    fleet.drain("u0")
    fleet.report("u2", load(draining=True), now=0.0)
    fleet.set_failing("u4", True)
    fleet.set_failing("u6", True)
    fleet.set_failing("u6", False)
    seen = {each.info.uuid for seed in range(300) for each in fleet.sample(0.0, Random(seed))}
    assert seen.isdisjoint({"u0", "u2", "u4"})
    assert "u6" in seen


def test_a_promise_makes_another_worker_of_it_at_once() -> None:
    """The only one without decodes is always seen; once it has one it is one of many."""
    fleet = Fleet(silent_after_s=4.0)
    for number in range(200):
        fleet.join(replace(INFO, uuid=f"u{number}"), now=0.0)
        fleet.report(f"u{number}", load(free_sequences=6 if number else 7), now=0.0)
    assert all("u0" in uuids(fleet, seed) for seed in range(20))
    fleet.promise("u0", "j", DECODE)
    fleet.report("u1", load(free_sequences=6), now=0.0)
    assert not all("u0" in uuids(fleet, seed) for seed in range(20))


def uuids(fleet: Fleet, seed: int) -> set[str]:
    return {each.info.uuid for each in fleet.sample(0.0, Random(seed))}


def test_who_speaks_again_is_ready_again(fleet: Fleet) -> None:
    assert only(fleet, 9.0).health is Health.SILENT
    fleet.heard("u", now=9.0, tokens=False)
    assert only(fleet, 9.0).health is Health.READY


def test_a_silent_worker_that_fails_or_drains_is_still_known_to(fleet: Fleet) -> None:
    assert only(fleet, 9.0).health is Health.SILENT
    fleet.set_failing("u", True)
    assert only(fleet, 9.0).health is Health.SILENT
    fleet.heard("u", now=9.0, tokens=False)
    assert only(fleet, 9.0).health is Health.FAILING
    fleet.drain("u")
    assert only(fleet, 99.0).health is Health.DRAINING


def test_what_a_worker_promises_to_bear_is_worked_out_anew_with_every_change() -> None:
    cost = StepCost(0.0, 0.0, 0.001, inf, 0.0, 0.0, 0.0, 0.001, inf, 0.0, 0.0, stages=1)
    fleet = Fleet(silent_after_s=4.0)
    fleet.join(replace(INFO, step_cost=cost), now=0.0)
    fleet.report("u", load(free_sequences=7), now=0.0)
    seen = [only(fleet).outlook]
    fleet.promise("u", "j", DECODE)
    seen.append(only(fleet).outlook)
    fleet.withdraw("u", "j")
    seen.append(only(fleet).outlook)
    fleet.report("u", load(free_sequences=7, tpot_s=0.01, slack_s=0.5, slowdown=2.0), now=0.0)
    seen.append(only(fleet).outlook)
    assert [look.decodes for look in seen] == [0, 1, 0, 0]
    assert [look.slowdown for look in seen] == [1.0, 1.0, 1.0, 2.0]
    assert seen[3].slack_s == 0.5
