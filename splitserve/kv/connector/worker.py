"""The worker half: holds one rank's KV tensors and drives its transfer service.

It lives where the tensors do and runs on vLLM's step thread; every call only enqueues, `drain` excepted.
"""

from collections.abc import Sequence

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvFormat, KvMode, KvPeer
from splitserve.kv.bridge import ConnectorEnd, Held, Started
from splitserve.kv.connector.scheduler import StepMetadata
from splitserve.kv.nixl import NixlTransport
from splitserve.kv.transfer import TransferKey, TransferService
from splitserve.kv.transport import Region


class WorkerHalf:
    """Holds one rank's KV tensors and drives its transfer service."""

    def __init__(self, settings: KvTransferSettings, uuid: str, fingerprint: str, block_size: int, bridge: str) -> None:
        self._settings = settings
        self._uuid = uuid
        self._fingerprint = fingerprint
        self._block_size = block_size
        self._bridge = ConnectorEnd(bridge, self._connect)
        self._service: TransferService | None = None
        self._layers: dict[str, int] = {}
        self._requests: dict[TransferKey, str] = {}
        self._held = Held(0, 0)
        self._on_device = False

    @property
    def service(self) -> TransferService:
        assert self._service is not None, "register_kv_caches comes first"
        return self._service

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Starts the transfer service on these tensors, one per layer: (blocks, kv heads, tokens, 2 x head size)."""
        self._layers = {name: index for index, name in enumerate(caches)}
        tensors = list(caches.values())
        self._on_device = tensors[0].is_cuda
        kv_format = self._describe(tensors)
        memory_type = "VRAM" if self._on_device else "DRAM"
        self._service = TransferService(
            uuid=self._uuid,
            transport_factory=lambda: NixlTransport(self._uuid, _regions(tensors), _storages(tensors), memory_type),
            kv=kv_format,
            settings=self._settings,
            on_event=self._bridge.tell_ended,
        )
        self._bridge.tell(Started(kv_format, self._service.start()))

    def begin(self, step: StepMetadata) -> None:
        """Before the forward: tables first, so that `save` finds them."""
        self._requests.update(step.requests)
        for offer in step.offers:
            self.service.offer(offer)
        for key, blocks, computed in step.tables:
            self.service.computing(key, blocks, computed)

    def save(self, step: StepMetadata, layer: str) -> None:
        """A layer was computed. On a GPU it was only launched: `settle` waits for the device and does all layers."""
        if step.ready and not self._on_device:
            self.service.computed(self._layers[layer], step.ready)

    def settle(self, step: StepMetadata) -> None:
        """After the forward: claims and endings."""
        if step.ready and self._on_device:
            torch.cuda.current_stream().synchronize()
            for layer in self._layers.values():
                self.service.computed(layer, step.ready)
        for claim in step.claims:
            self.service.claim(claim)
        for key in step.ended:
            self.service.prefill_ended(key)
        for key in step.aborted:
            self.service.prefill_aborted(key)
        for key in step.abandoned:
            self.service.abandon(key)

    def drain(self, step: StepMetadata) -> None:
        if step.preempted:
            self.service.drain(step.preempted)

    def results(self) -> KVConnectorTransferResults:
        """Completions since the last step. vLLM must hear of each request once, so each key is reported once."""
        taken = self.service.take_results()
        held = Held(self.service.pinned_blocks, self.service.quarantined_blocks)
        if held != self._held:
            self._held = held
            self._bridge.tell(held)
        failed = self._ids(taken.failed)
        return KVConnectorTransferResults(
            finished_sending=self._ids(taken.sent),
            finished_recving=self._ids(taken.received) | self._ids(taken.released) | failed,
            failed_recving=failed,
        )

    def close(self) -> None:
        if self._service is not None:
            self._service.close()
        self._bridge.close()

    def _connect(self, peers: Sequence[KvPeer]) -> None:
        self.service.connect(peers)

    def _ids(self, keys: Sequence[TransferKey]) -> set[str]:
        return {self._requests.pop(key) for key in keys if key in self._requests}

    def _describe(self, tensors: Sequence[torch.Tensor]) -> KvFormat:
        first = tensors[0]
        _, heads, tokens, head_pair = first.shape
        assert tokens == self._block_size, f"expected (blocks, heads, tokens, head) layout, got {tuple(first.shape)}"
        return KvFormat(
            model_fingerprint=self._fingerprint,
            dtype=str(first.dtype).removeprefix("torch."),
            block_size=self._block_size,
            layers=len(tensors),
            kv_heads=heads,
            head_dim=head_pair // 2,
            block_bytes=first[0].numel() * first.element_size(),
            mode=KvMode.PUSH,
            transport="nixl",
        )


def _regions(tensors: Sequence[torch.Tensor]) -> list[Region]:
    return [
        Region(
            base=tensor.data_ptr(),
            stride=tensor.stride(0) * tensor.element_size(),
            block_bytes=tensor[0].numel() * tensor.element_size(),
            blocks=tensor.shape[0],
        )
        for tensor in tensors
    ]


def _storages(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of each distinct allocation: layers often share one."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sorted({(storage.data_ptr(), storage.nbytes()) for storage in storages})
