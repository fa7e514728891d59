import math
from collections import Counter
from collections.abc import Sequence

import pytest

from splitserve.core.request import SamplingParams
from splitserve.engine.sim.sampler import Context, Sampled, Vocabulary, sample

WORDS = Vocabulary(plain=tuple(range(100, 1000)), eos=(1,))
DIGESTS = bytes(range(64))


def sampled(
    sampling: SamplingParams,
    output: Sequence[int] = (),
    digests: bytes = DIGESTS,
    seed: int = 0,
    prompt: Sequence[int] = (),
) -> Sampled:
    return sample(digests, WORDS, sampling, Context(prompt, output, seed))


def many(sampling: SamplingParams, draws: int = 400) -> Counter[int]:
    return Counter(sampled(sampling, seed=seed).token for seed in range(draws))


GREEDY = SamplingParams(temperature=0)
BEST = sampled(GREEDY).token


def test_greedy_depends_on_the_kv_and_on_nothing_else() -> None:
    assert sampled(GREEDY, output=(5, 6, 7), seed=9).token == BEST
    assert len({sampled(GREEDY, digests=bytes([n]) * 64).token for n in range(100)}) > 80


def test_every_token_is_of_the_vocabulary() -> None:
    tokens = {sampled(GREEDY, digests=n.to_bytes(8, "big")).token for n in range(5000)}
    assert tokens <= {*WORDS.plain, *WORDS.eos}
    assert WORDS.eos[0] in tokens, "texts end by themselves now and then"


def test_below_min_tokens_nothing_ends_the_output() -> None:
    ends = next(n.to_bytes(8, "big") for n in range(5000) if sampled(GREEDY, digests=n.to_bytes(8, "big")).token == 1)
    assert sampled(SamplingParams(temperature=0, min_tokens=1), digests=ends).token != 1
    assert sampled(SamplingParams(temperature=0, min_tokens=1), output=(5,), digests=ends).token == 1
    assert sampled(SamplingParams(temperature=0, min_tokens=1, stop_token_ids=(BEST,))).token != BEST


def test_a_draw_depends_on_the_seed_and_the_position() -> None:
    drawn = SamplingParams(temperature=2.0)
    assert sampled(drawn, seed=3).token == sampled(drawn, seed=3).token
    assert len(many(drawn)) > 3
    assert len({sampled(drawn, seed=3, output=(7,) * n).token for n in range(50)}) > 3


def test_a_low_temperature_prefers_the_best_more() -> None:
    assert many(SamplingParams(temperature=0.2))[BEST] > many(SamplingParams(temperature=1.0))[BEST] > 100


@pytest.mark.parametrize(
    ("sampling", "most"),
    [
        (SamplingParams(temperature=5.0, top_k=2), 2),
        (SamplingParams(temperature=1.0, top_p=0.4), 1),
        (SamplingParams(temperature=1.0, min_p=0.4), 2),
    ],
)
def test_top_k_top_p_and_min_p_leave_only_the_best(sampling: SamplingParams, most: int) -> None:
    assert 1 <= len(many(sampling)) <= most


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0, presence_penalty=2.0),
        SamplingParams(temperature=0, frequency_penalty=2.0),
        SamplingParams(temperature=0, repetition_penalty=5.0),
    ],
)
def test_a_penalty_turns_away_from_a_token_that_was_made(sampling: SamplingParams) -> None:
    assert sampled(sampling).token == BEST
    assert sampled(sampling, output=(BEST,)).token != BEST


def test_only_repetition_looks_at_the_prompt() -> None:
    assert sampled(SamplingParams(temperature=0, presence_penalty=2.0), prompt=(BEST,)).token == BEST
    assert sampled(SamplingParams(temperature=0, repetition_penalty=5.0), prompt=(BEST,)).token != BEST


def test_logprobs_begin_with_the_sampled_token_and_fall() -> None:
    for seed in range(20):
        one = sampled(SamplingParams(temperature=3.0, logprobs=5), seed=seed)
        assert one.logprobs[0].token_id == one.token
        assert len(one.logprobs) in (5, 6)
        others = [logprob.logprob for logprob in one.logprobs[1:]]
        assert others == sorted(others, reverse=True)
        assert len({logprob.token_id for logprob in one.logprobs}) == len(one.logprobs)
    everything = sampled(SamplingParams(temperature=0, logprobs=1000)).logprobs
    assert sum(math.exp(logprob.logprob) for logprob in everything) == pytest.approx(1.0)


def test_a_penalty_of_any_strength_leaves_finite_logprobs_of_what_is_sampled() -> None:
    for strength in (1e4, 1e300, 1.7e308):
        sampling = SamplingParams(temperature=0, repetition_penalty=strength, logprobs=0)
        assert sampled(sampling, prompt=WORDS.plain).logprobs[0].logprob == pytest.approx(0.0)


def test_no_logprobs_are_made_unless_asked_for() -> None:
    assert sampled(GREEDY).logprobs == ()
    assert [logprob.token_id for logprob in sampled(SamplingParams(temperature=0, logprobs=0)).logprobs] == [BEST]
