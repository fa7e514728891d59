"""A device in tests: an array of (layer, block, byte) beside the host memory that a transport knows.

Copies are made when the test lets them go, so that bytes which are used too early are wrong.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from splitserve.kv.shm import ShmTransport
from splitserve.kv.transport import Fence, TransportError
from tests.unit.kv.numbered import Array


class HeldCopy:
    """A fence that is passed once the copy is made."""

    def __init__(self, copy: Callable[[], None]) -> None:
        self._copy = copy
        self.made = False

    def make(self) -> None:
        if not self.made:
            self._copy()
            self.made = True

    def __call__(self) -> bool:
        return self.made


class HeldMirror:
    """A `Mirror`. While it `holds`, copies wait for `let_go`. `started`: direction, layer and blocks of each."""

    def __init__(self, device: Array, host: Array) -> None:
        self.device = device
        self.host = host
        self.holds = False
        self.broken = False
        self.closed = False
        self.started: list[tuple[str, int, tuple[int, ...]]] = []
        self._held: list[HeldCopy] = []
        self._lock = threading.Lock()

    def to_host(self, layer: int, blocks: Sequence[int]) -> Fence:
        return self._copy("to host", self.device, self.host, layer, blocks)

    def to_device(self, layer: int, blocks: Sequence[int]) -> Fence:
        return self._copy("to device", self.host, self.device, layer, blocks)

    def close(self) -> None:
        self.let_go()
        self.closed = True

    def let_go(self) -> None:
        """Makes the copies that wait, in order, and those to come at once."""
        with self._lock:
            self.holds = False
            for held in self._held:
                held.make()
            self._held.clear()

    def _copy(self, direction: str, source: Array, destination: Array, layer: int, blocks: Sequence[int]) -> Fence:
        if self.broken:
            raise TransportError("the device is lost")
        ids = list(blocks)

        def copy() -> None:
            destination[layer, ids] = source[layer, ids]

        held = HeldCopy(copy)
        with self._lock:
            self.started.append((direction, layer, tuple(ids)))
            if self.holds:
                self._held.append(held)
            else:
                held.make()
        return held


def memory_of(transport: ShmTransport, layers: int, blocks: int, block_bytes: int) -> Array:
    """A shared-memory transport's own blocks, which lie one after the other."""
    first = np.asarray(transport.block(0, 0))
    strides = (blocks * block_bytes, block_bytes, 1)
    return np.lib.stride_tricks.as_strided(first, (layers, blocks, block_bytes), strides, writeable=True)
