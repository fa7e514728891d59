"""A small engine in tests, in front of a rank's transfer service: it gives blocks out, computes prompts into them, and
knows what every byte should be.

It gives freed blocks out again at once. What it receives is compared with what the model computes for that prompt, when
it is received and when its decode ends. Owned by one thread.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from splitserve.core.worker import KvPeer
from splitserve.kv.layout import Shard, blocks_for, prompt_hash
from splitserve.kv.ticket import Claim, Offer, Results, Table, TransferKey
from splitserve.kv.transport import Fence
from tests.unit.kv.blocks import GROUPS, DeviceFence, Holding, Pool, Prefill, Prompt
from tests.unit.kv.numbered import Array, held, place


class Service(Protocol):
    """What the engine calls: of `TransferService`, or of its two sides."""

    def offer(self, offer: Offer) -> None: ...

    def computing(self, key: TransferKey, tables: Sequence[Sequence[int]], tokens: int) -> None: ...

    def computed(self, layer: int, tokens: Sequence[tuple[TransferKey, int]], fence: Fence | None = None) -> None: ...

    def prefill_ended(self, key: TransferKey) -> None: ...

    def prefill_aborted(self, key: TransferKey) -> None: ...

    def claim(self, claim: Claim) -> None: ...

    def abandon(self, key: TransferKey) -> None: ...

    def take_results(self) -> Results: ...


class Engine:
    """Of one rank. `memory` is what peers write; `device` what the engine reads, where that is another. `drain` sets
    the event once no WRITE reads a prefill's blocks."""

    def __init__(
        self,
        service: Service,
        drain: Callable[[TransferKey, threading.Event], None],
        shard: Shard,
        memory: Array,
        device: Array | None = None,
    ) -> None:
        self._service = service
        self._drain = drain
        self.shard = shard
        self.memory = memory
        self.device = memory if device is None else device
        self.pool = Pool(memory, self.device)
        self.alive = True
        self.prefills: dict[TransferKey, Prefill] = {}
        self.claims: dict[TransferKey, Holding] = {}
        self.decoding: dict[TransferKey, Holding] = {}
        self.fences: deque[tuple[TransferKey, DeviceFence]] = deque()
        self.told = Results()

    # The engine's prefills -------------------------------------------------------------------------------------------
    def offer(self, key: TransferKey, prompt: Prompt, destination: Sequence[KvPeer], hit: int = 0) -> None:
        """`hit`: so many tokens are cached here."""
        if not self.alive or key in self.prefills:
            return
        holding = Holding(key, prompt, len(prompt.tokens), (0,) * GROUPS, [])
        self.pool.take(holding, [blocks_for(len(prompt.tokens), self.shard.block_size)] * GROUPS)
        self.prefills[key] = Prefill(holding)
        self._service.offer(Offer(key, tuple(destination), prompt.tokens, len(holding.blocks)))
        if hit:
            self._compute(holding, range(hit))
            self.prefills[key].done = hit

    def chunk(self, key: TransferKey, end: int, layers: int | None = None, fenced: bool = False) -> None:
        """A forward up to token `end`, or over its first layers only. Fenced, its bytes come by `open_fences`."""
        prefill = self._running(key)
        if prefill is None:
            return
        holding, begin, end = prefill.holding, prefill.done, min(end, prefill.holding.tokens)
        known = blocks_for(end, self.shard.block_size)
        self._service.computing(key, [table[:known] for table in holding.tables], begin)
        for layer in range(self.shard.part.layers)[:layers]:
            fence = DeviceFence(partial(self._compute, holding, range(begin, end), layer))
            if fenced:
                self.fences.append((key, fence))
            else:
                fence.open()
            whole = self.shard.part.first_layer + layer
            self._service.computed(whole, [(key, end)], fence if fenced else None)
        if layers is None:
            prefill.done = end

    def open_fences(self, count: int | None = None) -> None:
        """The device has computed so many layers more."""
        for _, fence in [self.fences.popleft() for _ in range(len(self.fences))[:count]]:
            fence.open()

    def end_prefill(self, key: TransferKey) -> None:
        prefill = self._running(key)
        if prefill is not None:
            if prefill.done < prefill.holding.tokens:
                self.chunk(key, prefill.holding.tokens)
            self.open_fences()
            prefill.over = True
            self._service.prefill_ended(key)

    def abort_prefill(self, key: TransferKey) -> None:
        prefill = self.prefills.get(key)
        if self.alive and prefill is not None and prefill.draining is None:
            prefill.over = True
            self._service.prefill_aborted(key)

    def preempt(self, key: TransferKey) -> None:
        """The engine waits until no WRITE reads the blocks, then gives them to somebody else."""
        prefill = self._running(key)
        if prefill is not None:
            prefill.draining = threading.Event()
            self._drain(key, prefill.draining)
            self._end_drain(prefill)

    # Its claims ------------------------------------------------------------------------------------------------------
    def claim(
        self,
        key: TransferKey,
        prompt: Prompt,
        source: Sequence[KvPeer],
        tokens: int | None = None,
        first: Sequence[int] = (0,) * GROUPS,
        limit_s: float = 60.0,
        expects: Prompt | None = None,
    ) -> None:
        """`first[g]`: blocks that are there already. `expects`: the prompt that it takes the KV for."""
        if not self.alive or key in self.claims:
            return
        expected = expects or prompt
        count = len(expected.tokens) if tokens is None else tokens
        total = blocks_for(count, self.shard.block_size)
        holding = Holding(key, expected, count, tuple(min(each, total) for each in first), [])
        self.pool.take(holding, [total - each for each in holding.first])
        self.claims[key] = holding
        tables = tuple(Table(*pair) for pair in zip(holding.first, map(tuple, holding.tables), strict=True))
        claim = Claim(key, tuple(source), prompt_hash(expected.tokens[:count]), count, tables, limit_s)
        self._service.claim(claim)

    def abandon(self, key: TransferKey) -> None:
        if self.alive:
            self._service.abandon(key)

    def end_decode(self, key: TransferKey) -> None:
        holding = self.decoding.pop(key, None)
        if holding is not None:
            self._verify(holding)
            self.pool.give_back(holding)

    # The engine's step: what it is told ------------------------------------------------------------------------------
    def step(self) -> None:
        new = self._service.take_results()
        if not self.alive:
            return
        for key in new.received:
            self._received(key)
        for key in (*new.failed, *new.released):
            self.pool.give_back(self._named(key))
        for key in new.sent:
            self._sent(key)
        for name in ("received", "failed", "released", "sent"):
            getattr(self.told, name).extend(getattr(new, name))
        for prefill in self.prefills.values():
            self._end_drain(prefill)

    def assert_given_back(self) -> None:
        """Decodes end; then every block is free and untouched, and no end is still to be told."""
        for key in list(self.decoding):
            self.end_decode(key)
        assert not self.prefills, "the engine was never told that a prefill is sent"
        assert not self.claims, "the engine was never told of a claim's end"
        assert self.pool.whole, "a block is lost, or a free one was written to"

    def _received(self, key: TransferKey) -> None:
        holding = self._named(key)
        self._verify(holding)
        self.decoding[key] = holding

    def _named(self, key: TransferKey) -> Holding:
        assert key in self.claims, f"{key} was named twice"
        holding = self.claims.pop(key)
        holding.open = False
        return holding

    def _sent(self, key: TransferKey) -> None:
        assert key in self.prefills, f"{key} was sent twice"
        prefill = self.prefills.pop(key)
        assert prefill.over, f"{key} was sent before the engine was done with it"
        prefill.holding.open = False
        self.pool.give_back(prefill.holding)

    def _verify(self, holding: Holding) -> None:
        tables = [[-1] * first + table for first, table in zip(holding.first, holding.tables, strict=True)]
        tokens = [range(first * self.shard.block_size, holding.tokens) for first in holding.first]
        right = held(self.device, self.shard, tables, holding.prompt.kv, tokens)
        assert right, f"wrong bytes of {holding.key}"

    def _end_drain(self, prefill: Prefill) -> None:
        if prefill.draining is None or not prefill.draining.is_set():
            return
        counts = [len(table) for table in prefill.holding.tables]
        prefill.holding.open = False
        self.pool.give_back(prefill.holding)
        old = prefill.holding
        prefill.holding = Holding(old.key, old.prompt, old.tokens, old.first, [])
        self.pool.take(prefill.holding, counts)
        prefill.draining, prefill.done = None, 0

    def _running(self, key: TransferKey) -> Prefill | None:
        prefill = self.prefills.get(key)
        runs = self.alive and prefill is not None and not prefill.over and prefill.draining is None
        return prefill if runs else None

    def _compute(self, holding: Holding, tokens: range, layer: int | None = None) -> None:
        if holding.open:
            place(self.memory, self.shard, holding.tables, holding.prompt.kv, tokens, layer)
