"""In which order a worker hears what it is told."""

from splitserve.core.request import SamplingParams
from splitserve.core.worker import DecodeJob
from splitserve.router.orders import Outbox, SendCancel, SendDrain, SendJob


def job(number: int) -> SendJob:
    return SendJob(number, DecodeJob(f"j{number}", "r", (1, 2), SamplingParams(), 1.0))


def left(outbox: Outbox) -> list[object]:
    return [outbox.get_nowait() for _ in range(outbox.qsize())]


def test_a_cancel_overtakes_a_burst_of_jobs() -> None:
    outbox, jobs = Outbox(), [job(number) for number in range(500)]
    for each in jobs:
        outbox.put_nowait(each)
    outbox.put_nowait(SendDrain())
    outbox.put_nowait(SendCancel("of before"))
    outbox.put_nowait(SendCancel("another"))
    assert left(outbox) == [SendCancel("of before"), SendCancel("another"), *jobs, SendDrain()]


def test_a_cancel_comes_after_its_own_job() -> None:
    outbox = Outbox()
    outbox.put_nowait(job(1))
    outbox.put_nowait(job(2))
    outbox.put_nowait(SendCancel("j1"))
    outbox.put_nowait(job(3))
    assert left(outbox) == [job(1), job(2), SendCancel("j1"), job(3)]


def test_a_job_that_has_gone_out_no_longer_holds_up_its_cancel() -> None:
    outbox = Outbox()
    outbox.put_nowait(job(1))
    assert outbox.get_nowait() == job(1)
    outbox.put_nowait(job(2))
    outbox.put_nowait(SendCancel("j1"))
    outbox.put_nowait(SendCancel("j2"))
    assert left(outbox) == [SendCancel("j1"), job(2), SendCancel("j2")]
