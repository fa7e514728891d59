"""A later turn's prompt is what was said before it, as far as the server says what it said."""

import itertools
from collections.abc import AsyncGenerator, Sequence

import numpy as np
import pytest

from splitserve.bench.open_loop import run
from splitserve.bench.run import Ending
from splitserve.bench.targets.histories import Histories
from splitserve.bench.targets.opened import Heard, sender
from splitserve.core.errors import Overloaded
from splitserve.workload.arrivals import Poisson
from splitserve.workload.lengths import uniform
from splitserve.workload.pairs import Pair
from splitserve.workload.requests import Requests
from splitserve.workload.sessions import Dialogue, Sessions
from tests.unit.bench.virtual import run_virtually

VOCABULARY = 50_000


def two_turns() -> Requests:
    return Requests(
        np.array([0.0, 1.0]),
        np.array([20, 33]),
        np.array([5, 4]),
        follows=np.array([-1, 0]),
        pause_s=np.array([0.0, 1.0]),
    )


def test_a_later_turn_reads_what_was_read_and_written_before_it() -> None:
    histories = Histories(two_turns(), VOCABULARY, seed=0)
    first = histories.prompt(0)
    histories.answered(0, first, [1, 2, 3, 4, 5])
    second = histories.prompt(1)
    assert second[:25] == [*first, 1, 2, 3, 4, 5]
    assert (len(first), len(second)) == (20, 33)


@pytest.mark.parametrize("answer", [[], [7], [7, 8, 9, 10, 11, 12, 13]])
def test_an_answer_of_another_length_leaves_the_prompt_as_long_as_planned(answer: list[int]) -> None:
    histories = Histories(two_turns(), VOCABULARY, seed=0)
    first = histories.prompt(0)
    histories.answered(0, first, answer)
    second = histories.prompt(1)
    assert len(second) == 33
    assert second[20:25][: len(answer)] == answer[:5]
    assert all(0 <= token < VOCABULARY for token in second)


def test_the_same_seed_asks_the_same_and_another_does_not() -> None:
    def second(seed: int) -> list[int]:
        histories = Histories(two_turns(), VOCABULARY, seed)
        histories.answered(0, histories.prompt(0), [])
        return histories.prompt(1)

    assert second(1) == second(1)
    assert second(1)[25:] != second(2)[25:]


def test_a_session_is_forgotten_once_its_last_turn_is_sent() -> None:
    histories = Histories(two_turns(), VOCABULARY, seed=0)
    histories.answered(0, histories.prompt(0), [])
    assert len(histories) == 1
    histories.answered(1, histories.prompt(1), [])
    assert len(histories) == 0


class Server:
    """Answers each prompt with tokens that count on from its last, if it `tells` which."""

    def __init__(self, tells: bool = True, fails_at: int = -1) -> None:
        self.tells, self.fails_at = tells, fails_at
        self.prompts: list[list[int]] = []

    async def ask(
        self, prompt_ids: Sequence[int], output_tokens: int, heard: Heard | None = None
    ) -> AsyncGenerator[int, None]:
        self.prompts.append(list(prompt_ids))
        if len(self.prompts) == self.fails_at:
            raise Overloaded("the queue is full", 1.0)
        for number in range(output_tokens):
            if heard is not None and self.tells:
                heard([prompt_ids[-1] + 1 + number])
            yield 1


def test_a_server_gets_its_own_words_back() -> None:
    lengths = Pair(uniform(5, 60), uniform(3, 9))
    drawn = Sessions("s", lengths, Poisson(), Dialogue(3.0, 2.0)).draw(60, 5.0, 0)
    server = Server()
    found = run_virtually(run(drawn, sender(server.ask, drawn, VOCABULARY)))
    assert found.count(Ending.DONE) == 60
    assert sorted(map(len, server.prompts)) == sorted(drawn.prompt_tokens.tolist())
    by_beginning = sorted(server.prompts)
    continued = sum(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(by_beginning))
    assert drawn.follows is not None
    assert continued == (drawn.follows >= 0).sum()
    for shorter, longer in itertools.pairwise(by_beginning):
        if longer[: len(shorter)] == shorter:
            assert longer[len(shorter)] == shorter[-1] + 1


def test_a_failed_session_is_not_held() -> None:
    server = Server(fails_at=1)
    found = run_virtually(run(two_turns(), sender(server.ask, two_turns(), VOCABULARY)))
    assert found.ending.tolist() == [Ending.FAILED, Ending.NOT_SENT]
    assert len(server.prompts) == 1


def test_a_server_that_does_not_tell_is_asked_prompts_of_the_same_length() -> None:
    server = Server(tells=False)
    run_virtually(run(two_turns(), sender(server.ask, two_turns(), VOCABULARY)))
    assert list(map(len, server.prompts)) == [20, 33]
    assert server.prompts[1][:20] == server.prompts[0]
