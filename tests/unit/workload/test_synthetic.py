import numpy as np
import pytest

from splitserve.core.errors import ConfigError
from splitserve.workload.arrivals import Gamma, Poisson
from splitserve.workload.lengths import lognormal
from splitserve.workload.pairs import Pair
from splitserve.workload.prefixes import Sharing
from splitserve.workload.synthetic import Synthetic

LENGTHS = Pair(lognormal(700, 1.0), lognormal(200, 1.0))
PLAIN = Synthetic("s", LENGTHS, Poisson())


def test_two_rates_are_compared_on_the_same_requests() -> None:
    slow, fast = PLAIN.draw(1000, 2.0, 7), PLAIN.draw(1000, 8.0, 7)
    assert np.array_equal(slow.prompt_tokens, fast.prompt_tokens)
    assert np.array_equal(slow.output_tokens, fast.output_tokens)
    assert slow.arrival_s == pytest.approx(fast.arrival_s * 4)


def test_more_requests_begin_with_the_same_ones() -> None:
    few, many = PLAIN.draw(100, 2.0, 7), PLAIN.draw(1000, 2.0, 7)
    assert np.array_equal(few.prompt_tokens, many.prompt_tokens[:100])
    assert np.array_equal(few.output_tokens, many.output_tokens[:100])


def test_other_arrivals_or_sharing_leave_lengths_as_they_were() -> None:
    other = Synthetic("o", LENGTHS, Gamma(2.0), Sharing(0.5)).draw(1000, 2.0, 7)
    assert np.array_equal(other.prompt_tokens, PLAIN.draw(1000, 2.0, 7).prompt_tokens)
    assert other.prefixes is not None


def test_seeds_differ() -> None:
    assert not np.array_equal(PLAIN.draw(100, 2.0, 7).prompt_tokens, PLAIN.draw(100, 2.0, 8).prompt_tokens)


def test_prompts_and_outputs_are_independent() -> None:
    drawn = PLAIN.draw(50_000, 1.0, 0)
    assert abs(np.corrcoef(drawn.prompt_tokens, drawn.output_tokens)[0, 1]) < 0.02


def test_what_is_described_is_what_is_drawn() -> None:
    described, drawn = PLAIN.describe(), PLAIN.draw(200_000, 1.0, 3)
    for quantiles, tokens in ((described.prompt, drawn.prompt_tokens), (described.output, drawn.output_tokens)):
        assert tokens.mean() == pytest.approx(quantiles.mean, rel=0.02)
        assert np.quantile(tokens, [0.1, 0.5, 0.9]) == pytest.approx(
            [quantiles.p10, quantiles.p50, quantiles.p90], rel=0.03
        )
    assert described.rate_rps is None
    assert described.interarrival_cv == pytest.approx(1.0, abs=0.05)
    assert (PLAIN.mean_prompt_tokens, PLAIN.mean_output_tokens) == (described.prompt.mean, described.output.mean)


def test_a_negative_seed_is_an_error() -> None:
    with pytest.raises(ConfigError, match="seed: -1 is negative"):
        PLAIN.draw(1, 1.0, -1)
