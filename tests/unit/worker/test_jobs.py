import pytest

from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.worker import DecodeJob, Delta, Failure, Job, Outcome, Pace, Pool, PrefillJob
from splitserve.routing.admission import Capacity
from splitserve.worker.jobs import JobTable
from tests.unit.peers import TICKET

DONE = Outcome(finish_reason=FinishReason.LENGTH)


def decode(job_id: str, deadline_s: float = 10.0) -> DecodeJob:
    return DecodeJob(job_id, "r", (7,) * 20, SamplingParams(), deadline_s, ticket=TICKET)


@pytest.fixture
def table() -> JobTable:
    table = JobTable(Capacity(100, 16, 8, 320, 64))
    table.attach("east")
    table.attach("west")
    return table


def taken(table: JobTable, router: str, number: int, job: Job, now: float = 0.0) -> None:
    assert table.take(router, number, job, now) is None


def test_each_router_gets_its_own_jobs_deltas_and_one_batch_a_step(table: JobTable) -> None:
    taken(table, "east", 1, decode("a"))
    taken(table, "west", 1, decode("b"))
    taken(table, "east", 2, decode("c"))
    deltas = [Delta(job_id, token_ids=(9,)) for job_id in "abc"]
    step = table.step(deltas)
    assert step.batches == {"east": [deltas[0], deltas[2]], "west": [deltas[1]]}
    assert (step.jobs, step.tokens) == (3, 3)


def test_loads_say_how_many_jobs_of_that_router_they_reflect(table: JobTable) -> None:
    taken(table, "east", 1, decode("a"))
    taken(table, "east", 2, decode("b"))
    east, west = table.load("east", Pool.DECODE, Pace()), table.load("west", Pool.DECODE, Pace())
    assert (east.seen_jobs, west.seen_jobs) == (2, 0)
    assert east.free_blocks == west.free_blocks == 96, "the account is one for all routers"


def test_each_router_hears_how_many_the_worker_serves(table: JobTable) -> None:
    assert [table.load(router, Pool.DECODE, Pace()).routers for router in ("east", "west")] == [2, 2]
    table.detach("west")
    assert table.load("east", Pool.DECODE, Pace()).routers == 1


def test_a_load_says_how_the_engines_decodes_stand(table: JobTable) -> None:
    load = table.load("east", Pool.DECODE, Pace(0.05, 0.2, 1.5))
    assert (load.tpot_s, load.slack_s, load.slowdown) == (0.05, 0.2, 1.5)


def test_a_refused_job_is_seen_and_holds_nothing(table: JobTable) -> None:
    refusal = table.take("east", 1, DecodeJob("a", "r", (7,) * 400, SamplingParams(), 10.0), 0.0)
    assert refusal is not None
    assert refusal.failure is Failure.INVALID
    assert len(table) == 0
    load = table.load("east", Pool.DECODE, Pace())
    assert (load.seen_jobs, load.free_blocks) == (1, 100)


def test_an_ended_job_gives_back_what_it_held_and_is_counted(table: JobTable) -> None:
    taken(table, "east", 1, decode("a"))
    taken(table, "east", 2, PrefillJob("b", "r", (7,) * 20, TICKET, 10.0))
    step = table.step([Delta("a", token_ids=(9,), outcome=DONE), Delta("b"), Delta("b", outcome=DONE)])
    assert [ended.kind for ended in step.ended] == ["decode", "prefill"]
    load = table.load("east", Pool.DECODE, Pace())
    assert (len(table), load.free_blocks, load.running, load.produced_tokens) == (0, 100, 0, 1)


def test_a_decodes_first_token_says_that_its_kv_has_arrived(table: JobTable) -> None:
    taken(table, "east", 1, decode("a"))
    assert table.load("east", Pool.DECODE, Pace()).running == 0
    table.step([Delta("a", token_ids=(9,))])
    assert table.load("east", Pool.DECODE, Pace()).running == 1


def test_a_job_that_fails_before_any_token_was_never_running(table: JobTable) -> None:
    taken(table, "east", 1, decode("a"))
    table.step([Delta("a", outcome=Outcome(failure=Failure.TRANSFER, message="gone"))])
    assert table.load("east", Pool.DECODE, Pace()).produced_tokens == 0
    assert len(table) == 0


def test_a_gone_routers_jobs_are_to_be_cancelled_and_their_deltas_go_nowhere(table: JobTable) -> None:
    taken(table, "east", 1, decode("a"))
    taken(table, "west", 1, decode("b"))
    assert table.detach("east") == ("a",)
    step = table.step([Delta("a", outcome=Outcome(failure=Failure.CANCELLED)), Delta("b", token_ids=(9,))])
    assert list(step.batches) == ["west"]
    assert len(table) == 1
    table.attach("east")
    assert table.load("east", Pool.DECODE, Pace()).seen_jobs == 0


def test_a_router_cannot_stop_another_ones_job(table: JobTable) -> None:
    taken(table, "east", 1, decode("a"))
    assert not table.stop("west", "a")
    assert not table.stop("east", "unknown")
    assert table.stop("east", "a")


def test_a_job_past_its_deadline_is_named_once(table: JobTable) -> None:
    taken(table, "east", 1, decode("soon", deadline_s=5.0), now=100.0)
    taken(table, "east", 2, decode("late", deadline_s=50.0), now=100.0)
    assert table.expired(104.9) == ()
    assert table.expired(105.0) == ("soon",)
    assert table.expired(106.0) == ()


def test_a_job_that_is_being_stopped_does_not_expire_as_well(table: JobTable) -> None:
    taken(table, "east", 1, decode("a", deadline_s=5.0))
    table.stop("east", "a")
    assert table.expired(10.0) == ()


def test_deltas_of_unknown_jobs_are_dropped(table: JobTable) -> None:
    assert table.step([Delta("nobody's", token_ids=(1,))]).batches == {}
