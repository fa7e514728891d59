"""The worker half: holds one rank's KV tensors and drives its transfer service.

It lives where the tensors do and runs on vLLM's step thread; every call only enqueues, `drain` excepted.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from vllm.model_executor.models.utils import extract_layer_index

from splitserve.core.config import KvTransferSettings
from splitserve.core.errors import ConfigError
from splitserve.core.worker import KvCounts, KvFormat, KvMode, KvPart, rank_uuid
from splitserve.kv.bridge import Connect, ConnectorEnd, Ended, Held, Started, ToConnector
from splitserve.kv.connector.buffers import transport_on
from splitserve.kv.connector.scheduler import StepMetadata
from splitserve.kv.connector.versions import TransferResults
from splitserve.kv.layout import Shard, part_of
from splitserve.kv.transfer import TransferEnded, TransferKey, TransferService
from splitserve.kv.transport import Fence


@dataclass(frozen=True, slots=True)
class Rank:
    """Where this rank stands in its worker, and what the model has in all."""

    rank: int
    tensor_rank: int
    tensor_size: int
    kv_heads: int
    layers: int


class WorkerHalf:
    """`group_of` says which KV group a layer's name belongs to."""

    def __init__(
        self,
        settings: KvTransferSettings,
        uuid: str,
        fingerprint: str,
        block_size: int,
        rank: Rank,
        group_of: Callable[[str], int],
        bridge: str,
    ) -> None:
        self._settings = settings
        self._uuid = rank_uuid(uuid, rank.rank)
        self._fingerprint = fingerprint
        self._block_size = block_size
        self._rank = rank
        self._group_of = group_of
        self._service: TransferService | None = None
        self._layers: dict[str, int] = {}  # of the whole model, by vLLM's name
        self._loading: dict[TransferKey, str] = {}
        self._sending: dict[TransferKey, str | None] = {}  # the ended request whose blocks it pins
        self._pins: dict[str, int] = {}
        self._saved: set[int] = set()
        self._held = Held(rank.rank, 0, 0, 0, KvCounts())
        self._telling = threading.Lock()
        self._on_device = False
        self._bridge = ConnectorEnd(bridge, self._hear, self._report)

    @property
    def service(self) -> TransferService:
        assert self._service is not None, "register_kv_caches comes first"
        return self._service

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Starts the transfer service on these tensors, one per layer: block first, heads before tokens."""
        self._layers = {name: extract_layer_index(name) for name in caches}
        ordered = sorted(caches, key=self._layers.__getitem__)
        tensors = [caches[name] for name in ordered]
        part = self._part(ordered)
        kv_format = self._describe(tensors, part)
        self._on_device = tensors[0].is_cuda
        service = TransferService(
            uuid=self._uuid,
            transport_factory=lambda: transport_on(tensors, self._uuid, self._settings.buffer),
            kv=kv_format,
            shard=Shard(part, self._block_size, tuple(self._group_of(name) for name in ordered)),
            settings=self._settings,
            on_event=self._tell_ended,
        )
        peer = service.start()
        self._service = service
        self._bridge.tell(Started(self._rank.rank, kv_format, peer))

    def begin(self, step: StepMetadata) -> None:
        """Before the forward: tables first, so that `save` finds them. What vLLM calls computed a device may still be
        computing, for steps before this one may be launched only."""
        self._loading.update(step.loading)
        self._saved.clear()
        for offer in step.offers:
            self._sending[offer.key] = None
            self.service.offer(offer)
        fence = self._fence() if step.tables else None
        for key, tables, tokens in step.tables:
            self.service.computing(key, tables, tokens, fence)

    def save(self, step: StepMetadata, layer: str) -> None:
        """A layer was computed; on a device it was launched, and the event recorded now is passed once it is."""
        if step.ready:
            self._computed(step, self._layers[layer])

    def settle(self, step: StepMetadata) -> None:
        """After the forward: layers whose hooks a CUDA graph has swallowed, then claims and endings."""
        if step.ready:
            for layer in sorted(set(self._layers.values()) - self._saved):
                self._computed(step, layer)
        for claim in step.claims:
            self.service.claim(claim)
        for key in step.ended:
            self.service.prefill_ended(key)
        for key in step.aborted:
            self.service.prefill_aborted(key)
        for key in step.abandoned:
            self.service.abandon(key)
        for request, keys in step.pinned.items():
            self._pins[request] = 0
            for key in keys:
                if key in self._sending:
                    self._sending[key] = request
                    self._pins[request] += 1

    def drain(self, step: StepMetadata) -> None:
        if step.preempted:
            self.service.drain(step.preempted)

    @property
    def loading(self) -> Collection[str]:
        """Requests whose KV is on its way."""
        return self._loading.values()

    def results(self) -> TransferResults:
        """Completions since the last step. vLLM must hear of each request once."""
        taken = self.service.take_results()
        for key in taken.sent:
            request = self._sending.pop(key, None)
            if request is not None:
                self._pins[request] -= 1
        if (self.service.pinned_blocks, self.service.quarantined_blocks) != self._held_blocks:
            self._tell_held()
        failed = self._loaded(taken.failed)
        return TransferResults(
            finished_sending=self._unpinned(),
            finished_recving=self._loaded(taken.received) | self._loaded(taken.released) | failed,
            failed_recving=failed,
        )

    def close(self) -> None:
        if self._service is not None:
            self._service.close()
        self._bridge.close()

    def _computed(self, step: StepMetadata, layer: int) -> None:
        self._saved.add(layer)
        self.service.computed(layer, step.ready, self._fence())

    def _fence(self) -> Fence | None:
        """Passed once the device has done what was launched so far; a CPU has done it."""
        if not self._on_device:
            return None
        event = torch.cuda.Event()
        event.record()
        passed: Fence = event.query
        return passed

    def _unpinned(self) -> set[str]:
        free = {request for request, keys in self._pins.items() if keys == 0}
        for request in free:
            del self._pins[request]
        return free

    def _loaded(self, keys: Sequence[TransferKey]) -> set[str]:
        return {self._loading.pop(key) for key in keys if key in self._loading}

    # The adapter -----------------------------------------------------------------------------------------------------
    def _hear(self, message: ToConnector) -> None:
        """Called on the bridge's thread."""
        if isinstance(message, Connect):
            self.service.connect(message.peers)

    def _tell_ended(self, event: TransferEnded) -> None:
        """Called on the transfer thread."""
        key = event.key
        self._bridge.tell(
            Ended(
                self._rank.rank, key.transfer_id, key.epoch, event.source_side, event.stats, event.reason, event.error
            )
        )

    @property
    def _held_blocks(self) -> tuple[int, int]:
        return self._held.pinned_blocks, self._held.quarantined_blocks

    def _report(self) -> None:
        """Called on the bridge's thread, also while vLLM takes no steps."""
        if self._service is not None:
            self._tell_held()

    def _tell_held(self) -> None:
        """Two threads tell; the lock keeps what they tell in the order in which they looked."""
        service = self.service
        with self._telling:
            held = Held(
                self._rank.rank,
                service.pinned_blocks,
                service.quarantined_blocks,
                service.in_flight_bytes,
                service.counters.counts(),
            )
            if held != self._held:
                self._held = held
                self._bridge.tell(held)

    # What this rank holds --------------------------------------------------------------------------------------------
    def _part(self, names: Sequence[str]) -> KvPart:
        """Raises ConfigError for layers that do not all have a cache of their own."""
        layers = [self._layers[name] for name in names]
        if layers != list(range(layers[0], layers[0] + len(layers))):
            raise ConfigError(
                "kv_transfer.mode",
                f"push can't move the KV of this model: only its layers {layers} have a cache of their own; use pull",
            )
        rank = self._rank
        return part_of(rank.tensor_rank, rank.tensor_size, rank.kv_heads, layers[0], len(layers))

    def _describe(self, tensors: Sequence[torch.Tensor], part: KvPart) -> KvFormat:
        first = tensors[0]
        sizes = {tensor[0].numel() * tensor.element_size() for tensor in tensors}
        if len(sizes) != 1:
            raise ConfigError(
                "kv_transfer.mode", f"push needs KV blocks of one size in all layers; here are {sorted(sizes)} bytes"
            )
        block = sizes.pop() // part.heads * self._rank.kv_heads
        width = block // first.element_size() // self._block_size // self._rank.kv_heads
        return KvFormat(
            model_fingerprint=self._fingerprint,
            dtype=str(first.dtype).removeprefix("torch."),
            block_size=self._block_size,
            layers=self._rank.layers,
            kv_heads=self._rank.kv_heads,
            head_dim=width // 2,
            block_bytes=block,
            mode=KvMode.PUSH,
            transport="nixl",
        )
