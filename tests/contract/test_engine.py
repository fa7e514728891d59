"""The simulated engine keeps the engine contract, in both KV modes and over both transports. The real one does so under
tests/vllm.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch
from uuid import uuid4

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.config import KvTransferSettings, SimSettings
from splitserve.core.model import ModelInfo
from splitserve.core.worker import KvMode
from splitserve.engine.sim import SimEngine
from splitserve.engine.sim.memory import CHAIN_BYTES
from splitserve.kv.shm import ShmTransport
from splitserve.kv.tcp import TcpTransport
from tests.contract.engine_contract import EngineContract
from tests.contract.engines import Bench, Listener, started
from tests.contract.request_contract import ADAPTER

SETTINGS = SimSettings(
    total_blocks=128,
    block_size=16,
    max_model_len=1024,
    max_num_batched_tokens=64,
    step_s=0.0002,
    decode_token_s=0,
    loras=[ADAPTER],
    tool_parser="sim",
)


@dataclass
class SimBench:
    source: Listener
    destination: Listener
    alone: Listener
    vocabulary: range

    @contextmanager
    def corrupting(self) -> Iterator[None]:
        """One bit of each copied block flips on its way."""
        whole = ShmTransport.write

        def write(
            self: ShmTransport, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]
        ) -> object:
            handle = whole(self, peer, layer, source, destination)
            for block in destination:
                self._peers[peer].memory.block(layer, block)[CHAIN_BYTES] ^= 1  # of its first token
            return handle

        arrived = TcpTransport._place

        def place(self: TcpTransport, message: bytes) -> int:
            number = arrived(self, message)
            runs = int.from_bytes(message[8:12])
            for at in range(12, 12 + 12 * runs, 12):
                self._own.view[int.from_bytes(message[at : at + 8]) + CHAIN_BYTES] ^= 1
            return number

        with patch.object(ShmTransport, "write", write), patch.object(TcpTransport, "_place", place):
            yield


@pytest.fixture(scope="module", params=[(KvMode.PUSH, "shm"), (KvMode.PUSH, "tcp"), (KvMode.PULL, "shm")])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    model, (mode, transport) = ModelInfo.read(DEMO_MODEL), request.param
    settings = SETTINGS.model_copy(update={"transport": transport})
    leases = (KvTransferSettings(mode=mode, lease_s=lease_s) for lease_s in (30, 30, 1))
    with ExitStack() as stack:
        source, destination, alone = (
            stack.enter_context(started(SimEngine(model, settings, kv, uuid4().hex))) for kv in leases
        )
        yield SimBench(source, destination, alone, range(6, model.vocab_size))


class TestSimEngine(EngineContract):
    """All of it."""
