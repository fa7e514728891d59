"""Who gets a request."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.fleet import Health
from splitserve.core.worker import KvFormat, KvMode, Load, Pool, WorkerInfo
from splitserve.routing.admission import Limits, fits_decode, fits_prefill
from splitserve.routing.candidate import Candidate
from splitserve.routing.policy import choose, choose_target
from splitserve.routing.route import Need, NoRoute, Route, Wait
from tests.unit.peers import peer

KV = KvFormat("print", "float32", 16, 4, 2, 64, 1024, KvMode.PUSH, "shm")


def worker(
    name: str,
    pool: Pool,
    health: Health = Health.READY,
    accepting: bool = True,
    kv: KvFormat = KV,
    total_blocks: int = 64,
    max_model_len: int = 256,
    **load: object,
) -> Candidate:
    """An idle worker of 64 blocks of 16 tokens, 16 of them its reserve, unless said otherwise."""
    info = WorkerInfo(name, name, pool, "m", kv, (peer(name),), total_blocks, 8, max_model_len, "sim")
    grants = Load(0, total_blocks, 8, 0, 512, total_blocks // 2, 0, 0, 0, pool, False, 0)
    limits = Limits.of(total_blocks, max_model_len, kv.block_size)
    return Candidate(info, limits, hash(kv), pool, health, replace(grants, **load), accepting)  # type: ignore[arg-type]


def prefill(name: str = "p0", **changes: object) -> Candidate:
    return worker(name, Pool.PREFILL, **changes)  # type: ignore[arg-type]


def decode(name: str = "d0", **changes: object) -> Candidate:
    return worker(name, Pool.DECODE, **changes)  # type: ignore[arg-type]


def test_a_route_is_a_worker_of_each_pool() -> None:
    assert choose([prefill(), decode()], Need(100)) == Route("d0", "p0")


def test_the_least_loaded_workers_are_chosen() -> None:
    fleet = [
        prefill("p0", prefill_tokens=300),
        prefill("p1", prefill_tokens=100),
        decode("d0", free_sequences=3),
        decode("d1", free_sequences=5),
    ]
    assert choose(fleet, Need(100)) == Route("d1", "p1")


def test_of_equally_busy_decode_workers_the_emptier_gets_it() -> None:
    assert choose([prefill(), decode("d0", free_blocks=40), decode("d1", free_blocks=50)], Need(100)) == Route(
        "d1", "p0"
    )


def test_a_tie_goes_to_the_worker_that_joined_first() -> None:
    assert choose([prefill("p0"), prefill("p1"), decode("d0"), decode("d1")], Need(100)) == Route("d0", "p0")


@pytest.mark.parametrize(
    "fleet",
    [
        [prefill(prefill_token_limit=0), decode()],
        [prefill(), decode(free_sequences=0)],
        [prefill(), decode(parked_limit_blocks=6)],
        [prefill(free_blocks=6), decode()],
        [prefill(), decode(accepting=False)],
        [prefill(accepting=False), decode()],
    ],
)
def test_half_a_route_is_never_bound(fleet: list[Candidate]) -> None:
    assert choose(fleet, Need(100)) == Wait()


def test_a_busy_worker_is_passed_by_for_one_that_can_start_now() -> None:
    fleet = [prefill("p0", prefill_token_limit=0), prefill("p1", prefill_tokens=400), decode()]
    assert choose(fleet, Need(100)) == Route("d0", "p1")


def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt() -> None:
    assert choose([decode()], Need(100)) == Route("d0")
    assert choose([decode(), prefill(health=Health.SILENT)], Need(100)) == Route("d0")
    assert choose([decode(), prefill(health=Health.DRAINING)], Need(100)) == Route("d0")


def test_without_a_decode_worker_one_prefill_worker_serves_alone() -> None:
    assert choose([prefill("p0"), prefill("p1")], Need(100)) == Route("p0")


def test_a_prompt_too_long_to_be_moved_is_computed_where_it_decodes() -> None:
    """250 tokens take 16 blocks; of 24 blocks 12 are reserved, so they could never be parked."""
    fleet = [prefill(), decode(total_blocks=24)]
    assert choose(fleet, Need(100)) == Route("d0", "p0")
    assert choose(fleet, Need(250)) == Route("d0")


def test_a_prompt_of_one_token_has_no_kv_to_move() -> None:
    assert choose([prefill(), decode()], Need(1)) == Route("d0")


def test_workers_of_different_kv_formats_are_never_paired() -> None:
    other = replace(KV, dtype="bfloat16")
    assert choose([prefill(kv=other), decode()], Need(100)) == Route("d0")
    assert choose([prefill("p0", kv=other), prefill("p1"), decode()], Need(100)) == Route("d0", "p1")


def test_a_worker_at_fault_is_used_only_when_no_other_is_left() -> None:
    need = Need(100, avoid=frozenset({"d0"}))
    assert choose([prefill(), decode("d0"), decode("d1", free_sequences=1)], need) == Route("d1", "p0")
    assert choose([decode("d0")], need) == Route("d0")


def test_the_request_waits_for_a_busy_worker_rather_than_go_back_to_the_one_at_fault() -> None:
    assert choose([decode("d0"), decode("d1", free_sequences=0)], Need(100, avoid=frozenset({"d0"}))) == Wait()


def test_a_prefill_worker_at_fault_leaves_the_decode_worker_to_compute() -> None:
    assert choose([prefill(), decode()], Need(100, avoid=frozenset({"p0"}))) == Route("d0")


def test_an_excluded_worker_is_never_used() -> None:
    assert isinstance(choose([decode("d0")], Need(100, exclude=frozenset({"d0"}))), NoRoute)


def test_silent_workers_are_waited_for_not_given_up() -> None:
    assert choose([decode(health=Health.SILENT)], Need(100)) == Wait()


@pytest.mark.parametrize("fleet", [[], [decode(health=Health.DRAINING)]])
def test_with_nobody_to_wait_for_the_reason_is_said(fleet: list[Candidate]) -> None:
    choice = choose(fleet, Need(100))
    assert isinstance(choice, NoRoute)
    assert choice.reason


# Where a decode may move ----------------------------------------------------------------------------------------------
def target(fleet: list[Candidate], wanted: str | None = None, tokens: int = 100) -> str | None:
    return choose_target(fleet, tokens, source="d0", wanted=wanted)


def test_a_decode_moves_to_the_least_loaded_other_decode_worker() -> None:
    fleet = [decode("d0"), decode("d1", free_sequences=3), decode("d2", free_sequences=5), prefill()]
    assert target(fleet) == "d2"
    assert target([decode("d0"), prefill()]) is None


def test_a_named_target_is_the_only_one_whatever_its_pool() -> None:
    fleet = [decode("d0"), decode("d1"), decode("d2", free_sequences=0), prefill()]
    assert target(fleet, "p0") == "p0"
    assert target(fleet, "d2") is None
    assert target(fleet, "d0") is None
    assert target(fleet, "nobody") is None


@pytest.mark.parametrize(
    "other",
    [
        decode("d1", health=Health.SILENT),
        decode("d1", health=Health.DRAINING),
        decode("d1", accepting=False),
        decode("d1", parked_limit_blocks=6),
        decode("d1", free_blocks=6),
        decode("d1", kv=replace(KV, dtype="bfloat16")),
    ],
)
def test_no_decode_moves_where_it_would_not_be_taken(other: Candidate) -> None:
    assert target([decode("d0"), decode("d1")]) == "d1"
    assert target([decode("d0"), other]) is None


def test_a_draining_worker_may_be_left() -> None:
    assert target([decode("d0", health=Health.DRAINING), decode("d1")]) == "d1"


def test_a_decode_whose_worker_is_gone_has_no_kv_to_move() -> None:
    assert target([decode("d1")]) is None


loads = st.fixed_dictionaries(
    {
        "free_blocks": st.integers(0, 64),
        "free_sequences": st.integers(0, 8),
        "prefill_tokens": st.integers(0, 1024),
        "parked_limit_blocks": st.integers(0, 32),
    }
)
workers = st.lists(st.tuples(st.sampled_from(Pool), st.sampled_from(Health), st.booleans(), loads), max_size=6).map(
    lambda drawn: [
        worker(f"w{place}", pool, health, accepting, **load)  # type: ignore[arg-type]
        for place, (pool, health, accepting, load) in enumerate(drawn)
    ]
)


@given(fleet=workers, tokens=st.integers(1, 255))
def test_whoever_is_chosen_takes_the_job_by_the_workers_own_rule(fleet: list[Candidate], tokens: int) -> None:
    choice = choose(fleet, Need(tokens))
    if isinstance(choice, Route):
        by_uuid = {candidate.info.uuid: candidate for candidate in fleet}
        chosen = by_uuid[choice.decode]
        assert fits_decode(chosen.load, tokens, 16, waits_for_kv=choice.prefill is not None)
        assert chosen.health is Health.READY
        if choice.prefill is not None:
            assert choice.prefill != choice.decode
            assert fits_prefill(by_uuid[choice.prefill].load, tokens, 16)
            assert by_uuid[choice.prefill].health is Health.READY


@given(fleet=workers, tokens=st.integers(1, 255))
def test_whoever_is_to_take_a_decode_over_parks_it_by_the_workers_own_rule(fleet: list[Candidate], tokens: int) -> None:
    source = decode("source")
    chosen = choose_target([source, *fleet], tokens, "source", None)
    taking = [c for c in fleet if c.pool is Pool.DECODE and c.health is Health.READY and c.accepting]
    able = {c.info.uuid for c in taking if fits_decode(c.load, tokens, 16, waits_for_kv=True)}
    assert (chosen is None) == (not able)
    assert chosen is None or chosen in able


def test_a_request_that_must_run_alone_has_no_prefill_worker() -> None:
    assert choose([prefill(), decode()], Need(100, alone=True)) == Route("d0")
    assert choose([prefill()], Need(100, alone=True)) == Route("p0")
    assert choose([prefill(), decode(free_sequences=0)], Need(100, alone=True)) == Wait()


def test_a_request_goes_beside_its_cached_prompt_if_that_worker_takes_it_now() -> None:
    fleet = [prefill(), decode("d0"), decode("d1", free_blocks=40)]
    assert choose(fleet, Need(100, beside="d1")) == Route("d1")
    assert choose([prefill(), decode("d0"), decode("d1", free_sequences=0)], Need(100, beside="d1")) == Route(
        "d0", "p0"
    )
    assert choose([prefill(), decode("d0")], Need(100, beside="gone")) == Route("d0", "p0")
    assert choose(fleet, Need(100, avoid=frozenset({"d1"}), beside="d1")) == Route("d0", "p0")


def test_a_request_waits_for_its_cached_prompts_worker_while_that_reads_other_prompts() -> None:
    """It is not read again elsewhere meanwhile, and holds up nobody."""
    need = Need(100, beside="d0")
    assert choose([prefill(), decode("d0", prefill_tokens=600), decode("d1")], need) == Wait()
    assert choose([prefill(), decode("d0", accepting=False), decode("d1")], need) == Wait()
    assert choose([prefill(), decode("d0", prefill_tokens=600, free_blocks=2), decode("d1")], need) == Route("d1", "p0")
    assert need.picky


def test_an_adapter_is_asked_of_workers_that_have_it() -> None:
    def with_poet(candidate: Candidate) -> Candidate:
        return replace(candidate, info=replace(candidate.info, loras=("poet",)))

    need = Need(100, lora="poet")
    assert choose([prefill("p0"), with_poet(prefill("p1")), decode("d0"), with_poet(decode("d1"))], need) == Route(
        "d1", "p1"
    )
    assert choose([prefill(), with_poet(decode())], need) == Route("d0")
    assert isinstance(choose([prefill(), decode()], need), NoRoute)


def test_of_equally_busy_workers_the_one_with_the_prompt_cached_reads_it() -> None:
    assert choose([prefill("p0"), prefill("p1"), decode()], Need(100, cached={"p1": 64})) == Route("d0", "p1")
    colocated = [decode("d0"), decode("d1")]
    assert choose(colocated, Need(100, cached={"d1": 64})) == Route("d1")


def test_affinity_yields_where_more_tokens_wait_than_are_cached() -> None:
    for waiting, reader in ((63, "p1"), (65, "p0")):
        fleet = [prefill("p0"), prefill("p1", prefill_tokens=waiting), decode()]
        assert choose(fleet, Need(100, cached={"p1": 64})) == Route("d0", reader)


def test_affinity_yields_where_a_worker_has_more_decodes_than_the_others() -> None:
    """Prompts that begin alike are soon read; it is their decodes that pile up."""
    for free, chosen in ((6, "d1"), (3, "d0")):
        fleet = [decode("d0"), decode("d1", free_sequences=free), decode("d2")]
        assert choose(fleet, Need(100, cached={"d1": 64})) == Route(chosen)


def test_workers_with_the_most_of_a_prompt_cached_are_looked_at_in_any_case() -> None:
    cached = {str(number): 16 * number for number in range(1, 10)}
    assert Need(100, cached=cached).wanted == ("9", "8", "7", "6")
    assert Need(100, cached=cached, beside="2").wanted == ("2", "9", "8", "7", "6")
    assert Need(100).wanted == ()
