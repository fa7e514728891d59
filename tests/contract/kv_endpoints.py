"""Both KV transports behind one shape, for tests that must hold for either: LAYERS layers of BLOCKS blocks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from splitserve.kv.shm import ShmTransport
from splitserve.kv.transport import Region, Transport

LAYERS, BLOCKS, BLOCK_BYTES = 2, 12, 4096
KINDS = ("shm", pytest.param("nixl", marks=pytest.mark.nixl))


@dataclass
class Endpoint:
    """A transport and its own memory as an array of (layer, block, byte)."""

    uuid: str
    transport: Transport
    memory: "np.ndarray[Any, Any]"


def make_endpoint(kind: str, uuid: str, block_bytes: int = BLOCK_BYTES) -> Endpoint:
    return _make_shm(uuid, block_bytes) if kind == "shm" else _make_nixl(uuid, block_bytes)


def skip_without(kind: str) -> None:
    if kind == "nixl":
        pytest.importorskip("nixl")


def _make_shm(uuid: str, block_bytes: int) -> Endpoint:
    transport = ShmTransport(LAYERS, BLOCKS, block_bytes)
    first, last = transport.block(0, 0), transport.block(LAYERS - 1, BLOCKS - 1)
    assert first.obj is last.obj
    blocks = [[np.asarray(transport.block(layer, block)) for block in range(BLOCKS)] for layer in range(LAYERS)]
    base = blocks[0][0]
    memory = np.lib.stride_tricks.as_strided(
        base, (LAYERS, BLOCKS, block_bytes), (BLOCKS * block_bytes, block_bytes, 1), writeable=True
    )
    return Endpoint(uuid, transport, memory)


def _make_nixl(uuid: str, block_bytes: int) -> Endpoint:
    from splitserve.kv.nixl import NixlTransport

    memory = np.zeros((LAYERS, BLOCKS, block_bytes), np.uint8)
    base = memory.ctypes.data
    regions = [Region(base + layer * memory.strides[0], block_bytes, block_bytes, BLOCKS) for layer in range(LAYERS)]
    return Endpoint(uuid, NixlTransport(uuid, regions, [(base, memory.nbytes)]), memory)
