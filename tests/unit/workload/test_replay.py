import numpy as np
import pytest

from splitserve.core.errors import ConfigError
from splitserve.workload.arrivals import Constant
from splitserve.workload.prefixes import Sharing
from splitserve.workload.replay import Replay
from splitserve.workload.requests import Prefixes, Requests

TRACE = Requests(
    arrival_s=np.array([0.0, 1.0, 1.0, 6.0]),
    prompt_tokens=np.array([100, 200, 300, 400]),
    output_tokens=np.array([1, 2, 3, 4]),
    prefixes=Prefixes(np.array([0, 1, 0, 0, 1, 2]), np.array([0, 2, 3, 3, 6]), 64),
)


def test_replaying_at_the_traces_own_rate_is_the_trace() -> None:
    drawn = Replay("t", TRACE).draw(4, 0.5, seed=0)
    assert drawn.arrival_s == pytest.approx(TRACE.arrival_s)
    assert drawn.prompt_tokens.tolist() == TRACE.prompt_tokens.tolist()
    assert drawn.prefixes is not None
    assert drawn.prefixes.of(3).tolist() == [0, 1, 2]


def test_twice_the_rate_is_half_the_time() -> None:
    assert Replay("t", TRACE).draw(4, 1.0, seed=0).arrival_s == pytest.approx(TRACE.arrival_s / 2)


def test_past_the_end_a_trace_starts_over_at_the_same_mean_rate() -> None:
    drawn = Replay("t", TRACE).draw(8, 0.5, seed=0)
    assert drawn.output_tokens.tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert drawn.arrival_s[4:] - drawn.arrival_s[4] == pytest.approx(TRACE.arrival_s)
    assert drawn.arrival_s[4] - drawn.arrival_s[3] == pytest.approx(2.0)


def test_a_second_pass_shares_no_prefix_with_the_first() -> None:
    prefixes = Replay("t", TRACE).draw(8, 0.5, seed=0).prefixes
    assert prefixes is not None
    first = {block for request in range(4) for block in prefixes.of(request).tolist()}
    second = {block for request in range(4, 8) for block in prefixes.of(request).tolist()}
    assert not first & second
    assert len(prefixes.of(7)) == 3


def test_another_seed_starts_elsewhere_and_keeps_the_order() -> None:
    starts = set()
    for seed in range(1, 20):
        drawn = Replay("t", TRACE).draw(4, 1.0, seed)
        first = int(drawn.output_tokens[0])
        starts.add(first)
        assert drawn.output_tokens.tolist() == [(first - 1 + step) % 4 + 1 for step in range(4)]
        assert drawn.arrival_s[0] == 0.0
        assert np.all(np.diff(drawn.arrival_s) >= 0)
    assert starts == {1, 2, 3, 4}


def test_prompts_of_other_arrivals_keep_their_outputs_and_prefixes() -> None:
    drawn = Replay("t", TRACE, arrivals=Constant()).draw(3, 4.0, seed=0)
    assert drawn.arrival_s.tolist() == [0.0, 0.25, 0.5]
    assert (drawn.prompt_tokens // 100).tolist() == drawn.output_tokens.tolist()


def test_sharing_replaces_the_traces_prefixes() -> None:
    drawn = Replay("t", TRACE, sharing=Sharing(0.5, block_tokens=10)).draw(4, 1.0, seed=0)
    assert drawn.prefixes is not None
    assert np.diff(drawn.prefixes.offsets).tolist() == [5, 10, 15, 20]


def test_a_trace_describes_itself() -> None:
    described = Replay("t", TRACE).describe()
    assert (described.requests, described.prompt.mean, described.output.longest) == (4, 250.0, 4.0)
    assert described.rate_rps == pytest.approx(0.5)
    assert described.prefix_hit == pytest.approx((64 + 128) / 1000)


def test_a_trace_with_other_arrivals_has_no_rate_of_its_own() -> None:
    described = Replay("t", TRACE, arrivals=Constant()).describe()
    assert described.rate_rps is None
    assert described.interarrival_cv == pytest.approx(0.0)


def test_nothing_drawn_is_nothing() -> None:
    assert len(Replay("t", TRACE).draw(0, 1.0, seed=0)) == 0


@pytest.mark.parametrize("rate_rps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_an_error(rate_rps: float) -> None:
    with pytest.raises(ConfigError, match=r"rate: .* give a number above 0"):
        Replay("t", TRACE).draw(1, rate_rps, seed=0)
