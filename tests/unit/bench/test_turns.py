"""A session's turns are sent when they must be, and fail with the turn before them."""

from collections.abc import AsyncGenerator, Sequence

import numpy as np
import pytest

from splitserve.bench.open_loop import Limits, run
from splitserve.bench.run import Ending
from splitserve.core.errors import Overloaded
from splitserve.core.slo import Slo, attainment
from splitserve.workload.arrivals import Poisson
from splitserve.workload.lengths import uniform
from splitserve.workload.pairs import Pair
from splitserve.workload.requests import Requests
from splitserve.workload.sessions import Dialogue, Sessions
from tests.unit.bench.test_open_loop import Server
from tests.unit.bench.virtual import run_virtually


def turns(arrival_s: Sequence[float], follows: Sequence[int], pause_s: Sequence[float]) -> Requests:
    count = len(arrival_s)
    return Requests(
        np.array(arrival_s),
        np.full(count, 10),
        np.full(count, 3),
        follows=np.array(follows),
        pause_s=np.array(pause_s),
    )


THREE = turns([0.0, 0.5, 1.0, 2.0], follows=[-1, -1, 0, 2], pause_s=[0.0, 0.0, 1.0, 2.0])


def test_a_turn_is_due_when_the_answer_before_it_has_ended_and_its_pause() -> None:
    found = run_virtually(run(THREE, Server(ttft_s=0.5, gap_s=0.1).send))
    assert found.ended_s == pytest.approx([0.7, 1.2, 2.4, 5.1])
    assert found.scheduled_s == pytest.approx([0.0, 0.5, 1.7, 4.4])
    assert found.sent_s == pytest.approx(found.scheduled_s)
    assert found.timelines.ttft_s == pytest.approx([0.5] * 4)
    assert not found.overloaded


def test_a_slow_server_is_asked_new_sessions_in_time_and_later_turns_later() -> None:
    found = run_virtually(run(THREE, Server(ttft_s=10.0, gap_s=0.1).send))
    assert found.sent_s == pytest.approx([0.0, 0.5, 11.2, 23.4])
    assert found.timelines.ttft_s == pytest.approx([10.0] * 4)


def test_a_prompt_is_asked_for_after_the_answer_before_it_and_ahead_of_its_pause() -> None:
    server, asked = Server(ttft_s=0.5), list[tuple[int, set[int]]]()

    def send(index: int) -> AsyncGenerator[int, None]:
        asked.append((index, set(server.running)))
        return server.send(index)

    run_virtually(run(turns([0.0, 9.0], follows=[-1, 0], pause_s=[0.0, 9.0]), send))
    assert asked == [(0, set()), (1, set())]


def test_a_failed_turn_ends_its_session_and_no_other() -> None:
    server = Server(ttft_s=0.5, gap_s=0.1)

    async def refusing(index: int) -> AsyncGenerator[int, None]:
        if index == 2:
            raise Overloaded("the queue is full", 1.0)
        async for tokens in server.send(index):
            yield tokens

    found = run_virtually(run(THREE, refusing))
    assert found.ending.tolist() == [Ending.DONE, Ending.DONE, Ending.FAILED, Ending.NOT_SENT]
    assert found.record(3).error == "not sent: a turn before it failed"
    assert found.scheduled_s == pytest.approx([0.0, 0.5, 1.7, 3.7])  # as if the third had been answered at once
    assert np.isnan(found.sent_s[3])
    assert attainment(found.timelines, Slo(10.0, 10.0)) == 0.5
    assert attainment(found.after(3.0).timelines, Slo(10.0, 10.0)) == 0.0


def test_all_later_turns_of_a_failed_one_say_why_they_were_not_sent() -> None:
    async def refusing(index: int) -> AsyncGenerator[int, None]:
        raise Overloaded("the queue is full", 1.0)
        yield 1

    found = run_virtually(run(THREE, refusing))
    assert [record.error for record in found][2:] == ["not sent: a turn before it failed"] * 2
    assert found.scheduled_s == pytest.approx([0.0, 0.5, 1.0, 3.0])


def test_a_turn_beyond_the_number_in_flight_fails_with_the_rest_of_its_session() -> None:
    both = turns([0.0, 1.1, 1.7, 2.0], follows=[-1, -1, 0, 2], pause_s=[0.0, 0.0, 1.0, 1.0])
    found = run_virtually(run(both, Server(ttft_s=0.5, gap_s=0.1).send, Limits(in_flight=1)))
    assert found.ending.tolist() == [Ending.DONE, Ending.DONE, Ending.NOT_SENT, Ending.NOT_SENT]
    assert found.record(2).error == "not sent: 1 requests were in flight"
    assert found.record(3).error == "not sent: a turn before it failed"


def test_who_pauses_is_not_in_flight() -> None:
    both = turns([0.0, 0.8, 1.0], follows=[-1, -1, 0], pause_s=[0.0, 0.0, 1.0])
    found = run_virtually(run(both, Server(ttft_s=0.5, gap_s=0.1).send, Limits(in_flight=1)))
    assert found.count(Ending.DONE) == 3


def test_the_deadline_ends_sessions_in_their_pauses_too() -> None:
    server = Server(ttft_s=0.5, gap_s=0.1)
    found = run_virtually(run(THREE, server.send, Limits(deadline_s=3.0)))
    assert found.ending.tolist() == [Ending.DONE] * 3 + [Ending.NOT_SENT]
    assert found.ended_s[:3] == pytest.approx([0.7, 1.2, 2.4])
    assert not server.running


def test_a_drawn_workload_of_sessions_is_served_to_its_end_in_order() -> None:
    lengths = Pair(uniform(5, 60), uniform(3, 4))
    drawn = Sessions("s", lengths, Poisson(), Dialogue(4.0, 2.0)).draw(300, 5.0, 0)
    found = run_virtually(run(drawn, Server(ttft_s=1.0, gap_s=0.1).send))
    assert found.count(Ending.DONE) == 300
    assert drawn.follows is not None
    assert drawn.pause_s is not None
    later = np.flatnonzero(drawn.follows >= 0)
    assert len(later) > 150
    assert found.sent_s[later] == pytest.approx(found.ended_s[drawn.follows[later]] + drawn.pause_s[later])
    assert found.share_late == 0.0


def test_a_request_is_sent_before_the_next_ones_prompt_is_made() -> None:
    order = list[str]()

    def send(index: int) -> AsyncGenerator[int, None]:
        order.append(f"made {index}")
        return sent(index)

    async def sent(index: int) -> AsyncGenerator[int, None]:
        order.append(f"sent {index}")
        yield 3

    run_virtually(run(turns([0.0, 0.0], follows=[-1, -1], pause_s=[0.0, 0.0]), send))
    assert order == ["made 0", "sent 0", "made 1", "sent 1"]
