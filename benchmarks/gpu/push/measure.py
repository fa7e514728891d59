"""Times pushes, copies and prefills of one length after the other, between this process and its child.

One thread of this process owns the transport; each prefill runs on a thread of its own and is joined before the next.
"""

import argparse
import random
import sys
import time
from collections import deque

import torch

from benchmarks.gpu.push.figures import Row, Times, row_of
from benchmarks.gpu.push.paced_prefill import ModelShape, Prefill, content
from benchmarks.gpu.push.pair import Destination, Limits, Pushed, Source, destination
from splitserve.kv.transport import Fence

PREFILL_TIMEOUT_S = 300.0


def measure(shape: ModelShape, arguments: argparse.Namespace) -> list[Row]:
    blocks = max(arguments.tokens) // shape.block_size
    rows: list[Row] = []
    limits = Limits(arguments.write_mib * 1024**2, arguments.in_flight_mib * 1024**2)
    with destination(shape, blocks, arguments.device) as peer:
        source = Source(shape, blocks, arguments.device, limits)
        source.connect(peer.address)
        for tokens in arguments.tokens:
            bench = Bench(shape, tokens, blocks, source, peer, arguments.blocks == "shuffled")
            rows.append(row_of(shape, tokens, bench.measure(arguments.rounds)))
            print(f"{tokens:,} tokens: done", file=sys.stderr)
        source.close()
    return rows


class Bench:
    """One prompt length between a source and a destination."""

    def __init__(
        self, shape: ModelShape, tokens: int, pool: int, source: Source, peer: Destination, shuffled: bool
    ) -> None:
        """`pool`: blocks of each cache that may be used."""
        self._shape = shape
        self._source = source
        self._peer = peer
        blocks = tokens // shape.block_size
        self._here, self._there = tables(pool, blocks, shuffled)
        self._prefill = Prefill(shape, tokens, source.cache, self._here)
        self._kv = torch.empty_like(source.cache[:, :blocks])
        self._copy = torch.empty_like(self._kv)

    def measure(self, rounds: int) -> Times:
        """The first round warms up."""
        times = Times()
        for number in range(rounds + 1):
            if number == 1:
                times = Times()
            times.push.append(self._push_at_once())
            times.copy.append(self._copied())
            times.alone.append(self._prefilled())
            self._prefilled_pushing(times)
        return times

    def _push_at_once(self) -> float:
        """Everything is computed already."""
        self._clear()
        for layer in range(self._shape.layers):
            kv = content(self._shape, layer, len(self._here), str(self._source.cache.device))
            self._source.cache[layer, torch.tensor(self._here, device=self._source.cache.device)] = kv
        self._synchronise()
        ready: deque[tuple[int, Fence]] = deque((layer, lambda: True) for layer in range(self._shape.layers))
        started = time.monotonic()
        return self._push(ready).written_at - started

    def _copied(self) -> float:
        self._synchronise()
        started = time.monotonic()
        self._copy.copy_(self._kv)
        self._synchronise()
        return time.monotonic() - started

    def _prefilled(self) -> float:
        started = time.monotonic()
        self._prefill.start().join(PREFILL_TIMEOUT_S)
        self._synchronise()
        return time.monotonic() - started

    def _prefilled_pushing(self, times: Times) -> None:
        self._clear()
        started = time.monotonic()
        thread = self._prefill.start()
        pushed = self._push(self._prefill.computed)
        thread.join(PREFILL_TIMEOUT_S)
        times.pushing.append(pushed.computed_at - started)
        times.uncovered.append(pushed.written_at - pushed.computed_at)
        times.writes = pushed.writes

    def _push(self, computed: "deque[tuple[int, Fence]]") -> Pushed:
        pushed = self._source.push(computed, self._here, self._there)
        if wrong := self._peer.wrong_bytes(self._there):
            raise SystemExit(f"{wrong} bytes are wrong at the destination: nothing was measured")
        return pushed

    def _clear(self) -> None:
        """So that what an earlier round has left can't pass for this one's."""
        self._source.cache.zero_()
        self._synchronise()
        self._peer.clear()

    def _synchronise(self) -> None:
        if self._source.cache.is_cuda:
            torch.cuda.synchronize(self._source.cache.device)


def tables(pool: int, blocks: int, shuffled: bool) -> tuple[list[int], list[int]]:
    """Block tables at the source and the destination. Shuffled as in a pool that has been in use; else the best case,
    in which neighbours travel together."""
    if not shuffled:
        return list(range(blocks)), list(range(blocks))
    dice = random.Random(blocks)
    return dice.sample(range(pool), blocks), dice.sample(range(pool), blocks)
