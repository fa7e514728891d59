"""Workers that come, do their work and go, over a real port."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.errors import JoinRefused, Unavailable
from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.versions import Versions
from splitserve.core.worker import KvMode, KvPeer, Outcome, Pool
from splitserve.router.attach import FleetService
from splitserve.router.membership import Membership
from splitserve.router.serve import Router
from splitserve.routing.fleet import Fleet
from splitserve.rpc import convert
from splitserve.rpc.gen import worker_pb2
from splitserve.rpc.protocol import SPOKEN
from splitserve.rpc.status import from_rpc_error
from splitserve.telemetry.logs import Logger
from tests.unit.peers import peer
from tests.unit.router.scripted import WITHIN_S, worker_info
from tests.unit.router.wired import WiredWorker, router


@pytest.fixture
async def serving() -> AsyncIterator[Router]:
    async with router() as started:
        yield started


async def names(client: AsyncClient, *expected: str) -> None:
    """Waits until exactly these workers are in the fleet."""
    async with asyncio.timeout(WITHIN_S):
        while {status.worker.name for status in (await client.fleet()).workers} != set(expected):
            continue


async def test_a_worker_is_welcomed_first_and_then_told_its_peers(serving: Router) -> None:
    async with WiredWorker(serving.address, "p0", Pool.PREFILL) as first:
        await first.told("peers")
        assert first.orders[0].welcome.router_uuid == serving.uuid
        assert first.orders[0].welcome.heartbeat_interval_s == 0.05
        async with WiredWorker(serving.address, "d0", Pool.DECODE) as second:
            await first.until(lambda: [p.uuid for p in first.orders[-1].peers.peers] == [second.info.uuid])
            assert [peer.uuid for peer in (await second.told("peers")).peers.peers] == [first.info.uuid]
        await first.until(lambda: not first.orders[-1].peers.peers)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": "other"}, "model"),
        ({"name": "p0"}, "name"),
        ({"name": ""}, "name"),
        ({"uuid": "uuid-p0"}, "uuid"),
        ({"total_blocks": 0}, "total_blocks"),
        ({"kv": {"block_size": 0}}, "kv.block_size"),
        ({"kv": {"block_size": 32}}, "kv.block_size"),
        ({"kv": {"dtype": "bfloat16"}}, "kv.dtype"),
        ({"kv": {"model_fingerprint": "x"}}, "kv.model_fingerprint"),
        ({"kv": {"mode": KvMode.PULL}}, "kv.mode"),
        ({"kv": {"transport": "nixl"}}, "kv.transport"),
        ({"kv": {"layers": 5}}, "kv.layers"),
        ({"protocol_version": convert.PROTOCOL_VERSION + 1}, "protocol_version"),
    ],
)
async def test_a_worker_that_does_not_fit_is_refused_by_field(
    serving: Router, changes: dict[str, Any], field: str
) -> None:
    if "kv" in changes:
        changes = {"kv": replace(worker_info("d0", Pool.DECODE).kv, **changes["kv"])}
    version = changes.pop("protocol_version", convert.PROTOCOL_VERSION)
    async with WiredWorker(serving.address, "p0", Pool.PREFILL) as member, AsyncClient(serving.address) as client:
        await member.told("welcome")
        misfit = WiredWorker(serving.address, "d0", Pool.DECODE, protocol_version=version)
        misfit.info = replace(misfit.info, **changes)
        async with misfit:
            error = await misfit.ended()
        assert error is not None
        refusal = from_rpc_error(error)
        assert isinstance(refusal, JoinRefused)
        assert refusal.field == field
        await names(client, "p0")


NOW = convert.PROTOCOL_VERSION


@pytest.mark.parametrize(
    ("lowest", "highest"), [(NOW, 0), (NOW, NOW), (NOW, NOW + 1), (NOW - 1, NOW), (NOW - 1, NOW + 1)]
)
async def test_a_worker_of_a_neighbouring_release_joins_and_serves(serving: Router, lowest: int, highest: int) -> None:
    """`highest` 0: of a release that says one version."""
    worker = WiredWorker(serving.address, "d0", Pool.DECODE, protocol_version=lowest, max_protocol_version=highest)
    async with AsyncClient(serving.address) as client, worker:
        assert (await worker.told("welcome")).welcome.protocol_version == NOW
        answer = asyncio.create_task(_collect(client))
        worker.say(await worker.job(), 10, outcome=Outcome(FinishReason.STOP))
        assert await answer == [10]


@pytest.mark.parametrize(
    ("lowest", "highest", "says"),
    [
        (NOW + 1, NOW + 2, f"the worker speaks {NOW + 1} to {NOW + 2} and this router {SPOKEN}; upgrade the router"),
        (NOW + 1, 0, f"the worker speaks {NOW + 1} and this router {SPOKEN}; upgrade the router"),
        (1, 2, f"the worker speaks 1 to 2 and this router {SPOKEN}; upgrade the worker"),
        (0, 0, f"the worker speaks 0 and this router {SPOKEN}; upgrade the worker"),
    ],
)
async def test_a_worker_with_no_version_in_common_is_told_which_side_to_upgrade(
    serving: Router, lowest: int, highest: int, says: str
) -> None:
    misfit = WiredWorker(serving.address, "d0", Pool.DECODE, protocol_version=lowest, max_protocol_version=highest)
    async with AsyncClient(serving.address) as client, misfit:
        error = await misfit.ended()
        assert error is not None
        refusal = from_rpc_error(error)
        assert isinstance(refusal, JoinRefused)
        assert (refusal.field, says in refusal.message) == ("protocol_version", True), refusal
        await names(client)


async def test_a_rollout_never_pairs_workers_whose_kv_is_of_different_models(serving: Router) -> None:
    """The old workers' peers stay among themselves; a new one is let in once the last of these has left."""
    renewed = replace(worker_info("d1", Pool.DECODE).kv, model_fingerprint="renewed")
    async with AsyncClient(serving.address) as client:
        async with (
            WiredWorker(serving.address, "p0", Pool.PREFILL) as old,
            WiredWorker(serving.address, "d0", Pool.DECODE),
        ):
            await names(client, "p0", "d0")
            async with WiredWorker(serving.address, "d1", Pool.DECODE, kv=renewed) as early:
                error = await early.ended()
            assert error is not None
            assert "kv.model_fingerprint" in str(error.details())
            peers = {peer.uuid for order in old.orders if order.HasField("peers") for peer in order.peers.peers}
            assert peers == {"uuid-d0"}
        await names(client)
        async with WiredWorker(serving.address, "d1", Pool.DECODE, kv=renewed) as late:
            await late.told("welcome")
            await names(client, "d1")


def speaking(name: str, lowest: int, highest: int) -> tuple[KvPeer, ...]:
    """The one rank of a worker whose KV control channel speaks these versions."""
    return (replace(peer(f"uuid-{name}"), control=Versions(lowest, highest)),)


async def test_workers_of_neighbouring_releases_are_paired_and_told_of_each_others_versions(serving: Router) -> None:
    async with (
        AsyncClient(serving.address) as client,
        WiredWorker(serving.address, "p0", Pool.PREFILL, kv_peers=speaking("p0", 2, 3)) as old,
        WiredWorker(serving.address, "d0", Pool.DECODE, kv_peers=speaking("d0", 3, 4)),
    ):
        await names(client, "p0", "d0")
        await old.told("peers")
        peers = [peer for order in old.orders if order.HasField("peers") for peer in order.peers.peers]
        assert {(peer.uuid, peer.control.lowest, peer.control.highest) for peer in peers} == {("uuid-d0", 3, 4)}


@pytest.mark.parametrize(
    ("early", "late", "says"),
    [
        ((2, 3), (4, 5), "it speaks version 4 to 5 of KV control messages and p0, which is in the fleet, 2 to 3"),
        ((4, 5), (2, 3), "it speaks version 2 to 3 of KV control messages and p0, which is in the fleet, 4 to 5"),
    ],
)
async def test_workers_without_a_common_version_of_kv_control_are_never_paired(
    serving: Router, early: tuple[int, int], late: tuple[int, int], says: str
) -> None:
    async with (
        AsyncClient(serving.address) as client,
        WiredWorker(serving.address, "p0", Pool.PREFILL, kv_peers=speaking("p0", *early)),
        WiredWorker(serving.address, "d0", Pool.DECODE, kv_peers=speaking("d0", *late)) as misfit,
    ):
        error = await misfit.ended()
        assert error is not None
        refusal = from_rpc_error(error)
        assert isinstance(refusal, JoinRefused)
        assert refusal.field == "kv_peers.control"
        assert says in refusal.message
        assert f"upgrade {'p0' if early < late else 'this worker'} to a release that speaks both" in refusal.message
        await names(client, "p0")


async def test_a_name_is_free_again_once_its_worker_has_left(serving: Router) -> None:
    async with AsyncClient(serving.address) as client:
        async with WiredWorker(serving.address, "d0", Pool.DECODE):
            await names(client, "d0")
        await names(client)
        async with WiredWorker(serving.address, "d0", Pool.DECODE) as again:
            await again.told("welcome")
            await names(client, "d0")


async def test_a_worker_that_ends_its_stream_is_gone_at_once_and_its_requests_know(serving: Router) -> None:
    async with AsyncClient(serving.address, Retries(most=0)) as client:
        async with WiredWorker(serving.address, "d0", Pool.DECODE) as worker:
            await worker.told("peers")
            answer = asyncio.create_task(_collect(client))
            await worker.job()
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(Unavailable, match="d0 is gone"):
                await answer


async def test_a_worker_that_stops_reporting_is_given_up_and_told_so() -> None:
    async with (
        router(heartbeat_timeout_s=0.3) as serving,
        AsyncClient(serving.address) as client,
        WiredWorker(serving.address, "d0", Pool.DECODE) as worker,
    ):
        await worker.told("welcome")
        error = await worker.ended()
        assert error is not None
        assert isinstance(from_rpc_error(error), Unavailable)
        await names(client)


class Unhurried:
    """A call whose first write takes until it may end."""

    def __init__(self) -> None:
        self.writing, self.may_end = asyncio.Event(), asyncio.Event()
        self.written: list[str | None] = []

    async def write(self, message: worker_pb2.RouterMessage) -> None:
        self.writing.set()
        await self.may_end.wait()
        self.written.append(message.WhichOneof("message"))


async def test_a_worker_that_leaves_at_once_is_welcomed_nevertheless() -> None:
    """grpc.aio never ends a call whose first write was cancelled."""
    service = FleetService(Membership("model", Fleet(silent_after_s=60.0), lambda: None), "router", 1.0, Logger("test"))
    join = worker_pb2.Join(
        protocol_version=convert.PROTOCOL_VERSION, worker=convert.worker_info_to_proto(worker_info("d0", Pool.DECODE))
    )
    messages = _all_of(worker_pb2.WorkerMessage(join=join))
    call = Unhurried()
    attached = asyncio.create_task(service.Attach(messages, call))
    async with asyncio.timeout(WITHIN_S):
        await call.writing.wait()
        for _ in range(100):  # time to hear that the worker has said its last
            await asyncio.sleep(0)
        call.may_end.set()
        await attached
    assert call.written[0] == "welcome"


async def _all_of(*messages: worker_pb2.WorkerMessage) -> AsyncIterator[worker_pb2.WorkerMessage]:
    for message in messages:
        yield message


async def test_job_numbers_count_from_one_for_each_stream(serving: Router) -> None:
    async with AsyncClient(serving.address) as client, WiredWorker(serving.address, "d0", Pool.DECODE) as worker:
        await worker.told("welcome")
        for number in (1, 2):
            answer = asyncio.create_task(_collect(client))
            worker.say(await worker.job(), 10, outcome=Outcome(FinishReason.STOP))
            await answer
            assert [order.job.number for order in worker.orders if order.HasField("job")][-1] == number


async def _collect(client: AsyncClient) -> list[int]:
    chunks = client.generate([5, 6], SamplingParams(max_tokens=4))
    return [token async for chunk in chunks for token in chunk.token_ids]
