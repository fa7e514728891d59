"""Both KV transports behind one shape, for tests that must hold for either: LAYERS layers of BLOCKS blocks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from splitserve.core.worker import KvFormat, KvMode
from splitserve.kv.layout import Shard, Slice, part_of, slice_between
from splitserve.kv.shm import ShmTransport
from splitserve.kv.transport import Region, Transport

LAYERS, BLOCKS, BLOCK_BYTES, BLOCK_SIZE = 2, 12, 4096, 16
SHARD = Shard(part_of(0, 1, 1, 0, LAYERS), BLOCK_SIZE, (0,) * LAYERS)
KINDS = ("shm", pytest.param("nixl", marks=pytest.mark.nixl))


def kv_format(kind: str, block_bytes: int = BLOCK_BYTES) -> KvFormat:
    return KvFormat("demo", "float32", BLOCK_SIZE, LAYERS, 1, 8, block_bytes, KvMode.PUSH, kind)


def whole_blocks(block_bytes: int = BLOCK_BYTES) -> Slice:
    """Everything: both ends are one rank with the whole model."""
    cut = slice_between(SHARD, SHARD, kv_format("any", block_bytes))
    assert cut is not None
    return cut


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
