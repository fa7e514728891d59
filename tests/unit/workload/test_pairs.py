import numpy as np
import pytest

from splitserve.core.errors import ConfigError
from splitserve.workload.lengths import Tokens, fixed, lognormal, uniform
from splitserve.workload.pairs import Pair, lognormal_pair


def drawn(pair: Pair, count: int = 50_000) -> tuple[Tokens, Tokens]:
    return pair.draw(count, np.random.default_rng(1), np.random.default_rng(2))


@pytest.mark.parametrize("spread", [0.8, 1.0, 1.2, 1.4])
def test_a_lognormal_pair_keeps_both_means_under_its_limit(spread: float) -> None:
    pair = lognormal_pair(755.5, 200.3, spread, 2048)
    assert pair.prompts().mean == pytest.approx(755.5, rel=1e-6)
    assert pair.outputs().mean == pytest.approx(200.3, rel=1e-6)
    prompt, output = drawn(pair)
    assert prompt.mean() == pytest.approx(755.5, rel=0.01)
    assert output.mean() == pytest.approx(200.3, rel=0.02)
    assert (prompt + output).max() <= 2048


def test_drawing_under_a_limit_is_drawing_and_leaving_out_the_longer_ones() -> None:
    prompts, outputs = lognormal(300, 1.0), uniform(1, 400)
    free_prompt, free_output = drawn(Pair(prompts, outputs), 200_000)
    kept = free_prompt + free_output <= 500
    prompt, output = drawn(Pair(prompts, outputs, 500), 200_000)
    for ours, filtered in ((prompt, free_prompt[kept]), (output, free_output[kept])):
        assert np.quantile(ours, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(filtered, [0.1, 0.5, 0.9]), rel=0.03)
    assert np.corrcoef(prompt, output)[0, 1] == pytest.approx(
        np.corrcoef(free_prompt[kept], free_output[kept])[0, 1], abs=0.02
    )
    assert Pair(prompts, outputs, 500).kept() == pytest.approx(kept.mean(), abs=0.005)


def test_without_a_limit_everything_is_kept() -> None:
    pair = Pair(fixed(10), fixed(20))
    assert pair.kept() == 1.0
    assert pair.prompts() is pair.prompt


def test_a_limit_that_nothing_fits_is_an_error() -> None:
    with pytest.raises(ConfigError, match="none is left within the limits"):
        drawn(Pair(fixed(512), fixed(128), 200))


def test_a_pair_whose_means_exceed_its_limit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="limit: 800 tokens is not above the means together"):
        lognormal_pair(700, 200, 1.0, 800)
