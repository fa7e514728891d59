"""A worker between a router over real gRPC and an engine that a test speaks for."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.config import KvTransferSettings, SimSettings
from splitserve.core.errors import (
    ConfigError,
    EngineError,
    JoinRefused,
    PermissionDenied,
    SplitserveError,
    Unauthenticated,
    Unavailable,
)
from splitserve.core.model import ModelInfo
from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.versions import Versions
from splitserve.core.worker import DecodeJob, Delta, Failure, KvCounts, Outcome, Pool, TransferEnd, TransferStats
from splitserve.engine.protocol import EngineLoad
from splitserve.engine.sim import SimEngine
from splitserve.rpc import convert
from splitserve.rpc.gen import worker_pb2
from splitserve.rpc.protocol import SPOKEN
from splitserve.worker import link
from splitserve.worker.serve import DRAINED, ENGINE_STALL_S, QUARANTINED
from tests.unit.peers import TICKET, peer
from tests.unit.worker.fakes import (
    PEER,
    TIMEOUT_S,
    FakeRouter,
    Running,
    ScriptedEngine,
    Stream,
    a_decode,
    router_at,
    running,
)

MODEL = ModelInfo.read(DEMO_MODEL)
DONE = Outcome(finish_reason=FinishReason.LENGTH)


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with router_at() as router:
        yield router


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def worker(router: FakeRouter, engine: ScriptedEngine) -> AsyncIterator[Running]:
    async with running(engine, [router], MODEL) as worker:
        yield worker


@pytest.fixture
async def stream(worker: Running, router: FakeRouter) -> Stream:
    return await router.next_stream()


# Joining ------------------------------------------------------------------------------------------------------------
async def test_a_worker_joins_with_the_identity_of_its_engine(worker: Running, stream: Stream) -> None:
    assert (stream.info.uuid, stream.info.name, stream.info.pool) == (PEER.uuid, "w", Pool.DECODE)
    assert (stream.info.model, stream.info.kv_peers, stream.info.total_blocks) == (MODEL.name, (PEER,), 100)
    await stream.until(lambda: bool(stream.loads))
    assert [info.uuid for info in worker.ready] == [PEER.uuid]


async def test_loads_come_without_any_engine_step(stream: Stream) -> None:
    await stream.until(lambda: len(stream.loads) >= 4)
    assert stream.deltas == []
    assert {load.free_blocks for load in stream.loads} == {100}


async def test_a_refused_worker_ends_with_the_routers_sentence(router: FakeRouter, engine: ScriptedEngine) -> None:
    router.refuse = JoinRefused("kv.block_size", "16, but the fleet's is 128; start it alike")
    async with running(engine, [router], MODEL) as worker:
        with pytest.raises(ConfigError, match="fleet's is 128"):
            await worker.exit_code()
    await router.next_refusal()
    assert router.refusals.empty()
    assert engine.closed.is_set()


async def test_a_name_that_is_still_taken_is_asked_for_again(router: FakeRouter, engine: ScriptedEngine) -> None:
    router.refuse = JoinRefused("name", "'w' is taken by a live worker")
    async with running(engine, [router], MODEL) as worker:
        await router.next_refusal()
        await router.next_refusal()
        router.refuse = None
        assert (await router.next_stream()).info.name == "w"
        assert not worker.task.done()


@pytest.mark.parametrize("error", [Unauthenticated("no such key"), PermissionDenied("no scope worker")])
async def test_a_worker_with_the_wrong_key_ends_with_the_routers_sentence(
    router: FakeRouter, engine: ScriptedEngine, error: SplitserveError
) -> None:
    router.refuse = error
    async with running(engine, [router], MODEL) as worker:
        with pytest.raises(ConfigError, match=str(error)):
            await worker.exit_code()


async def test_a_worker_that_was_let_in_once_waits_until_its_key_is_known_again(
    router: FakeRouter, engine: ScriptedEngine
) -> None:
    async with running(engine, [router], MODEL) as worker:
        stream = await router.next_stream()
        router.refuse = Unauthenticated("no such key")
        stream.break_off(Unavailable("the router goes"))
        await router.next_refusal()
        await router.next_refusal()
        router.refuse = None
        await router.next_stream()
        assert not worker.task.done()


MISFIT = JoinRefused("kv.model_fingerprint", "another model's, but the fleet's is f00d; start it alike")


@pytest.fixture
async def west(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeRouter]:
    """A second router, which refuses. Whom it refuses asks again soon."""
    monkeypatch.setattr(link, "REFUSED_BACK_OFF_S", 0.02)
    async with router_at() as west:
        west.refuse = MISFIT
        yield west


async def test_a_worker_that_one_router_refuses_serves_the_others_and_asks_that_one_again(
    router: FakeRouter, west: FakeRouter, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(engine, [router, west], MODEL) as worker:
        stream = await router.next_stream()
        for _ in range(3):
            await west.next_refusal()
        stream.send_job(a_decode("a"))
        await engine.next_job()
        engine.step(Delta("a", 0, (5,), "x", outcome=DONE))
        assert (await stream.outcome_of("a")).finish_reason is FinishReason.LENGTH
        west.refuse = None
        assert (await west.next_stream()).info.uuid == stream.info.uuid
        assert not worker.task.done()
    said = [record for record in caplog.records if record.message == "router refused this worker"]
    assert len(said) == 1, "the same refusal is logged once"
    assert vars(said[0])["splitserve_fields"] == {"router": west.address, "reason": str(MISFIT)}


async def test_a_worker_waits_for_a_router_that_is_not_there_though_another_refuses(
    west: FakeRouter, engine: ScriptedEngine
) -> None:
    late = FakeRouter()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        late.address = f"127.0.0.1:{probe.getsockname()[1]}"
    async with running(engine, [west, late], MODEL) as worker:
        for _ in range(3):
            await west.next_refusal()
        async with router_at(late.address) as there:
            await there.next_stream()
            assert not worker.task.done()


async def test_a_worker_that_every_router_refuses_ends_with_all_their_sentences(
    router: FakeRouter, west: FakeRouter, engine: ScriptedEngine
) -> None:
    router.refuse = JoinRefused("model", "'demo', but this router serves 'other'")
    async with running(engine, [router, west], MODEL) as worker:
        with pytest.raises(ConfigError) as ended:
            await worker.exit_code()
    for each in (router, west):
        assert f"{each.address}: {each.refuse}" in str(ended.value)
    assert engine.closed.is_set()


async def test_a_worker_ends_when_its_last_router_comes_to_refuse_it_too(
    router: FakeRouter, west: FakeRouter, engine: ScriptedEngine
) -> None:
    async with running(engine, [router, west], MODEL) as worker:
        stream = await router.next_stream()
        await west.next_refusal()
        router.refuse = MISFIT
        stream.break_off(Unavailable("upgraded"))
        with pytest.raises(ConfigError, match="every one refused"):
            await worker.exit_code()


async def test_a_key_that_one_router_does_not_know_leaves_the_worker_to_the_others(
    router: FakeRouter, west: FakeRouter, engine: ScriptedEngine
) -> None:
    west.refuse = Unauthenticated("no such key")
    async with running(engine, [router, west], MODEL) as worker:
        await router.next_stream()
        for _ in range(2):
            await west.next_refusal()
        assert not worker.task.done()


async def test_a_refused_worker_drains_without_waiting_to_be_asked_again(
    router: FakeRouter, west: FakeRouter, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "REFUSED_BACK_OFF_S", 10 * TIMEOUT_S)
    async with running(engine, [router, west], MODEL) as worker:
        await router.next_stream()
        await west.next_refusal()
        worker.worker.drain()
        assert await worker.exit_code() == DRAINED


# Versions -----------------------------------------------------------------------------------------------------------
async def test_a_worker_says_the_range_of_versions_that_it_speaks(worker: Running, router: FakeRouter) -> None:
    await router.next_stream()
    (join,) = router.joins
    assert Versions(join.protocol_version, join.max_protocol_version) == SPOKEN


async def test_a_welcome_without_a_version_is_of_a_router_that_knows_the_lowest_alone(
    worker: Running, router: FakeRouter, stream: Stream
) -> None:
    await stream.until(lambda: bool(stream.loads))
    (only,) = worker.worker._links.values()
    assert only.protocol_version == SPOKEN.lowest


@pytest.mark.parametrize("said", [SPOKEN.lowest - 1, SPOKEN.highest + 1])
async def test_a_version_that_the_worker_does_not_speak_is_not_taken_from_a_router(
    router: FakeRouter, engine: ScriptedEngine, said: int
) -> None:
    router.protocol_version = said
    async with running(engine, [router], MODEL) as worker:
        with pytest.raises(ConfigError, match=f"the router chose {said}, but this worker speaks {SPOKEN}"):
            await worker.exit_code()


# Jobs ---------------------------------------------------------------------------------------------------------------
async def test_one_engine_step_is_one_message_for_all_of_a_routers_jobs(engine: ScriptedEngine, stream: Stream) -> None:
    for job_id in "ab":
        stream.send_job(a_decode(job_id))
        await engine.next_job()
    engine.step(Delta("a", 0, (5,), "x"), Delta("b", 0, (6,), "y"))
    await stream.until(lambda: len(stream.deltas) == 2)
    assert [len(message.deltas) for message in stream.messages if message.deltas] == [2]
    assert stream.deltas == [Delta("a", 0, (5,), "x"), Delta("b", 0, (6,), "y")]


async def test_a_load_tells_at_once_which_jobs_it_reflects(engine: ScriptedEngine, stream: Stream) -> None:
    stream.send_job(a_decode("a", tokens=40))
    assert await engine.next_job() == a_decode("a", tokens=40)
    load = await stream.next_load(lambda load: load.seen_jobs == 1)
    assert (load.free_blocks, load.prefill_tokens) == (97, 40)
    engine.step(Delta("a", 0, (5,), "x", outcome=DONE))
    assert (await stream.next_load(lambda load: load.produced_tokens == 1)).free_blocks == 100


async def test_a_job_beyond_what_is_granted_is_answered_and_never_reaches_the_engine(
    engine: ScriptedEngine, stream: Stream
) -> None:
    for number in range(7):
        stream.send_job(a_decode(str(number), tokens=10))
        await engine.next_job()
    stream.send_job(a_decode("too many", tokens=10))
    outcome = await stream.outcome_of("too many")
    assert (outcome.failure, outcome.message) == (Failure.NOT_NOW, "every sequence is taken")
    assert engine.submitted.empty()


async def test_a_job_that_no_worker_can_hold_is_invalid(stream: Stream) -> None:
    stream.send_job(a_decode("long", tokens=400))
    outcome = await stream.outcome_of("long")
    assert (outcome.failure, outcome.field) == (Failure.INVALID, "prompt")


async def test_a_job_of_an_unknown_kind_is_invalid_and_disturbs_nothing(engine: ScriptedEngine, stream: Stream) -> None:
    stream.send(job=worker_pb2.Job(number=1, job_id="odd"))
    assert (await stream.outcome_of("odd")).failure is Failure.INVALID
    stream._jobs = 1
    stream.send_job(a_decode("a"))
    assert (await engine.next_job()).job_id == "a"


async def test_a_cancel_reaches_the_engine_for_a_job_of_this_router_alone(
    engine: ScriptedEngine, stream: Stream
) -> None:
    stream.send_job(a_decode("a"))
    await engine.next_job()
    stream.send(cancel=worker_pb2.Cancel(job_id="not mine"))
    stream.send(cancel=worker_pb2.Cancel(job_id="a"))
    stream.send_job(a_decode("b"))
    await engine.next_job()
    assert await engine.next_cancel() == "a"
    assert engine.cancelled.empty()


async def test_a_job_past_its_deadline_is_cancelled(engine: ScriptedEngine, stream: Stream) -> None:
    stream.send_job(a_decode("a", deadline_s=0.01))
    await engine.next_job()
    assert await engine.next_cancel() == "a"


@pytest.mark.parametrize("failure", [Failure.ENGINE, Failure.TRANSFER])
async def test_a_job_that_fails_here_is_in_the_log_under_its_requests_id(
    engine: ScriptedEngine, stream: Stream, caplog: pytest.LogCaptureFixture, failure: Failure
) -> None:
    caplog.set_level(logging.INFO, "splitserve.worker")
    for job_id in ("a", "b"):
        stream.send_job(a_decode(job_id))
        await engine.next_job()
    engine.step(Delta("a", outcome=Outcome(failure=failure, message="why")), Delta("b", 0, (5,), "x", outcome=DONE))
    await stream.outcome_of("a")
    (line,) = [record for record in caplog.records if record.message == "job failed"]
    assert vars(line)["splitserve_fields"] == {
        "request_id": "request of a",
        "job_id": "a",
        "kind": "decode",
        "failure": failure.value,
        "reason": "why",
    }


# Orders -------------------------------------------------------------------------------------------------------------
async def test_peers_are_connected_before_any_job_needs_them(engine: ScriptedEngine, stream: Stream) -> None:
    stream.send(peers=worker_pb2.Peers(peers=[convert.kv_peer_to_proto(peer("p"))]))
    stream.send_job(a_decode("a"))
    await engine.next_job()
    assert engine.peers == [peer("p")]


async def test_a_worker_changes_pool_while_it_runs(engine: ScriptedEngine, stream: Stream) -> None:
    stream.send_job(a_decode("a"))
    await engine.next_job()
    stream.send(set_pool=worker_pb2.SetPool(pool=worker_pb2.POOL_PREFILL))
    await stream.next_load(lambda load: load.pool is Pool.PREFILL)
    engine.step(Delta("a", 0, (5,), "x", outcome=DONE))
    assert (await stream.outcome_of("a")).failure is None


@pytest.mark.parametrize("at_end", [False, True])
async def test_a_hand_over_reaches_the_engine_for_a_running_job_of_this_router_alone(
    engine: ScriptedEngine, stream: Stream, at_end: bool
) -> None:
    for job_id in ("a", "stopped"):
        stream.send_job(a_decode(job_id))
        await engine.next_job()
    stream.send(cancel=worker_pb2.Cancel(job_id="stopped"))
    for job_id in ("not mine", "stopped", "a"):
        stream.send_hand_over(job_id, TICKET, at_end)
    assert await engine.next_hand_over() == ("a", TICKET, at_end)
    assert engine.handed.empty()


# Leaving ------------------------------------------------------------------------------------------------------------
async def test_a_draining_worker_takes_nothing_more_and_leaves_when_its_jobs_have_ended(
    worker: Running, engine: ScriptedEngine, stream: Stream
) -> None:
    stream.send_job(a_decode("a"))
    await engine.next_job()
    stream.send(drain=worker_pb2.Drain())
    await stream.next_load(lambda load: load.draining)
    stream.send_job(a_decode("b"))
    assert (await stream.outcome_of("b")).failure is Failure.NOT_NOW
    assert not worker.task.done()
    engine.step(Delta("a", 0, (5,), "last", outcome=DONE))
    assert await worker.exit_code() == DRAINED
    assert stream.deltas[-1] == Delta("a", 0, (5,), "last", outcome=DONE), "nothing is lost on the way out"
    assert stream.ended
    assert engine.closed.is_set()


async def test_an_idle_worker_drains_at_once(worker: Running, stream: Stream) -> None:
    worker.worker.drain()
    assert await worker.exit_code() == DRAINED


async def test_a_draining_worker_stays_until_its_kv_is_sent(
    worker: Running, engine: ScriptedEngine, stream: Stream
) -> None:
    engine.held = EngineLoad(96, pinned_blocks=4, quarantined_blocks=0)
    worker.worker.drain()
    await stream.next_load(lambda load: load.draining and load.pinned_blocks == 4)
    assert not worker.task.done()
    engine.held = EngineLoad(100, 0, 0)
    assert await worker.exit_code() == DRAINED


async def test_a_draining_worker_stays_until_the_kv_that_it_handed_over_is_taken(
    worker: Running, engine: ScriptedEngine, stream: Stream
) -> None:
    """Its job has ended, and nobody else has the KV yet."""
    stream.send_job(a_decode("a"))
    await engine.next_job()
    stream.send(drain=worker_pb2.Drain())
    stream.send_hand_over("a", TICKET, at_end=True)
    await engine.next_hand_over()
    engine.held = EngineLoad(98, pinned_blocks=2, quarantined_blocks=0)
    engine.step(Delta("a", 0, (5,), "x", outcome=Outcome(failure=Failure.MIGRATED, message="handed over")))
    assert (await stream.outcome_of("a")).failure is Failure.MIGRATED
    load = await stream.next_load(lambda load: load.running == 0 and load.pinned_blocks == 2)
    assert load.free_blocks == 98
    loads = len(stream.loads)
    await stream.until(lambda: len(stream.loads) > loads + 2)
    assert not worker.task.done()
    labels = {"kind": "decode", "outcome": "migrated"}
    assert worker.registry.get_sample_value("splitserve_worker_jobs_total", labels) == 1
    engine.held = EngineLoad(100, 0, 0)
    assert await worker.exit_code() == DRAINED


async def test_too_many_quarantined_blocks_drain_the_worker_to_be_started_anew(
    worker: Running, engine: ScriptedEngine, stream: Stream
) -> None:
    engine.held = EngineLoad(80, 0, quarantined_blocks=20)
    assert (await stream.next_load(lambda load: load.quarantined_blocks == 20)).draining is False
    engine.held = EngineLoad(74, 0, quarantined_blocks=26)
    assert await worker.exit_code() == QUARANTINED


async def test_a_worker_whose_engine_is_broken_ends(worker: Running, engine: ScriptedEngine, stream: Stream) -> None:
    engine.broken = EngineError("the engine broke")
    with pytest.raises(EngineError, match="broke"):
        await worker.exit_code()
    assert engine.closed.is_set()


# Routers come and go ------------------------------------------------------------------------------------------------
async def test_a_worker_attaches_again_and_the_lost_streams_jobs_are_cancelled(
    router: FakeRouter, engine: ScriptedEngine, stream: Stream
) -> None:
    stream.send_job(a_decode("a"))
    await engine.next_job()
    stream.break_off(Unavailable("it was silent"))
    again = await router.next_stream()
    assert again.info.uuid == stream.info.uuid
    assert await engine.next_cancel() == "a"
    engine.step(Delta("a", outcome=Outcome(failure=Failure.CANCELLED)))
    load = await again.next_load(lambda load: load.free_blocks == 100)
    assert load.seen_jobs == 0
    assert again.deltas == []


async def test_a_router_that_starts_later_is_joined_when_it_is_there(engine: ScriptedEngine) -> None:
    late = FakeRouter()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        late.address = f"127.0.0.1:{probe.getsockname()[1]}"
    async with running(engine, [late], MODEL) as worker:
        assert await asyncio.to_thread(engine.started.wait, TIMEOUT_S)
        async with router_at(late.address) as there:
            stream = await there.next_stream()
            await stream.until(lambda: bool(stream.loads))
            assert [info.name for info in worker.ready] == ["w"]


async def test_two_routers_have_their_own_jobs_on_one_account(engine: ScriptedEngine) -> None:
    async with AsyncExitStack() as stack:
        routers = [await stack.enter_async_context(router_at()) for _ in range(2)]
        await stack.enter_async_context(running(engine, routers, MODEL))
        east, west = [await router.next_stream() for router in routers]
        east.send_job(a_decode("east's", tokens=40))
        await engine.next_job()
        load = await west.next_load(lambda load: load.free_blocks == 97)
        assert load.seen_jobs == 0
        engine.step(Delta("east's", 0, (5,), "x"))
        await east.until(lambda: len(east.deltas) == 1)
        assert west.deltas == []


# What its supervisor asks -------------------------------------------------------------------------------------------
async def test_a_worker_is_ready_once_its_engine_is_loaded_and_a_router_has_taken_it_in(
    router: FakeRouter, engine: ScriptedEngine
) -> None:
    loads = engine.holds_start = threading.Event()
    async with running(engine, [router], MODEL) as worker:
        assert (worker.worker.unready(), worker.worker.engine_fault()) == ("its engine is loading", "")
        loads.set()
        stream = await router.next_stream()
        await stream.until(lambda: bool(stream.loads))
        assert worker.worker.unready() == ""
        worker.worker.drain()
        assert worker.worker.unready() == "it drains"


async def test_a_worker_without_a_router_is_not_ready_and_says_which_refused_it(
    router: FakeRouter, west: FakeRouter, engine: ScriptedEngine
) -> None:
    async with running(engine, [router, west], MODEL) as worker:
        stream = await router.next_stream()
        await west.next_refusal()
        router.heartbeat_s, router.refuse = 60.0, JoinRefused("name", "'w' is taken")
        stream.break_off(Unavailable("it goes"))
        await router.next_refusal()
        assert worker.worker.unready() == f"it is attached to no router; {west.address}: {MISFIT}"


async def test_a_worker_whose_engine_turns_no_more_does_not_live(
    worker: Running, engine: ScriptedEngine, stream: Stream
) -> None:
    engine.held = EngineLoad(100, 0, 0, turned_at=time.monotonic())
    assert worker.worker.engine_fault() == ""
    engine.held = EngineLoad(100, 0, 0, turned_at=time.monotonic() - 2 * ENGINE_STALL_S)
    assert worker.worker.engine_fault().startswith("its engine has been in one step for 240 s")
    engine.broken = EngineError("the engine broke")
    assert worker.worker.engine_fault() == "the engine broke"


# Metrics ------------------------------------------------------------------------------------------------------------
async def test_metrics_tell_what_ended_and_what_is_held(
    worker: Running, engine: ScriptedEngine, stream: Stream
) -> None:
    stream.send_job(a_decode("a", tokens=40))
    await engine.next_job()
    assert worker.registry.get_sample_value("splitserve_worker_kv_blocks", {"state": "free"}) == 97
    assert worker.registry.get_sample_value("splitserve_worker_kv_total_blocks") == 100
    assert worker.registry.get_sample_value("splitserve_worker_running_jobs") == 1
    engine.step(Delta("a", 0, (5, 6), "x", outcome=DONE))
    await stream.outcome_of("a")
    labels = {"kind": "decode", "outcome": "finished"}
    assert worker.registry.get_sample_value("splitserve_worker_jobs_total", labels) == 1
    assert worker.registry.get_sample_value("splitserve_worker_tokens_total") == 2


async def test_metrics_tell_of_transfers_that_belong_to_no_job(
    worker: Running, engine: ScriptedEngine, stream: Stream
) -> None:
    engine.end_transfer(TransferEnd(True, TransferStats(4096, writes=4, writing_s=0.1)))
    engine.end_transfer(TransferEnd(False, TransferStats(), "peer ended"))
    engine.held = EngineLoad(98, 2, 0, in_flight_bytes=512, counts=KvCounts(4096, 4, expired_leases=1))
    await stream.next_load(lambda load: load.pinned_blocks == 2)
    sample = worker.registry.get_sample_value
    assert sample("splitserve_worker_kv_transfer_bytes_sum", {"side": "source"}) == 4096
    failed = {"side": "destination", "reason": "peer ended"}
    assert sample("splitserve_worker_kv_failed_transfers_total", failed) == 1
    assert sample("splitserve_worker_kv_in_flight_bytes") == 512
    assert sample("splitserve_worker_kv_written_bytes_total") == 4096
    assert sample("splitserve_worker_kv_expired_leases_total") == 1


# With a real engine -------------------------------------------------------------------------------------------------
async def test_a_simulated_engine_serves_through_the_stream(router: FakeRouter) -> None:
    engine = SimEngine(MODEL, SimSettings(step_s=0), KvTransferSettings(), uuid4().hex)
    async with running(engine, [router], MODEL):
        stream = await router.next_stream()
        sampling = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        stream.send_job(DecodeJob("a", "r", tuple(range(6, 60)), sampling, 60.0))
        assert (await stream.outcome_of("a")).finish_reason is FinishReason.LENGTH
        assert len([token for delta in stream.deltas for token in delta.token_ids]) == 5
        assert "".join(delta.text for delta in stream.deltas)
        await stream.next_load(lambda load: load.produced_tokens == 5 and load.free_blocks == 4096)
