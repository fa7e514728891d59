"""A transfer service in a process of its own, for tests that stop or kill it. Driven through a pipe."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvPeer
from splitserve.kv.transfer import TransferService
from tests.contract.kv_endpoints import BLOCK_SIZE, LAYERS, SHARD, Endpoint, kv_format, make_endpoint

SETTINGS = KvTransferSettings(peer_silent_s=1.0, lease_s=60.0)
TIMEOUT_S = 60.0


class LocalWorker:
    """A service in this process, with its memory."""

    def __init__(self, kind: str, uuid: str) -> None:
        self.endpoint: Endpoint | None = None

        def make() -> Any:
            self.endpoint = make_endpoint(kind, uuid)
            return self.endpoint.transport

        self.service = TransferService(uuid, make, kv_format(kind), SHARD, SETTINGS, lambda _: None)

    @property
    def memory(self) -> Any:
        assert self.endpoint is not None
        return self.endpoint.memory


@contextmanager
def local_worker(kind: str, uuid: str) -> Iterator[LocalWorker]:
    worker = LocalWorker(kind, uuid)
    with worker.service:
        yield worker


def _serve(pipe: Connection, kind: str, uuid: str) -> None:
    """The child: fills each block with its number, then does what the pipe says until it ends."""
    worker = LocalWorker(kind, uuid)
    pipe.send(worker.service.start())
    for block in range(worker.memory.shape[1]):
        worker.memory[:, block] = block + 1
    while True:
        name, args = pipe.recv()
        pipe.send(getattr(worker.service, name)(*args))


@dataclass
class RemoteWorker:
    process: SpawnProcess
    pipe: Connection
    peer: KvPeer

    def call(self, name: str, *args: object) -> Any:
        """Calls a method of the child's service."""
        self.pipe.send((name, args))
        assert self.pipe.poll(TIMEOUT_S), f"the child does not answer {name}"
        return self.pipe.recv()

    def forward(self, key: object, blocks: Sequence[int], begin: int, end: int) -> None:
        """Blocks below `begin` are there, those below `end` are computed layer by layer."""
        self.call("computing", key, [tuple(blocks[:end])], begin * BLOCK_SIZE)
        for layer in range(LAYERS):
            self.call("computed", layer, [(key, end * BLOCK_SIZE)])

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join(TIMEOUT_S)


@contextmanager
def remote_worker(kind: str, uuid: str) -> Iterator[RemoteWorker]:
    """A child that is killed when the test is over, whatever state it is in."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, kind, uuid), daemon=True)
    process.start()
    try:
        assert ours.poll(TIMEOUT_S), "the child did not start"
        yield RemoteWorker(process, ours, ours.recv())
    finally:
        process.kill()
        process.join(TIMEOUT_S)
        process.close()
        ours.close()
        theirs.close()
