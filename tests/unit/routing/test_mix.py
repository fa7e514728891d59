"""How many workers are to decode."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from splitserve.latency.linear import LinearLatency
from splitserve.routing.mix import LARGEST, REFRESH, Mix
from splitserve.routing.route import AS_IT_IS, Need, Split
from tests.unit.routing.test_adaptive import LATENCY, worker

TPOT_S = 0.02  # a step of one decode takes 6.5 ms, of 28 as much as this


def mix(tokens: int, output_tokens: int, ttft_s: float, cached: dict[str, int] | None = None) -> Mix:
    found = Mix()
    found.add(Need(tokens, output_tokens=output_tokens, cached=cached or {}), ttft_s)
    return found


def split(asked: Mix, workers: int, decoding: int, tpot_s: float = TPOT_S) -> Split:
    return asked.split([worker("a"), worker("b")], workers, decoding, tpot_s)


LONG_PROMPTS = mix(800, 100, ttft_s=2.0)  # 206 ms alone
LONG_OUTPUTS = mix(100, 400, ttft_s=2.0)


def test_nothing_is_known_before_the_first_request() -> None:
    assert split(Mix(), workers=2, decoding=2) is AS_IT_IS


def test_of_two_workers_with_long_prompts_one_is_to_decode() -> None:
    assert split(LONG_PROMPTS, workers=2, decoding=0) == Split(opens=True)
    assert split(LONG_PROMPTS, workers=2, decoding=1) == AS_IT_IS
    assert split(LONG_PROMPTS, workers=2, decoding=2) == Split(keep=0.5, closed=True)


def test_with_long_outputs_all_are() -> None:
    assert split(LONG_OUTPUTS, workers=2, decoding=1) == Split(opens=True)
    assert split(LONG_OUTPUTS, workers=2, decoding=2) == AS_IT_IS


def test_where_no_prompt_may_wait_all_are() -> None:
    assert split(mix(800, 100, ttft_s=0.33), workers=2, decoding=2) == AS_IT_IS


def test_where_prompts_go_on_from_what_a_worker_has_decoded_all_are() -> None:
    """It reads 100 tokens, another 800."""
    assert split(mix(800, 100, ttft_s=2.0, cached={"a": 700}), workers=2, decoding=1) == Split(opens=True)


def test_a_beginning_that_another_worker_has_cached_too_need_not_be_read_where_it_is_decoded() -> None:
    assert split(mix(1500, 100, ttft_s=2.0, cached={"a": 700, "b": 700}), workers=2, decoding=2).keep == 0.5


def test_with_a_tpot_objective_that_nobody_keeps_all_are() -> None:
    assert split(LONG_PROMPTS, workers=2, decoding=2, tpot_s=0.005) == AS_IT_IS


def test_a_fleet_has_readers_in_proportion() -> None:
    """Of 0.256 s decodes take 0.05, in 0.7 of their workers' time; readers are busy for 0.9 of theirs."""
    assert split(LONG_PROMPTS, workers=8, decoding=8).keep == 2 / 8
    assert split(LONG_PROMPTS, workers=32, decoding=32).keep == 8 / 32


def test_more_than_those_may_decode_as_long_as_readers_lose_little_by_it() -> None:
    """Of 24 readers' time a tenth may be lost, and each that decodes loses 0.3 of its own."""
    assert not split(LONG_PROMPTS, workers=32, decoding=15).closed
    assert split(LONG_PROMPTS, workers=32, decoding=17).closed
    assert not split(LONG_PROMPTS, workers=32, decoding=32, tpot_s=1.0).closed


def test_where_workers_differ_the_better_at_decoding_are_to() -> None:
    """`fast` has half the steps of the others: more of its time is left for decodes."""
    fast = LinearLatency(fixed_s=0.003, prefill_token_s=0.000125, decode_token_s=0.00025)
    found = LONG_PROMPTS.split([worker("a"), worker("b", latency=fast)], 2, 2, 0.012)
    assert found.keep == 0.5
    assert found.worth[id(fast)] > found.worth[id(LATENCY)] > 0.0


def test_a_larger_fleet_is_split_in_the_same_shares() -> None:
    small = split(LONG_PROMPTS, workers=LARGEST, decoding=LARGEST)
    assert split(LONG_PROMPTS, workers=100 * LARGEST, decoding=100 * LARGEST) == small


def test_it_follows_the_requests() -> None:
    found = mix(800, 100, ttft_s=2.0)
    assert split(found, workers=2, decoding=2).keep == 0.5
    for _ in range(10 * REFRESH):
        found.add(Need(100, output_tokens=400), 2.0)
    assert split(found, workers=2, decoding=2) == AS_IT_IS


def test_workers_of_which_nobody_knows_what_steps_cost_say_nothing() -> None:
    assert LONG_PROMPTS.split([worker("a", latency=None)], 3, 3, TPOT_S) == AS_IT_IS


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 4000), st.floats(0.0, inf)), max_size=3 * REFRESH),
    st.integers(1, 2000),
    st.integers(0, 2000),
    st.one_of(st.just(inf), st.floats(0.001, 10.0)),
)
def test_at_least_one_decodes_and_what_is_to_end_never_exceeds_what_there_is(
    requests: list[tuple[int, int, float]], workers: int, decoding: int, tpot_s: float
) -> None:
    asked = Mix()
    for tokens, output_tokens, ttft_s in requests:
        asked.add(Need(tokens, output_tokens=output_tokens), ttft_s)
    found = split(asked, workers, min(workers, decoding), tpot_s)
    assert 0.0 < found.keep <= 1.0
    assert not (found.opens and found.keep < 1.0)
    assert not (found.opens and decoding >= workers)
    assert not (found.closed and found.keep == 1.0)
    if decoding == 0:
        assert found.opens or not requests
