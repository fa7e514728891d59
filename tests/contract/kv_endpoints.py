"""Every KV transport behind one shape, for tests that must hold for each: LAYERS layers of BLOCKS blocks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from splitserve.core.worker import KvFormat, KvMode
from splitserve.kv.blocks import Blocks
from splitserve.kv.layout import Shard, Slice, part_of, slice_between
from splitserve.kv.shm import ShmTransport
from splitserve.kv.tcp import TcpTransport
from splitserve.kv.transport import Region, Transport

LAYERS, BLOCKS, BLOCK_BYTES, BLOCK_SIZE = 2, 12, 4096, 16
SHARD = Shard(part_of(0, 1, 1, 0, LAYERS), BLOCK_SIZE, (0,) * LAYERS)
KINDS = ("shm", "tcp", pytest.param("nixl", marks=pytest.mark.nixl))


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
    return {"shm": _make_shm, "tcp": _make_tcp, "nixl": _make_nixl}[kind](uuid, block_bytes)


def skip_without(kind: str) -> None:
    if kind == "nixl":
        pytest.importorskip("nixl")


def _make_shm(uuid: str, block_bytes: int) -> Endpoint:
    transport = ShmTransport(LAYERS, BLOCKS, block_bytes)
    return Endpoint(uuid, transport, memory_of_shm(transport, (LAYERS, BLOCKS, block_bytes)))


def _make_tcp(uuid: str, block_bytes: int) -> Endpoint:
    blocks = Blocks.made(LAYERS, BLOCKS, block_bytes)
    return Endpoint(uuid, TcpTransport(uuid, "127.0.0.1", blocks), memory_of(blocks, (LAYERS, BLOCKS, block_bytes)))


def memory_of(blocks: Blocks, shape: tuple[int, ...]) -> "np.ndarray[Any, Any]":
    """Blocks as an array: of layers, blocks, and what a block is made of."""
    return np.frombuffer(blocks.view, np.uint8).reshape(shape)


def memory_of_shm(transport: ShmTransport, shape: tuple[int, ...]) -> "np.ndarray[Any, Any]":
    """The transport's own memory as an array: of layers, blocks, and what a block is made of."""
    first, last = transport.block(0, 0), transport.block(shape[0] - 1, shape[1] - 1)
    assert first.obj is last.obj
    block_bytes = len(first)
    strides = (shape[1] * block_bytes, block_bytes, 1)
    base = np.asarray(first)
    return np.lib.stride_tricks.as_strided(base, (*shape[:2], block_bytes), strides, writeable=True).reshape(shape)


def _make_nixl(uuid: str, block_bytes: int) -> Endpoint:
    from splitserve.kv.nixl import NixlTransport

    memory = np.zeros((LAYERS, BLOCKS, block_bytes), np.uint8)
    return Endpoint(uuid, NixlTransport(uuid, *regions_of(memory)), memory)


def regions_of(memory: "np.ndarray[Any, Any]") -> tuple[list[Region], list[tuple[int, int]]]:
    """What a NIXL transport is told of an array of layers, blocks, and what a block is made of."""
    base, (stride, block_bytes) = memory.ctypes.data, memory.strides[:2]
    blocks = memory.shape[1]
    regions = [Region(base + layer * stride, block_bytes, block_bytes, blocks) for layer in range(len(memory))]
    return regions, [(base, memory.nbytes)]
