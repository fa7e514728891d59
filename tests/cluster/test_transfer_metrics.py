"""What workers tell Prometheus of their transfers, read from their own ports."""

import asyncio
import signal
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from splitserve.client import AsyncClient
from splitserve.core.config import SimSettings
from tests.cluster.asking import ask, eventually, greedy, prompt_of, settled
from tests.cluster.processes import Cluster, Process, cluster_of

# Slow enough that a request can be given up while its prompt is read: 2,000 tokens take 0.5 s.
ENGINE = SimSettings(step_s=0.005, prefill_token_s=0.00025, decode_token_s=0.00001, max_num_batched_tokens=256)
REQUESTS = 3
PREFIX = "splitserve_worker_kv_"
HISTOGRAMS = (
    "transfer_bytes",
    "transfer_writes",
    "overlap_ratio",
    "write_queue_seconds",
    "link_bytes_per_second",
)
SIDES = {"prefill-0": "source", "decode-0": "destination"}

Scrape = dict[tuple[str, tuple[str, ...]], float]  # (name, values of labels in the order of their names) to value


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("metrics"), engine=ENGINE) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address) as connected:
        yield connected
        await settled(connected, len(SIDES))


async def scraped(cluster: Cluster, worker: str) -> Scrape:
    page = await asyncio.to_thread(_page, f"http://{cluster.workers[worker].facts['metrics']}/metrics")
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    ours = [sample for sample in samples if sample.name.startswith(PREFIX)]
    return {(s.name.removeprefix(PREFIX), tuple(value for _, value in sorted(s.labels.items()))): s.value for s in ours}


async def at_rest(cluster: Cluster, worker: str, start: Scrape) -> None:
    """Waits until every gauge is what it was."""

    async def check() -> bool:
        return _gauges(await scraped(cluster, worker)) == _gauges(start)

    await eventually(check, f"the gauges of {worker} as they were: {_gauges(start)}")


async def test_what_was_moved_is_told_alike_on_both_sides(cluster: Cluster, client: AsyncClient) -> None:
    start = {worker: await scraped(cluster, worker) for worker in SIDES}
    for number in range(REQUESTS):
        assert (await ask(client, prompt_of(1000, seed=number))).timings.prefill_worker
    await settled(client, len(SIDES))
    source, destination = await scraped(cluster, "prefill-0"), await scraped(cluster, "decode-0")
    for worker, side in SIDES.items():
        await at_rest(cluster, worker, start[worker])
        now = await scraped(cluster, worker)
        assert [now[f"{name}_count", (side,)] for name in HISTOGRAMS] == [REQUESTS] * len(HISTOGRAMS)
    assert source["uncovered_seconds_count", ("source",)] == REQUESTS
    for name in ("transfer_bytes_sum", "transfer_writes_sum", "overlap_ratio_sum"):
        assert source[name, ("source",)] == destination[name, ("destination",)] > 0, name
    assert source["written_bytes_total", ()] == source["transfer_bytes_sum", ("source",)]
    assert source["writes_total", ()] == source["transfer_writes_sum", ("source",)]
    assert 0 < source["overlap_ratio_sum", ("source",)] <= REQUESTS
    assert source["link_bytes_per_second_sum", ("source",)] > 0
    assert destination["written_bytes_total", ()] == destination["writes_total", ()] == 0
    ended_badly = [
        value for each in (source, destination) for (name, _), value in each.items() if name == "failed_transfers_total"
    ]
    assert ended_badly, "none is counted at all"
    assert not any(ended_badly)


async def test_a_transfer_that_is_given_up_is_a_cancel_and_a_failure_on_both_sides(
    cluster: Cluster, client: AsyncClient
) -> None:
    """The source is stopped meanwhile, so that it is the destination that ends the transfer."""
    start = {worker: await scraped(cluster, worker) for worker in SIDES}
    asking = asyncio.create_task(ask(client, prompt_of(2000, seed=99), greedy(8)))

    async def wrote() -> bool:
        return (await scraped(cluster, "prefill-0"))["writes_total", ()] > start["prefill-0"]["writes_total", ()]

    async def cancelled() -> bool:
        now, before = await scraped(cluster, "decode-0"), start["decode-0"]
        return now["cancels_total", ()] > before["cancels_total", ()] and now["blocks", ("quarantined",)] > 0

    await eventually(wrote, "the first WRITE")
    with stopped(cluster.workers["prefill-0"]):
        waiting = await scraped(cluster, "decode-0")
        asking.cancel()
        await asyncio.wait({asking})
        await eventually(cancelled, "a Cancel, and blocks that wait for its answer")
    assert waiting["blocks", ("parked",)] > 0
    assert waiting["blocks", ("free",)] < start["decode-0"]["blocks", ("free",)]
    for worker, side in SIDES.items():
        await at_rest(cluster, worker, start[worker])
        before, now = start[worker], await scraped(cluster, worker)
        assert _failures(now, side) == _failures(before, side) + 1
        assert now.get(("transfer_bytes_count", (side,))) == before.get(("transfer_bytes_count", (side,)))
    assert (await scraped(cluster, "decode-0"))["failed_transfers_total", ("abandoned", "destination")] == 1


@contextmanager
def stopped(process: Process) -> Iterator[None]:
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


def _page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def _gauges(scrape: Scrape) -> Scrape:
    return {key: value for key, value in scrape.items() if key[0] in ("blocks", "in_flight_bytes")}


def _failures(scrape: Scrape, side: str) -> float:
    return sum(value for (name, labels), value in scrape.items() if name == "failed_transfers_total" and side in labels)
