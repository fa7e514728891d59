import asyncio
from collections.abc import AsyncGenerator, Sequence

import numpy as np
import pytest

from splitserve.bench.open_loop import Clock, Limits, Progress, run
from splitserve.bench.run import Ending, Run
from splitserve.core.errors import Overloaded
from splitserve.core.slo import Slo, attainment
from splitserve.workload.arrivals import Poisson
from splitserve.workload.requests import Requests
from tests.unit.bench.virtual import VirtualLoop, run_virtually


def requests(arrival_s: Sequence[float], output_tokens: int = 3) -> Requests:
    count = len(arrival_s)
    return Requests(np.array(arrival_s, dtype=np.float64), np.full(count, 10), np.full(count, output_tokens))


def stand_still(seconds: float) -> None:
    """As if this process computed for so long."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.advance(seconds)


class Server:
    """Answers `tokens` one by one: the first after `ttft_s`, each other `gap_s` later."""

    def __init__(self, ttft_s: float = 0.5, gap_s: float = 0.1, tokens: int = 3) -> None:
        self.ttft_s, self.gap_s, self.tokens = ttft_s, gap_s, tokens
        self.running: set[int] = set()
        self.most_running = 0
        self.closed: list[int] = []

    async def send(self, index: int) -> AsyncGenerator[int, None]:
        self.running.add(index)
        self.most_running = max(self.most_running, len(self.running))
        try:
            await asyncio.sleep(self.ttft_s)
            yield 1
            for _ in range(self.tokens - 1):
                await asyncio.sleep(self.gap_s)
                yield 1
        finally:
            self.running.remove(index)
            self.closed.append(index)


def test_each_request_is_sent_when_it_is_due_and_its_tokens_are_timed() -> None:
    found = run_virtually(run(requests([0.0, 1.0, 1.25]), Server().send))
    assert found.sent_s == pytest.approx([0.0, 1.0, 1.25])
    assert found.first_token_s == pytest.approx([0.5, 1.5, 1.75])
    assert found.last_token_s == pytest.approx([0.7, 1.7, 1.95])
    assert found.tokens.tolist() == [3, 3, 3]
    assert found.count(Ending.DONE) == 3
    assert not found.overloaded


def test_a_slow_server_is_sent_as_much_as_a_fast_one() -> None:
    due = Poisson().times(200, 20.0, np.random.default_rng(0))
    slow, fast = Server(ttft_s=60.0), Server(ttft_s=0.01)
    sent = [run_virtually(run(requests(due.tolist()), server.send)).sent_s for server in (slow, fast)]
    assert sent[0] == pytest.approx(sent[1])
    assert sent[0] == pytest.approx(due)
    assert slow.most_running == 200


def test_ttft_counts_from_when_a_request_was_due_not_from_when_it_was_sent() -> None:
    server = Server(ttft_s=0.5)

    async def stalling(index: int) -> AsyncGenerator[int, None]:
        if index == 0:
            stand_still(2.0)
        async for tokens in server.send(index):
            yield tokens

    found = run_virtually(run(requests([0.0, 1.0]), stalling))
    assert found.lateness_s == pytest.approx([0.0, 1.0])
    assert found.timelines.ttft_s == pytest.approx([2.5, 1.5])


def test_a_sender_that_cannot_keep_up_says_so() -> None:
    server = Server(ttft_s=0.1)

    async def heavy(index: int) -> AsyncGenerator[int, None]:
        stand_still(0.5)
        async for tokens in server.send(index):
            yield tokens

    found = run_virtually(run(requests([0.1 * i for i in range(20)]), heavy))
    assert found.overloaded
    assert found.share_late > 0.9


def test_the_timelines_are_judged_by_the_one_definition_of_attainment() -> None:
    server = Server(ttft_s=0.5, gap_s=0.1)
    found = run_virtually(run(requests([0.0, 1.0]), server.send)).timelines
    assert found.tpot_s == pytest.approx([0.1, 0.1])
    assert attainment(found, Slo(0.51, 0.11)) == 1.0
    assert attainment(found, Slo(0.49, 0.11)) == 0.0
    assert attainment(found, Slo(0.51, 0.09)) == 0.0


def test_a_request_that_fails_is_recorded_and_the_others_go_on() -> None:
    server = Server()

    async def refusing(index: int) -> AsyncGenerator[int, None]:
        if index == 1:
            raise Overloaded("the queue is full", 1.0)
        async for tokens in server.send(index):
            yield tokens
            if index == 2:
                raise ConnectionResetError("peer went away")

    found = run_virtually(run(requests([0.0, 0.1, 0.2, 0.3]), refusing))
    assert found.ending.tolist() == [Ending.DONE, Ending.FAILED, Ending.FAILED, Ending.DONE]
    assert found.record(1).error == "Overloaded: the queue is full"
    assert found.record(2).error == "ConnectionResetError: peer went away"
    assert found.record(2).tokens == 1
    assert [record.error for record in found][3] == ""
    assert attainment(found.timelines, Slo(10.0, 10.0)) == 0.5
    assert not server.running


def test_a_stream_that_ends_without_a_token_has_failed() -> None:
    async def mute(index: int) -> AsyncGenerator[int, None]:
        yield 0

    found = run_virtually(run(requests([0.0]), mute))
    assert found.record(0).ending is Ending.FAILED
    assert found.record(0).error == "ended without a token"
    assert np.isinf(found.first_token_s[0])


def test_an_output_of_another_length_is_counted_as_short() -> None:
    assert run_virtually(run(requests([0.0, 0.1], output_tokens=5), Server(tokens=3).send)).short == 2
    assert run_virtually(run(requests([0.0, 0.1], output_tokens=3), Server(tokens=3).send)).short == 0


def test_a_chunk_of_many_tokens_counts_them_all_and_one_of_none_is_no_chunk() -> None:
    async def send(index: int) -> AsyncGenerator[int, None]:
        for tokens, pause_s in ((2, 1.0), (3, 0.5), (0, 9.0)):
            await asyncio.sleep(pause_s)
            yield tokens

    found = run_virtually(run(requests([0.0], output_tokens=5), send))
    assert found.record(0).tokens == 5
    assert found.last_token_s[0] == pytest.approx(1.5)
    assert found.ended_s[0] == pytest.approx(10.5)
    assert found.chunks.tokens.tolist() == [2, 3]
    assert found.chunks.gaps_s() == pytest.approx([0.5])


def test_gaps_are_between_chunks_of_one_request() -> None:
    found = run_virtually(run(requests([0.0, 0.05]), Server(gap_s=0.1).send))
    assert found.chunks.request.tolist() == [0, 1, 0, 1, 0, 1]
    assert found.chunks.gaps_s() == pytest.approx([0.1] * 4)


def test_gaps_of_many_interleaved_requests_are_each_requests_own() -> None:
    due = Poisson().times(100, 10.0, np.random.default_rng(0)).tolist()
    found = run_virtually(run(requests(due, output_tokens=9), Server(gap_s=0.1, tokens=9).send))
    assert found.chunks.gaps_s() == pytest.approx([0.1] * 800)


def test_only_so_many_chunks_are_kept_but_all_are_counted() -> None:
    found = run_virtually(run(requests([0.0, 1.0]), Server().send, Limits(chunks=4)))
    assert (len(found.chunks.time_s), found.chunks.dropped) == (4, 2)
    assert found.tokens.tolist() == [3, 3]
    assert found.last_token_s == pytest.approx([0.7, 1.7])


def test_the_deadline_ends_what_runs_and_sends_no_more() -> None:
    server = Server(ttft_s=1.0, gap_s=1.0)
    found = run_virtually(run(requests([0.0, 1.5, 5.0]), server.send, Limits(deadline_s=3.2)))
    assert found.ending.tolist() == [Ending.DONE, Ending.CUT_OFF, Ending.NOT_SENT]
    assert found.record(1).tokens == 1
    assert found.ended_s[1] == pytest.approx(3.2)
    assert np.isnan(found.sent_s[2])
    assert found.timelines.tpot_s[1:].tolist() == [np.inf, np.inf]
    assert (server.running, server.closed) == (set(), [0, 1])


def test_a_run_that_is_done_does_not_wait_for_its_deadline() -> None:
    async def timed() -> float:
        start = asyncio.get_running_loop().time()
        await run(requests([0.0]), Server().send, Limits(deadline_s=3600.0))
        return asyncio.get_running_loop().time() - start

    assert run_virtually(timed()) == pytest.approx(0.7)


def test_a_cancelled_run_cancels_what_is_in_flight_before_it_returns() -> None:
    server = Server(ttft_s=100.0)

    async def cancelled() -> int:
        sending = asyncio.create_task(run(requests([0.0, 0.1, 50.0]), server.send))
        await asyncio.sleep(1.0)
        assert len(server.running) == 2
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        return len(asyncio.all_tasks())

    assert run_virtually(cancelled()) == 1  # this one
    assert not server.running


def test_beyond_a_number_in_flight_requests_are_failed_not_held() -> None:
    server = Server(ttft_s=100.0)
    found = run_virtually(run(requests([0.0, 0.1, 0.2, 0.3]), server.send, Limits(in_flight=2)))
    assert server.most_running == 2
    assert found.ending.tolist() == [Ending.DONE, Ending.DONE, Ending.NOT_SENT, Ending.NOT_SENT]
    assert found.record(2).error == "not sent: 2 requests were in flight"
    assert attainment(found.timelines, Slo(1000.0, 10.0)) == 0.5


def test_who_has_ended_makes_room_in_flight() -> None:
    found = run_virtually(run(requests([0.0, 1.0, 2.0]), Server(ttft_s=0.5).send, Limits(in_flight=1)))
    assert found.count(Ending.DONE) == 3


def test_a_defect_of_the_target_ends_the_run_and_leaves_nothing_running() -> None:
    server = Server(ttft_s=100.0)

    async def broken(index: int) -> AsyncGenerator[int, None]:
        if index == 1:
            raise KeyError("a defect")
        async for tokens in server.send(index):
            yield tokens

    with pytest.raises(ExceptionGroup) as raised:
        run_virtually(run(requests([0.0, 0.1, 50.0]), broken))
    assert raised.group_contains(KeyError)
    assert not server.running


def test_errors_that_all_differ_take_bounded_memory() -> None:
    async def failing(index: int) -> AsyncGenerator[int, None]:
        raise OSError(f"request {index} failed")
        yield 1

    found = run_virtually(run(requests([0.0] * 1500), failing))
    assert len(found.errors) == 1001
    assert found.record(1400).error == "one of many other errors"
    assert found.record(3).error == "OSError: request 3 failed"


def test_another_clock_may_be_given() -> None:
    now_s, waits_s = [50.0], list[float]()

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(0)
        waits_s.append(seconds)
        now_s[0] += seconds

    async def at_once(index: int) -> AsyncGenerator[int, None]:
        yield 1

    async def sent() -> Run:
        return await run(requests([2.0, 5.0], 1), at_once, clock=Clock(lambda: now_s[0], sleep))

    assert run_virtually(sent()).sent_s == pytest.approx([2.0, 5.0])
    assert sum(waits_s) == pytest.approx(5.0)


def test_no_requests_are_a_run_without_rows() -> None:
    found = run_virtually(run(requests([]), Server().send))
    assert (len(found), found.overloaded, found.short) == (0, False, 0)


def test_who_watches_is_told_how_far_the_run_is() -> None:
    seen: list[Progress] = []

    async def some_fail(index: int) -> AsyncGenerator[int, None]:
        if index == 1:
            raise OSError("refused")
        async for tokens in Server(ttft_s=0.2, gap_s=0.3).send(index):
            yield tokens

    run_virtually(run(requests([0.0, 0.1, 0.9]), some_fail, watch=seen.append))
    first, second = seen[:2]
    assert [first.at_s, second.at_s] == pytest.approx([0.5, 1.0])
    assert (first.requests, first.sent, first.in_flight, first.done, first.failed) == (3, 2, 1, 0, 1)
    assert (second.sent, second.done, second.tokens, second.error) == (3, 1, 3, "OSError: refused")


def test_who_watches_can_end_the_run() -> None:
    server = Server(ttft_s=100.0)

    def give_up(progress: Progress) -> None:
        if progress.at_s > 2.0:
            raise Overloaded("enough", 1.0)

    with pytest.raises(ExceptionGroup) as raised:
        run_virtually(run(requests([0.0, 50.0]), server.send, watch=give_up))
    assert raised.group_contains(Overloaded)
    assert not server.running
