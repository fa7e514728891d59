"""Routes by what is predicted."""

from dataclasses import replace
from math import inf
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.fleet import Health
from splitserve.core.worker import KvFormat, KvMode, Load, Pool, StepCost, WorkerInfo
from splitserve.latency.cost import latency_of
from splitserve.latency.linear import LinearLatency
from splitserve.routing.admission import Limits, fits_decode, fits_prefill
from splitserve.routing.candidate import Candidate
from splitserve.routing.outlook import alone_s
from splitserve.routing.policy import choose
from splitserve.routing.route import AS_IT_IS, Need, NoRoute, Route, Split, Wait
from tests.unit.peers import peer

T = TypeVar("T")
KV = KvFormat("print", "float32", 16, 4, 2, 64, 1024, KvMode.PUSH, "shm")
LATENCY = LinearLatency(fixed_s=0.006, prefill_token_s=0.00025, decode_token_s=0.0005)
BLOCKS, SEQUENCES, LENGTH = 2000, 33, 4096
TOKENS = 800  # 206 ms alone
READ_S = 0.206


def worker(name: str, decodes: int = 0, reads_s: float = 0.0, **others: object) -> Candidate:
    """With so many decodes, and so long to read yet of the prompts that it has."""
    kv, health = others.pop("kv", KV), others.pop("health", Health.READY)
    assert isinstance(kv, KvFormat)
    info = WorkerInfo(name, name, Pool.DECODE, "m", kv, (peer(name),), BLOCKS, SEQUENCES, LENGTH, "sim")
    limits = Limits.of(BLOCKS, LENGTH, kv.block_size)
    grants = Load(0, BLOCKS, SEQUENCES - 1 - decodes, 0, 2048, limits.parked_limit, 0, 0, 0, Pool.DECODE, False, 0)
    granted = {name: others.pop(name) for name in ("free_blocks", "parked_limit_blocks", "draining") if name in others}
    grants = replace(grants, prefill_tokens=100 if reads_s else 0, **granted)  # type: ignore[arg-type]
    fields: dict[str, object] = {
        "accepting": True,
        "latency": LATENCY,
        "tpot_s": 0.02,
        "slack_s": inf,
        "read_until": reads_s,
    }
    return Candidate(info, limits, hash(kv), Pool.DECODE, health, grants, **(fields | others))  # type: ignore[arg-type]


def chosen(fleet: list[Candidate], need: Need, split: Split = AS_IT_IS) -> tuple[str, str | None] | None:
    """Who decodes and who reads the prompt; None: it waits."""
    found = choose(fleet, need, 0.0, split)
    assert not isinstance(found, NoRoute)
    return (found.decode, found.prefill) if isinstance(found, Route) else None


def need(due: float, tpot_s: float = 0.02, **others: object) -> Need:
    return Need(TOKENS, due=due, tpot_s=tpot_s, output_tokens=100, **others)  # type: ignore[arg-type]


EASY, TIGHT = need(due=2.0), need(due=1.6 * READ_S)


def test_in_an_idle_fleet_one_worker_does_it_all() -> None:
    assert chosen([worker("a"), worker("b")], EASY) == ("a", None)


def test_a_worker_without_decodes_reads_for_the_one_that_has_some() -> None:
    assert chosen([worker("a", decodes=5), worker("b")], EASY) == ("a", "b")


def test_decodes_are_packed() -> None:
    assert chosen([worker("a", decodes=3), worker("b", decodes=9), worker("c")], EASY) == ("b", "c")


def test_a_worker_that_grants_the_sequence_for_prefills_too_has_no_decodes() -> None:
    assert chosen([worker("a", decodes=-1), worker("b", decodes=-1)], EASY) == ("a", None)


def test_a_worker_that_decodes_passes_on_what_it_reads_only_where_that_saves_more_than_the_hand_over() -> None:
    """A step takes a fifth longer on the one that reads: 10 ms for 100 tokens, a fifth of a second for 2,000."""
    fleet = [worker("a", decodes=9, reads_s=1.0), worker("b", decodes=3, slowdown=1.2)]
    assert chosen(fleet, EASY) == ("b", None)
    assert chosen(fleet, replace(EASY, output_tokens=2000)) == ("a", "b")


def test_the_least_busy_of_those_that_decode_takes_it_though_a_busy_one_hardly_notices() -> None:
    """The first four decodes add 2 ms to a step, those after them half as much."""
    cost = StepCost(0.006, 0.0, 0.00025, inf, 0.0, 0.0, 0.0, 0.002, 4.0, -0.001, 0.0, stages=1)
    fleet = [worker("a", decodes=9, latency=latency_of(cost)), worker("b", decodes=2, latency=latency_of(cost))]
    assert chosen(fleet, EASY) == ("b", None)


def test_a_worker_begins_to_decode_where_more_are_to() -> None:
    fleet = [worker("a", decodes=5), worker("b")]
    assert chosen(fleet, EASY, Split(opens=True)) == ("b", None)
    assert chosen([worker("a", decodes=5), worker("b", reads_s=1.0)], TIGHT, Split(opens=True)) == ("a", None)


def test_a_worker_that_is_not_to_go_on_reads_for_the_one_that_is() -> None:
    fleet = [worker("a", decodes=19), worker("b", decodes=5)]
    assert chosen(fleet, EASY) == ("b", None)
    assert chosen(fleet, EASY, Split(keep=0.5)) == ("a", "b")


def test_it_decodes_all_the_same_where_nobody_else_is_in_time() -> None:
    fleet = [worker("a", decodes=9, reads_s=1.0, slack_s=0.0), worker("b", decodes=5)]
    assert chosen(fleet, TIGHT, Split(keep=0.5)) == ("b", None)


def test_but_not_once_too_many_do() -> None:
    fleet = [worker("a", decodes=9, reads_s=1.0, slack_s=0.0), worker("b", decodes=5)]
    assert chosen(fleet, TIGHT, Split(keep=0.5, closed=True)) == ("a", "b")
    full = [worker("a", decodes=29, slack_s=0.0), worker("b", decodes=5), worker("c")]
    assert chosen(full, TIGHT, Split(keep=0.5)) == ("b", "c")
    assert chosen(full, TIGHT, Split(keep=0.5, closed=True)) is None


def test_of_unlike_workers_those_go_on_that_are_better_at_it() -> None:
    other = LinearLatency(fixed_s=0.006, prefill_token_s=0.00025, decode_token_s=0.0005)
    fleet = [worker("a", decodes=19), worker("b", decodes=5, latency=other)]
    worth = {id(LATENCY): 1.0, id(other): 2.0}
    assert chosen(fleet, EASY, Split(keep=0.5)) == ("a", "b")
    assert chosen(fleet, EASY, Split(keep=0.5, worth=worth)) == ("b", None)


def test_or_keeps_the_objective() -> None:
    fleet = [worker("a", decodes=29, slack_s=0.0), worker("b", decodes=5)]
    assert chosen(fleet, EASY, Split(keep=0.5)) == ("b", None)


def test_a_worker_whose_steps_would_miss_the_tpot_objective_gets_no_more() -> None:
    """30 decodes take 21 ms; the objective is 20, and 18 as long as nobody has time to spare."""
    assert chosen([worker("a", decodes=29, slack_s=0.0), worker("b", decodes=9), worker("c")], EASY) == ("b", "c")


def test_decodes_with_time_to_spare_may_be_joined_by_more_for_a_while() -> None:
    assert chosen([worker("a", decodes=29, slack_s=1.0), worker("b", decodes=9), worker("c")], EASY) == ("a", "c")


def test_the_tightest_objective_of_a_workers_decodes_counts() -> None:
    fleet = [worker("a", decodes=20, tpot_s=0.015, slack_s=0.0), worker("b", decodes=9), worker("c")]
    assert chosen(fleet, need(2.0, tpot_s=1.0)) == ("b", "c")


def test_a_new_worker_decodes_when_no_other_keeps_the_objective() -> None:
    assert chosen([worker("a", decodes=29, slack_s=0.0), worker("b")], EASY) == ("b", None)


def test_without_one_it_waits() -> None:
    assert chosen([worker(name, decodes=29, slack_s=0.0) for name in "ab"], EASY) is None


def test_an_objective_that_nobody_can_keep_holds_nothing_up() -> None:
    fleet = [worker("a", decodes=29, slack_s=0.0, tpot_s=0.001)]
    assert chosen(fleet, need(2.0, tpot_s=0.001)) == ("a", None)


def test_what_is_in_time_may_wait_for_the_worker_that_costs_least() -> None:
    assert chosen([worker("a", decodes=5), worker("b", reads_s=0.2)], EASY) is None


def test_what_would_be_late_goes_where_it_is_read_soonest() -> None:
    assert chosen([worker("a", decodes=5), worker("b", reads_s=0.2)], TIGHT) == ("a", None)


def test_beside_decodes_without_slack_a_prompt_takes_longer() -> None:
    """b reads in its decodes' slack, a at a little over half its speed."""
    fleet = [worker("a", decodes=5, slack_s=0.0), worker("b", decodes=5)]
    assert chosen(fleet, TIGHT) == ("b", None)


def test_a_slower_worker_is_predicted_to_take_longer() -> None:
    assert chosen([worker("a", slowdown=2.0), worker("b")], TIGHT) == ("b", None)


def test_kv_moves_only_between_workers_that_can_write_each_others() -> None:
    other = replace(KV, dtype="bfloat16")
    assert chosen([worker("a", decodes=5), worker("b", kv=other)], EASY) == ("a", None)


def test_a_request_that_must_be_read_where_it_is_decoded_is() -> None:
    assert chosen([worker("a", decodes=5), worker("b")], need(2.0, alone=True)) == ("a", None)


def test_one_token_is_not_worth_moving() -> None:
    fleet = [worker("a", decodes=5), worker("b")]
    assert chosen(fleet, Need(1, due=2.0, tpot_s=0.02, output_tokens=100)) == ("a", None)


def test_without_objectives_pools_count() -> None:
    fleet = [worker("a", decodes=5), worker("b", decodes=9)]
    assert choose(fleet, Need(TOKENS)) == Route("a")


def test_without_every_workers_latency_pools_count() -> None:
    fleet = [worker("a", decodes=5), worker("b", decodes=9, latency=None)]
    assert choose(fleet, EASY, 0.0) == Route("a")


def test_of_equally_busy_workers_the_one_with_the_prompt_cached_reads_it() -> None:
    fleet = [worker(name, decodes=5) for name in "abc"]
    assert chosen(fleet, need(2.0, cached={"b": 400})) == ("b", None)
    assert chosen(fleet, need(2.0, cached={"b": 400, "c": 600})) == ("c", None)
    assert chosen([worker("a", decodes=5), worker("b"), worker("c")], need(2.0, cached={"c": 400})) == ("a", "c")


def test_a_worker_is_asked_to_read_more_as_long_as_that_takes_no_longer_than_its_cache_saves() -> None:
    """600 of 800 tokens save 150 ms."""
    asked = need(2.0, cached={"b": 600})
    assert chosen([worker("a"), worker("b", reads_s=0.149)], asked) == ("b", None)
    assert chosen([worker("a"), worker("b", reads_s=0.151)], asked) == ("a", None)


def test_what_is_cached_makes_a_worker_with_slack_no_slower_than_one_without_decodes() -> None:
    """Nobody but b is in time: 206 ms less 150."""
    asked = need(due=0.1, cached={"b": 600})
    assert chosen([worker("a"), worker("b", decodes=2)], asked) == ("b", None)


def test_only_what_is_not_cached_is_predicted_to_take_time() -> None:
    found = choose([worker("a"), worker("b", reads_s=0.1)], need(2.0, cached={"b": 600}), 0.0)
    assert isinstance(found, Route)
    assert found.decode == "b"
    assert found.read_s == found.ttft_s == pytest.approx(0.1 + READ_S - 0.15)


def test_one_beginning_is_read_by_as_many_workers_as_it_keeps_busy() -> None:
    """Ten prompts at once, cached at b alone: it gets a few, and then each other worker one, and b again."""
    fleet, asked = [worker(name) for name in "abcd"], need(2.0, cached={"b": 600})
    readers = []
    for _ in range(10):
        found = choose(fleet, asked, 0.0)
        if isinstance(found, Route):
            readers.append(found.reader)
            reader = next(each for each in fleet if each.info.uuid == found.reader)
            reader.read_until = found.read_s
            assert isinstance(reader.load, Load)
            reader.load = replace(reader.load, prefill_tokens=TOKENS)
            reader.changed()
    assert readers == ["b", "b", "b", "a", "c", "d"]


def test_what_was_predicted_is_said() -> None:
    found = choose([worker("a", decodes=5), worker("b")], EASY, 0.0)
    assert isinstance(found, Route)
    assert found.read_s == pytest.approx(READ_S)
    assert found.ttft_s == pytest.approx(READ_S + 0.006 + 6 * 0.0005)


workers = st.builds(
    worker,
    st.sampled_from("abcdefgh"),
    decodes=st.integers(-1, SEQUENCES - 1),
    reads_s=st.sampled_from([0.0, 0.1, 3.0]),
    slack_s=st.floats(-1.0, 3.0),
    tpot_s=st.sampled_from([0.001, 0.02, 0.1]),
    slowdown=st.floats(0.5, 3.0),
    accepting=st.booleans(),
)
needs = st.builds(
    Need,
    st.integers(1, LENGTH),
    due=st.floats(-5.0, 5.0),
    tpot_s=st.sampled_from([0.001, 0.02, inf]),
    output_tokens=st.integers(1, 1000),
    alone=st.booleans(),
    cached=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, LENGTH)),
)


splits = st.one_of(st.just(AS_IT_IS), st.just(Split(opens=True)), st.builds(Split, st.floats(0.001, 1.0)))
any_splits = st.one_of(splits, st.builds(Split, st.floats(0.001, 1.0), closed=st.just(True)))


@given(st.lists(workers, min_size=1, unique_by=lambda each: each.info.uuid), st.integers(0, BLOCKS), needs, any_splits)
def test_a_request_goes_where_it_fits_and_the_same_way_in_the_same_state(
    fleet: list[Candidate], free_blocks: int, asked: Need, split: Split
) -> None:
    grants = fleet[0].load
    assert isinstance(grants, Load)
    fleet[0].load = replace(grants, free_blocks=free_blocks)
    found = choose(fleet, asked, 0.0, split)
    assert found == choose(fleet, asked, 0.0, split)
    if not isinstance(found, Route):
        assert found == Wait()
        return
    by_name = {each.info.uuid: each for each in fleet}
    decode, block = by_name[found.decode], KV.block_size
    assert fits_decode(decode.load, asked.tokens, block, waits_for_kv=found.prefill is not None)
    assert decode.accepting
    if found.prefill is not None:
        reader = by_name[found.prefill]
        assert reader is not decode
        assert reader.accepting
        assert not asked.alone
        assert fits_prefill(reader.load, asked.tokens, block)


@given(st.lists(workers, min_size=1, unique_by=lambda each: each.info.uuid), needs, splits)
def test_an_idle_worker_is_never_left_idle_by_a_request_that_would_be_late(
    fleet: list[Candidate], asked: Need, split: Split
) -> None:
    idle = worker("idle", slack_s=inf)
    found = choose([*fleet, idle], replace(asked, due=-1.0), 0.0, split)
    assert isinstance(found, Route)


def mostly(usual: T, *others: T) -> st.SearchStrategy[T]:
    return st.sampled_from([usual] * 4 * len(others) + list(others))


OTHER_KV = replace(KV, dtype="bfloat16")
mixed = st.builds(
    worker,
    st.sampled_from("abcdefgh"),
    decodes=st.integers(-1, SEQUENCES - 1),
    reads_s=st.sampled_from([0.0, 0.1, 3.0]),
    slack_s=st.floats(-1.0, 3.0),
    accepting=mostly(True, False),
    kv=st.sampled_from([KV, OTHER_KV]),
    health=mostly(Health.READY, *Health),
    free_blocks=mostly(BLOCKS, 0, 1, 20, 100),
    parked_limit_blocks=mostly(BLOCKS // 2, 0, 1, 20, 100),
    draining=mostly(False, True),
)
mixed_fleets = st.lists(mixed, min_size=3, max_size=8, unique_by=lambda each: each.info.uuid)
names = mostly(frozenset(), frozenset("a"), frozenset("bc"))
in_reach = st.builds(  # in about the time that it takes
    lambda tokens, times, tpot_s, alone: Need(tokens, due=times * alone_s(LATENCY, tokens), tpot_s=tpot_s, alone=alone),
    mostly(TOKENS, 1, 2, 3000, LENGTH),
    st.floats(0.9, 4.0),
    mostly(0.02, inf),
    mostly(False, True),
)


@settings(max_examples=300)
@given(mixed_fleets, st.one_of(needs, in_reach), names, names, any_splits)
def test_a_route_is_whole_and_of_workers_that_are_there_and_take_it(
    fleet: list[Candidate], asked: Need, exclude: frozenset[str], avoid: frozenset[str], split: Split
) -> None:
    asked = replace(asked, exclude=exclude, avoid=avoid)
    found = choose(fleet, asked, 0.0, split)
    assert found == choose(fleet, asked, 0.0, split)
    if not isinstance(found, Route):
        return
    by_name = {each.info.uuid: each for each in fleet}
    decode = by_name[found.decode]
    used = [decode, by_name[found.reader]]
    assert all(each.accepting and each.health is Health.READY and not each.load.draining for each in used)
    assert exclude.isdisjoint({found.decode, found.reader})
    assert fits_decode(decode.load, asked.tokens, KV.block_size, waits_for_kv=found.prefill is not None)
    if found.prefill is not None:
        assert found.prefill != found.decode
        assert used[0].kv_class == used[1].kv_class
        assert fits_prefill(used[1].load, asked.tokens, KV.block_size)
    if not avoid.isdisjoint({found.decode, found.reader}):
        assert all(
            each.info.uuid in avoid for each in fleet if each.health is Health.READY and each.info.uuid not in exclude
        )


@given(st.lists(workers, unique_by=lambda each: each.info.uuid), in_reach, splits)
def test_what_an_idle_worker_could_serve_in_time_is_in_time(fleet: list[Candidate], asked: Need, split: Split) -> None:
    """However many others there are: a route may be later because it costs less, but not late."""
    alone = alone_s(LATENCY, asked.tokens)
    found = choose([*fleet, worker("idle")], asked, 0.0, split)
    if alone <= asked.due and isinstance(found, Route):
        assert found.ttft_s <= asked.due


@given(st.lists(workers, min_size=1, unique_by=lambda each: each.info.uuid), in_reach)
def test_one_more_idle_worker_never_makes_a_late_request_later(fleet: list[Candidate], asked: Need) -> None:
    """Where a request can't be in time whatever is done, cost alone counts."""
    before = choose(fleet, asked, 0.0)
    if isinstance(before, Route) and before.ttft_s > asked.due >= alone_s(LATENCY, asked.tokens):
        after = choose([*fleet, worker("idle")], asked, 0.0)
        assert isinstance(after, Route)
        assert after.ttft_s <= before.ttft_s
