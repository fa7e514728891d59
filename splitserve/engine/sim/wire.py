"""The memory of a simulated worker's KV, and how it reaches others: mapped by peers on the same machine, over TCP by
those on others.
"""

from collections.abc import Callable
from dataclasses import dataclass

from splitserve.core.config import SimSettings
from splitserve.engine.sim.memory import BlockView, digest_bytes
from splitserve.kv.blocks import Blocks
from splitserve.kv.host import is_loopback
from splitserve.kv.shm import ShmTransport
from splitserve.kv.tcp import TcpTransport
from splitserve.kv.transport import Transport

SHM, TCP = "shm", "tcp"


@dataclass(frozen=True, slots=True)
class Wire:
    """`transport` is to be called on the thread that will use it; it raises ConfigError."""

    view: BlockView
    transport: Callable[[], Transport]


def kind_of(settings: SimSettings, host: str) -> str:
    """Raises ConfigError for a host that can't be resolved."""
    if settings.transport != "auto":
        return settings.transport
    return SHM if is_loopback(host) else TCP


def wired(kind: str, rank: str, host: str, layers: int, settings: SimSettings) -> Wire:
    size = digest_bytes(settings.block_size)
    if kind == SHM:
        shared = ShmTransport(layers, settings.total_blocks, size)
        return Wire(shared.block, lambda: shared)
    blocks = Blocks.made(layers, settings.total_blocks, size)
    return Wire(blocks.block, lambda: TcpTransport(rank, host, blocks))
