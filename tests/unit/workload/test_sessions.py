"""Multi-turn sessions as a workload."""

import itertools

import numpy as np
import pytest

from splitserve.core.errors import ConfigError
from splitserve.workload.arrivals import Constant, Poisson
from splitserve.workload.lengths import fixed, uniform
from splitserve.workload.named import workload
from splitserve.workload.pairs import Pair
from splitserve.workload.prefixes import Sharing
from splitserve.workload.requests import Requests
from splitserve.workload.sessions import Dialogue, Sessions
from splitserve.workload.statistics import summary

LENGTHS = Pair(uniform(5, 60), uniform(3, 40))


def sessions(
    turns: float = 4.0, pause_s: float = 5.0, lengths: Pair = LENGTHS, sharing: Sharing | None = None
) -> Sessions:
    return Sessions("s", lengths, Poisson(), Dialogue(turns, pause_s), sharing)


def chains(requests: Requests) -> list[list[int]]:
    """The rows of each session, in the order of their turns, by walking `follows` backwards."""
    assert requests.follows is not None
    followed = set(requests.follows.tolist())
    found = []
    for last in (row for row in range(len(requests)) if row not in followed):
        rows = [last]
        while requests.follows[rows[-1]] >= 0:
            rows.append(int(requests.follows[rows[-1]]))
        found.append(rows[::-1])
    return found


def test_a_later_turns_prompt_is_what_was_read_and_written_before_and_then_new_tokens() -> None:
    drawn = sessions().draw(500, 2.0, 0)
    new = drawn.prompt_tokens - drawn.history_tokens
    assert new.min() >= 5
    assert new.max() <= 60
    for rows in chains(drawn):
        for before, after in itertools.pairwise(rows):
            assert drawn.history_tokens[after] == drawn.prompt_tokens[before] + drawn.output_tokens[before]


def test_turns_come_in_order_and_nominally_a_pause_after_one_another() -> None:
    drawn = sessions().draw(500, 2.0, 0)
    assert drawn.pause_s is not None
    assert (np.diff(drawn.arrival_s) >= 0.0).all()
    for rows in chains(drawn):
        assert rows == sorted(rows)
        assert drawn.pause_s[rows[0]] == 0.0
        assert np.diff(drawn.arrival_s[rows]) == pytest.approx(drawn.pause_s[rows[1:]])


def test_each_turn_is_followed_by_one_at_most_and_says_which() -> None:
    drawn = sessions().draw(300, 2.0, 0)
    assert drawn.follows is not None
    later = drawn.follows[drawn.follows >= 0]
    assert len(set(later.tolist())) == len(later)
    for rows in chains(drawn):
        assert drawn.next_turn[rows].tolist() == [*rows[1:], -1]


def test_turns_and_pauses_have_the_means_asked_for() -> None:
    drawn = sessions(turns=4.0, pause_s=5.0).draw(40_000, 2.0, 0)
    assert drawn.pause_s is not None
    assert summary(drawn).turns == pytest.approx(4.0, rel=0.05)
    assert drawn.pause_s[drawn.history_tokens > 0].mean() == pytest.approx(5.0, rel=0.05)


def test_the_rate_is_of_turns_whatever_sessions_have_of_them() -> None:
    for turns in (1.0, 3.0, 12.0):
        drawn = sessions(turns=turns, pause_s=0.0).draw(20_000, 8.0, 0)
        assert 20_000 / drawn.arrival_s[-1] == pytest.approx(8.0, rel=0.05)


def test_a_session_ends_where_its_next_turn_would_be_longer_than_the_limit() -> None:
    drawn = sessions(turns=50.0, lengths=Pair(fixed(100), fixed(50), limit_tokens=500)).draw(600, 2.0, 0)
    assert (drawn.prompt_tokens + drawn.output_tokens).max() == 450
    assert max(map(len, chains(drawn))) == 3
    assert len(drawn) == 600


def test_the_same_seed_has_the_same_sessions_at_any_rate() -> None:
    slow, fast = (sessions().draw(400, rate, 3) for rate in (1.0, 7.0))
    lengths = [
        sorted([(drawn.prompt_tokens[row], drawn.output_tokens[row]) for row in rows] for rows in chains(drawn))
        for drawn in (slow, fast)
    ]
    assert lengths[0] == lengths[1]
    firsts = [np.sort(drawn.arrival_s[drawn.history_tokens == 0]) for drawn in (slow, fast)]
    assert firsts[0] == pytest.approx(firsts[1] * 7.0)


def test_sessions_of_one_turn_are_single_requests() -> None:
    drawn = Sessions("s", LENGTHS, Constant(), Dialogue(1.0)).draw(5, 2.0, 0)
    assert drawn.follows is not None
    assert drawn.follows.tolist() == [-1] * 5
    assert drawn.arrival_s.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert len(sessions().draw(0, 1.0, 0)) == 0


def test_a_session_shares_the_blocks_of_its_history_and_no_others() -> None:
    drawn = sessions().draw(300, 2.0, 0)
    prefixes = drawn.prefixes
    assert prefixes is not None
    owners: dict[int, int] = {}
    for number, rows in enumerate(chains(drawn)):
        last = prefixes.of(rows[-1]).tolist()
        for row in rows:
            ids = prefixes.of(row).tolist()
            assert ids == last[: drawn.prompt_tokens[row] // prefixes.block_tokens]
        assert all(owners.setdefault(block, number) == number for block in last)


def test_of_a_history_an_endless_cache_holds_all_but_the_last_written_token() -> None:
    drawn = sessions(turns=3.0, lengths=Pair(fixed(32), fixed(17))).draw(2000, 2.0, 0)
    expected = sum((drawn.history_tokens[row] - 1) // 16 * 16 for row in range(2000) if drawn.history_tokens[row])
    assert summary(drawn).prefix_hit == pytest.approx(expected / drawn.prompt_tokens.sum())


def test_first_turns_may_share_what_their_sessions_then_keep() -> None:
    drawn = sessions(sharing=Sharing(0.5, groups=2), lengths=Pair(fixed(64), fixed(10))).draw(200, 2.0, 0)
    prefixes = drawn.prefixes
    assert prefixes is not None
    begins = {tuple(prefixes.of(row)[:2].tolist()) for row in range(200)}
    assert len(begins) == 2
    rest = [prefixes.of(rows[-1])[2:].tolist() for rows in chains(drawn)]
    assert len(set(itertools.chain(*rest))) == sum(map(len, rest))
    assert (
        summary(drawn).prefix_hit > summary(sessions(lengths=Pair(fixed(64), fixed(10))).draw(200, 2.0, 0)).prefix_hit
    )


def test_the_command_line_names_them_and_says_what_they_are() -> None:
    found = workload("lognormal:prompt=200,output=100,sigma=0.5,limit=4096,sessions=3,pause=2,arrivals=gamma:cv=2")
    assert isinstance(found, Sessions)
    assert found.dialogue == Dialogue(3.0, 2.0)
    assert found.notes[-1].startswith("sessions of 3 turns in the mean, fewer where the limit ends them")
    described = found.describe()
    assert described.prompt.mean == pytest.approx(found.mean_prompt_tokens)
    assert described.output.mean == pytest.approx(found.mean_output_tokens)
    assert described.turns > 2.5
    assert described.rate_rps is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("pause=5", "pause goes with sessions="),
        ("sessions=0.5", "sessions: 0.5 is not a mean number of turns between 1 and 1000"),
        ("sessions=2,pause=-1", "pause: -1 is not a mean of 0 to 86400 seconds"),
        ("sessions=2,shared=0.5,turns=3", "turns goes with single requests"),
        ("sessions=many", "sessions=many is not a number"),
    ],
)
def test_nonsense_is_one_sentence_that_names_it(options: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        workload(f"prompt=5,output=6,{options}")
