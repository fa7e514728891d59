"""Workers for tests of the transfer service: real threads, sockets and shared memory, in this process."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvFormat, KvMode, KvPart, KvPeer
from splitserve.kv.layout import Shard, prompt_hash
from splitserve.kv.shm import ShmTransport
from splitserve.kv.transfer import Claim, Offer, Results, Table, TransferEnded, TransferKey, TransferService
from splitserve.kv.transport import TransportError, WriteState

LAYERS, BLOCKS, BLOCK_SIZE, BLOCK_BYTES = 3, 16, 16, 64
KV = KvFormat("demo", "float32", BLOCK_SIZE, LAYERS, 1, 8, BLOCK_BYTES, KvMode.PUSH, "shm")
PART = KvPart(first_layer=0, layers=LAYERS, first_head=0, heads=1)
SHARD = Shard(PART, BLOCK_SIZE, groups=(0,) * LAYERS)
SETTINGS = KvTransferSettings(peer_silent_s=1.0, lease_s=20.0)
TIMEOUT_S = 20.0


def wait_until(true: Callable[[], bool], what: str) -> None:
    """For what no event tells. Raises when it does not come true."""
    pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, f"in vain: {what}"
        pause.wait(0.002)


@dataclass(eq=False)
class _HeldWrite:
    copy: Callable[[], object]
    state: WriteState = WriteState.IN_FLIGHT

    def finish(self) -> None:
        self.copy()
        self.state = WriteState.DONE


class HeldTransport(ShmTransport):
    """WRITEs that wait until the test lets them go; the bytes move then."""

    def __init__(self) -> None:
        super().__init__(LAYERS, BLOCKS, BLOCK_BYTES)
        self._held: list[_HeldWrite] = []
        self._lock = threading.Lock()
        self.posted: list[tuple[int, int]] = []  # layer and number of blocks of each WRITE
        self.holds = False
        self.broken = False
        self.progress_fails = False

    def write(self, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        if self.broken:
            raise TransportError("the link is broken")
        here, there = tuple(source), tuple(destination)
        write = _HeldWrite(lambda: super(HeldTransport, self).write(peer, layer, here, there))
        with self._lock:
            if self.holds:
                self._held.append(write)
            else:
                write.finish()
            self.posted.append((layer, len(source)))
        return write

    def progress(self) -> None:
        if self.progress_fails:
            raise TransportError("a peer is gone")

    def poll(self, handle: object) -> WriteState:
        assert isinstance(handle, _HeldWrite)
        return handle.state

    def let_go(self) -> None:
        with self._lock:
            self.holds = False
            for write in self._held:
                write.finish()
            self._held.clear()


@dataclass
class Worker:
    """A transfer service with its memory, and all that it told its engine."""

    uuid: str
    kv: KvFormat = KV
    settings: KvTransferSettings = SETTINGS
    told: Results = field(default_factory=Results)
    events: list[TransferEnded] = field(default_factory=list)
    peer: KvPeer = field(init=False)

    def __post_init__(self) -> None:
        self.transport = HeldTransport()
        self.service = TransferService(
            self.uuid, lambda: self.transport, self.kv, SHARD, self.settings, self.events.append
        )

    def collect(self) -> Results:
        new = self.service.take_results()
        for name in ("received", "failed", "released", "sent"):
            getattr(self.told, name).extend(getattr(new, name))
        return self.told

    def wait_for(self, name: str, key: TransferKey) -> None:
        wait_until(lambda: key in getattr(self.collect(), name), f"{key} is {name} at {self.uuid}")

    def wait_for_rest(self) -> None:
        def rests() -> bool:
            self.collect()
            return not self.service.busy

        wait_until(rests, f"rest at {self.uuid}")

    def event(self, key: TransferKey, source_side: bool) -> TransferEnded:
        def found() -> list[TransferEnded]:
            return [event for event in self.events if (event.key, event.source_side) == (key, source_side)]

        wait_until(lambda: bool(found()), f"the end of {key} is told at {self.uuid}")
        assert len(found()) == 1
        return found()[0]

    def dropped(self) -> dict[str, int]:
        return dict(self.service.counters.dropped)

    def fill(self, blocks: Sequence[int]) -> None:
        for layer in range(LAYERS):
            for block in blocks:
                self.transport.block(layer, block)[:] = content(self.uuid, layer, block)

    def holds(self, source: "Worker", theirs: Sequence[int], ours: Sequence[int]) -> bool:
        """Do our blocks hold what the source's do, in every layer?"""
        return all(
            bytes(self.transport.block(layer, here)) == content(source.uuid, layer, there)
            for layer in range(LAYERS)
            for there, here in zip(theirs, ours, strict=True)
        )


def content(uuid: str, layer: int, block: int) -> bytes:
    return f"{uuid}:{layer}:{block};".encode().ljust(BLOCK_BYTES, b".")


def a_claim(key: TransferKey, source: KvPeer, deadline_s: float = 600.0) -> Claim:
    """Of one block, for tests in which it fails."""
    tokens = tuple(range(BLOCK_SIZE))
    return Claim(key, (source,), prompt_hash(tokens), len(tokens), (Table(0, (1,)),), deadline_s)


@dataclass
class Pair:
    """A prefill and a decode worker, and one transfer between them of the prefiller's blocks 1, 2, 3, ..."""

    prefiller: Worker
    decoder: Worker
    key: TransferKey = field(default_factory=lambda: TransferKey("transfer", 1))
    source_blocks: tuple[int, ...] = (1, 2, 3, 4)
    claimed: tuple[int, ...] = (9, 7, 11, 5)

    @property
    def prompt(self) -> tuple[int, ...]:
        """It fills the source's blocks completely."""
        return tuple(range(100, 100 + len(self.source_blocks) * BLOCK_SIZE))

    def offer(self) -> None:
        self.prefiller.fill(self.source_blocks)
        destination = (self.decoder.peer,)
        self.prefiller.service.offer(Offer(self.key, destination, self.prompt, len(self.source_blocks)))

    def claim(self, first: int = 0, prompt: Sequence[int] | None = None, deadline_s: float = 60.0) -> None:
        tokens = self.prompt if prompt is None else tuple(prompt)
        tables = (Table(first, self.claimed[first:]),)
        source = (self.prefiller.peer,)
        self.decoder.service.claim(Claim(self.key, source, prompt_hash(tokens), len(tokens), tables, deadline_s))

    def forward(self, begin: int, end: int) -> None:
        """One chunk: blocks below `begin` are there, those below `end` are computed layer by layer."""
        self.prefiller.service.computing(self.key, [self.source_blocks[:end]], begin * BLOCK_SIZE)
        for layer in range(LAYERS):
            self.prefiller.service.computed(layer, [(self.key, end * BLOCK_SIZE)])

    def prefill(self) -> None:
        self.forward(0, len(self.source_blocks))
        self.prefiller.service.prefill_ended(self.key)

    def arrived(self, first: int = 0) -> bool:
        return self.decoder.holds(self.prefiller, self.source_blocks[first:], self.claimed[first:])

    def warm_up(self) -> None:
        """One transfer of nothing, so that the two know each other."""
        way = Pair(self.prefiller, self.decoder, TransferKey("warm-up", 1), (), ())
        way.offer()
        way.claim()
        way.prefill()
        way.decoder.wait_for("received", way.key)
        way.prefiller.wait_for("sent", way.key)

    def wait_for_claim(self) -> None:
        """The claim has come to the prefiller: its first WRITE is posted."""
        wait_until(lambda: bool(self.prefiller.transport.posted), "the first WRITE")

    def wait_for_blocks(self, count: int) -> None:
        """So many blocks, summed over layers, are posted."""
        wait_until(lambda: sum(blocks for _, blocks in self.prefiller.transport.posted) == count, f"{count} blocks")

    def assert_at_rest(self) -> None:
        """Nothing pinned, nothing in quarantine, nothing owed."""
        for worker in (self.prefiller, self.decoder):
            worker.wait_for_rest()
            assert (worker.service.pinned_blocks, worker.service.quarantined_blocks) == (0, 0)


@contextmanager
def running(*workers: Worker) -> Iterator[None]:
    """Started workers that are closed whatever happens."""
    started: list[Worker] = []
    try:
        for worker in workers:
            worker.peer = worker.service.start()
            started.append(worker)
        introduce(*workers)
        yield
    finally:
        for worker in started:
            worker.transport.let_go()
            worker.service.close()


def introduce(*workers: Worker) -> None:
    """Each lets the others in, as if a router had told of them; none says Hello."""
    for worker in workers:
        for other in workers:
            worker.service._running.control.expect(other.peer)


@contextmanager
def running_pair(settings: KvTransferSettings = SETTINGS) -> Iterator[Pair]:
    pair = Pair(Worker("prefiller", settings=settings), Worker("decoder", settings=settings))
    with running(pair.prefiller, pair.decoder):
        yield pair
