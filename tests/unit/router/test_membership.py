"""Who hears what, without a network."""

import asyncio
from collections.abc import Callable

import pytest

from splitserve.core.cached import CacheNews, Removed, Stored
from splitserve.core.errors import UnknownWorker
from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.worker import DecodeJob, Delta, Failure, Outcome, Pool, PrefillJob, Ticket
from splitserve.router.mailbox import Lost, Mailbox
from splitserve.router.membership import Attachment, Membership
from splitserve.router.orders import Order, SendCancel, SendDrain, SendHandOver, SendJob, SendPeers
from splitserve.routing.fleet import Fleet
from splitserve.routing.promise import Promise
from tests.unit.peers import TICKET
from tests.unit.router.scripted import load_of, worker_info

D0, D1 = worker_info("d0", Pool.DECODE), worker_info("d1", Pool.DECODE)
JOB = DecodeJob("r/1/decode", "r", (5, 6), SamplingParams(max_tokens=4), 5.0)


class Office:
    """A membership on a clock of its own, and how often it said that something changed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.changes = 0
        self.fleet = Fleet(silent_after_s=4.0)
        self.membership = Membership("model", self.fleet, self._note, lambda: self.now)

    def send(self, mailbox: Mailbox) -> None:
        self.fleet.promise(D0.uuid, JOB.job_id, Promise(Pool.DECODE, 2))
        self.membership.send(D0.uuid, JOB, mailbox)

    def _note(self) -> None:
        self.changes += 1


@pytest.fixture
def office() -> Office:
    return Office()


def orders(attachment: Attachment) -> list[Order]:
    return [attachment.outbox.get_nowait() for _ in range(attachment.outbox.qsize())]


async def heard(mailbox: Mailbox) -> list[object]:
    """What is in the mailbox now."""
    try:
        async with asyncio.timeout(0):
            return list(await mailbox.take())
    except TimeoutError:
        return []


async def test_deltas_go_to_the_journey_that_waits_for_them(office: Office) -> None:
    attachment, mailbox = office.membership.join(D0), Mailbox()
    office.send(mailbox)
    assert orders(attachment) == [SendPeers(()), SendJob(1, JOB)]
    token = Delta(JOB.job_id, 0, (9,), "x")
    office.membership.heard(D0.uuid, None, [token, Delta("somebody else's", 0, (1,))])
    assert await heard(mailbox) == [token]


async def test_a_worker_can_not_speak_for_anothers_job(office: Office) -> None:
    office.membership.join(D0)
    office.membership.join(D1)
    mailbox = Mailbox()
    office.send(mailbox)
    office.membership.heard(D1.uuid, None, [Delta(JOB.job_id, 0, (9,), "x")])
    assert await heard(mailbox) == []


async def test_every_journey_with_a_job_on_a_lost_worker_hears_it_once(office: Office) -> None:
    attachment, mailbox = office.membership.join(D0), Mailbox()
    office.send(mailbox)
    office.membership.leave(D0.uuid, "its stream broke")
    office.membership.leave(D0.uuid, "again")
    assert await heard(mailbox) == [Lost(JOB.job_id, "its stream broke")]
    assert attachment.gone.is_set()
    assert office.membership.statuses() == ()


async def test_a_job_for_a_worker_that_has_just_left_is_lost_at_once(office: Office) -> None:
    office.membership.join(D0)
    office.membership.leave(D0.uuid, "gone")
    mailbox = Mailbox()
    office.membership.send(D0.uuid, JOB, mailbox)
    assert [type(event) for event in await heard(mailbox)] == [Lost]


async def test_a_cancelled_job_is_the_workers_until_it_says_that_it_ended(office: Office) -> None:
    attachment, mailbox = office.membership.join(D0), Mailbox()
    office.send(mailbox)
    office.membership.cancel(JOB.job_id)
    office.membership.cancel(JOB.job_id)
    assert [order for order in orders(attachment) if isinstance(order, SendCancel)] == [SendCancel(JOB.job_id)]
    assert office.membership.statuses()[0].decodes == 1
    office.membership.heard(D0.uuid, None, [Delta(JOB.job_id, outcome=Outcome(failure=Failure.CANCELLED))])
    assert office.membership.statuses()[0].decodes == 0
    assert await heard(mailbox) == []


async def test_an_ended_job_is_not_cancelled(office: Office) -> None:
    attachment = office.membership.join(D0)
    office.send(Mailbox())
    office.membership.heard(D0.uuid, None, [Delta(JOB.job_id, outcome=Outcome(FinishReason.STOP))])
    orders(attachment)
    office.membership.cancel(JOB.job_id)
    assert orders(attachment) == []


def test_a_refusal_is_newer_than_the_load_beside_it(office: Office) -> None:
    office.membership.join(D0)
    office.send(Mailbox())
    refusal = Delta(JOB.job_id, outcome=Outcome(failure=Failure.NOT_NOW))
    office.membership.heard(D0.uuid, load_of(D0, seen_jobs=1), [refusal])
    assert not office.fleet.candidates(0.0)[0].accepting
    office.membership.heard(D0.uuid, load_of(D0, seen_jobs=1), [])
    assert office.fleet.candidates(0.0)[0].accepting


def test_whatever_may_let_a_request_go_is_announced(office: Office) -> None:
    steps: list[Callable[[], object]] = [
        lambda: office.membership.join(D0),
        lambda: office.membership.heard(D0.uuid, load_of(D0), []),
        lambda: office.membership.set_pool("d0", Pool.PREFILL),
        lambda: office.membership.drain("d0"),
        lambda: office.membership.leave(D0.uuid, "gone"),
    ]
    for count, step in enumerate(steps, start=1):
        step()
        assert office.changes == count


def test_only_silent_workers_expire(office: Office) -> None:
    office.membership.join(D0)
    office.membership.join(D1)
    office.now = 8.0
    office.membership.heard(D1.uuid, load_of(D1), [])
    assert office.membership.expire(heartbeat_timeout_s=8.0) == ()
    office.now = 8.1
    assert office.membership.expire(heartbeat_timeout_s=8.0) == (D0,)
    assert [status.worker for status in office.membership.statuses()] == [D1]


def test_a_worker_that_was_given_up_is_not_listened_to(office: Office) -> None:
    office.membership.join(D0)
    office.membership.leave(D0.uuid, "silent")
    office.membership.heard(D0.uuid, load_of(D0), [Delta(JOB.job_id, 0, (9,))])
    assert office.membership.statuses() == ()


def test_draining_tells_the_worker_and_takes_it_out_of_service(office: Office) -> None:
    attachment = office.membership.join(D0)
    office.membership.heard(D0.uuid, load_of(D0), [])
    assert office.membership.can_serve
    assert office.membership.drain("d0") is attachment
    assert SendDrain() in orders(attachment)
    assert not office.membership.can_serve


async def test_a_hand_over_goes_to_the_worker_that_runs_the_job(office: Office) -> None:
    attachment, other = office.membership.join(D0), office.membership.join(D1)
    office.send(Mailbox())
    orders(attachment), orders(other)
    office.membership.hand_over(JOB.job_id, TICKET, at_end=True)
    assert orders(attachment) == [SendHandOver(JOB.job_id, TICKET, at_end=True)]
    office.membership.heard(D0.uuid, None, [Delta(JOB.job_id, outcome=Outcome(failure=Failure.MIGRATED))])
    office.membership.hand_over(JOB.job_id, TICKET, at_end=True)
    assert orders(attachment) == orders(other) == [], "it has ended"
    assert (attachment.finished_jobs, attachment.migrated_jobs) == (0, 1)


def test_a_worker_drains_by_an_operators_word_or_by_its_own(office: Office) -> None:
    for info in (D0, D1):
        office.membership.join(info)
        office.membership.heard(info.uuid, load_of(info), [])
    assert not office.membership.draining
    office.membership.drain("d0")
    assert set(office.membership.draining) == {D0.uuid}
    office.membership.heard(D1.uuid, load_of(D1, draining=True), [])
    assert set(office.membership.draining) == {D0.uuid, D1.uuid}


def test_an_unknown_worker_is_an_error_that_lists_the_known(office: Office) -> None:
    office.membership.join(D0)
    with pytest.raises(UnknownWorker, match="there are: d0"):
        office.membership.drain("d7")


def test_the_token_limit_is_that_of_the_smallest_worker(office: Office) -> None:
    assert office.membership.token_limit is None
    office.membership.join(D0)
    assert office.membership.token_limit == 256
    office.membership.join(worker_info("d1", Pool.DECODE, total_blocks=10))
    assert office.membership.token_limit == 160


async def test_prefill_and_decode_jobs_of_one_attempt_share_a_mailbox(office: Office) -> None:
    office.membership.join(D0)
    mailbox = Mailbox()
    office.send(mailbox)
    ticket = Ticket("t", 1, D0.kv_peers, D1.kv_peers)
    prefill = PrefillJob("r/1/prefill", "r", (5, 6), ticket, 5.0)
    office.fleet.promise(D0.uuid, prefill.job_id, Promise(Pool.PREFILL, 2))
    office.membership.send(D0.uuid, prefill, mailbox)
    office.membership.leave(D0.uuid, "gone")
    assert {event.job_id for event in await mailbox.take()} == {JOB.job_id, prefill.job_id}


async def test_what_workers_have_cached_is_known_of_those_that_are_here(office: Office) -> None:
    tokens, size = tuple(range(5 * D0.kv.block_size)), D0.kv.block_size
    for worker, blocks in ((D0, 2), (D1, 3)):
        office.membership.join(worker)
        stored = Stored(tuple(range(blocks)), None, tokens[: blocks * size], size)
        office.membership.cached(worker.uuid, CacheNews(0, (stored,)))
    assert office.membership.cached_tokens(tokens, "", "") == {D0.uuid: 2 * size, D1.uuid: 3 * size}
    assert office.membership.cached_tokens(tokens, "", "salt") == {}
    office.membership.cached(D1.uuid, CacheNews(1, (Removed((1,)),)))
    assert list(office.membership.cached_tokens(tokens, "", "").items()) == [(D1.uuid, size), (D0.uuid, 2 * size)]
    office.membership.leave(D0.uuid, "it left")
    office.membership.cached(D0.uuid, CacheNews(1, ()))
    assert office.membership.cached_tokens(tokens, "", "") == {D1.uuid: size}


async def test_of_a_worker_whose_news_were_lost_only_what_came_later_is_known(office: Office) -> None:
    office.membership.join(D0)
    size = D0.kv.block_size
    one, other = tuple(range(2 * size)), tuple(range(size, 4 * size))
    office.membership.cached(D0.uuid, CacheNews(4, (Stored((1,), None, one[:size], size),)))
    assert office.membership.cached_tokens(one, "", "") == {D0.uuid: size}
    office.membership.cached(D0.uuid, CacheNews(6, (Stored((2,), None, other[:size], size),)))
    assert office.membership.cached_tokens(one, "", "") == {}
    assert office.membership.cached_tokens(other, "", "") == {D0.uuid: size}
