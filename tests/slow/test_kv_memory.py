"""Ten thousand transfers leave nothing behind, at neither side: a prefill worker's memory and a decode worker's are the
same afterwards. Both sides are in one process, a fresh one, so that its memory is theirs alone.
"""

import gc
import multiprocessing
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from splitserve.core.config import KvTransferSettings
from splitserve.kv.layout import prompt_hash
from splitserve.kv.source import MOST_ENDED
from splitserve.kv.transfer import Claim, Offer, Table, TransferKey, TransferService
from splitserve.kv.transport import Transport
from tests.contract.kv_endpoints import BLOCK_SIZE, BLOCKS, KINDS, LAYERS, SHARD, kv_format, make_endpoint, skip_without

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRANSFERS = 10_000
WARM_UP = 2 * MOST_ENDED  # So many ended ones are remembered, and a dict that forgets one for each new one grows once.
AT_ONCE = BLOCKS - 2  # each of one block
TIMEOUT_S = 60.0
# Over all of them: a byte or two for each where something counts, and what an allocator keeps for its own ends.
MOST_GROWTH_BYTES = 64 * 1024
MOST_RESIDENT_GROWTH_BYTES = 2 * 1024**2


@dataclass(frozen=True, slots=True)
class Growth:
    """`traced`: of Python's own objects; `resident`: of the whole process."""

    traced: int
    resident: int
    seconds: float


class Pair:
    """A source and a destination, and prompts that each fill one block. `leaks`: it keeps every key, so that the
    measurement can be seen to work."""

    def __init__(self, source: TransferService, destination: TransferService, leaks: bool) -> None:
        self._source, self._destination = source, destination
        self._kept: list[TransferKey] | None = [] if leaks else None
        self._numbers = count()

    def transfer(self, transfers: int) -> None:
        for _ in range(0, transfers, AT_ONCE):
            self._transfer_some([TransferKey(f"transfer-{next(self._numbers)}", 1) for _ in range(AT_ONCE)])

    def _transfer_some(self, keys: list[TransferKey]) -> None:
        for block, key in enumerate(keys):
            tokens = tuple(range(block, block + BLOCK_SIZE))
            tables, peer = (Table(0, (block,)),), self._source.peer
            self._destination.claim(Claim(key, (peer,), prompt_hash(tokens), BLOCK_SIZE, tables, TIMEOUT_S))
            self._source.offer(Offer(key, (self._destination.peer,), tokens, 1))
            self._source.computing(key, [(block,)], 0)
            for layer in range(LAYERS):
                self._source.computed(layer, [(key, BLOCK_SIZE)])
            self._source.prefill_ended(key)
        _collect(lambda: self._destination.take_results().received, keys)
        _collect(lambda: self._source.take_results().sent, keys)
        if self._kept is not None:
            self._kept += keys


def _collect(take: Callable[[], list[TransferKey]], keys: list[TransferKey]) -> None:
    left, pause, deadline = set(keys), threading.Event(), time.monotonic() + TIMEOUT_S
    while left:
        assert time.monotonic() < deadline, f"{len(left)} transfers do not end"
        left.difference_update(take())
        pause.wait(0.0005)


@contextmanager
def running(kind: str, leaks: bool) -> Iterator[Pair]:
    endpoints = []  # their memory must outlive the transports, which do not own it

    def make(uuid: str) -> Transport:
        endpoints.append(make_endpoint(kind, uuid))
        return endpoints[-1].transport

    def service(uuid: str) -> TransferService:
        return TransferService(uuid, lambda: make(uuid), kv_format(kind), SHARD, KvTransferSettings(), lambda _: None)

    with service("source") as source, service("destination") as destination:
        yield Pair(source, destination, leaks)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(pipe: Connection, kind: str, leaks: bool) -> None:
    """The child's part."""
    with running(kind, leaks) as pair:
        tracemalloc.start()
        pair.transfer(WARM_UP)
        gc.collect()
        traced, resident, begun = tracemalloc.get_traced_memory()[0], resident_bytes(), time.monotonic()
        pair.transfer(TRANSFERS)
        gc.collect()
        pipe.send(
            Growth(tracemalloc.get_traced_memory()[0] - traced, resident_bytes() - resident, time.monotonic() - begun)
        )


def growth(kind: str, leaks: bool = False) -> Growth:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(theirs, kind, leaks))
    process.start()
    try:
        theirs.close()
        grown = ours.recv()
        assert isinstance(grown, Growth)
        return grown
    finally:
        process.kill()
        process.join(TIMEOUT_S)
        ours.close()


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_transfers_leave_no_memory_behind(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    skip_without(kind)
    grown = growth(kind)
    with capsys.disabled():
        print(f"\n{TRANSFERS} transfers over {kind}: {grown}")
    assert grown.traced < MOST_GROWTH_BYTES
    assert grown.resident < MOST_RESIDENT_GROWTH_BYTES


def test_a_key_kept_for_every_transfer_is_seen() -> None:
    """The negative twin: the measurement can fail."""
    assert growth("shm", leaks=True).traced > MOST_GROWTH_BYTES
