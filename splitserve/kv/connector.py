"""splitserve's KV connector for vLLM: pushes each layer's KV as soon as it is computed.

vLLM builds two halves, often in different processes. The scheduler half (`SchedulerHalf`) watches requests and writes
what a step needs into `StepMetadata`; the worker half (`WorkerHalf`) holds the tensors and drives the transfer service.
Both run on vLLM's step thread and only enqueue. Which request has which ticket travels in the request's
`kv_transfer_params`, written by `ticket_params`.

This file and `engine/vllm.py` are the only ones that import vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.v1.request import RequestStatus

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvFormat, KvMode, KvPeer, Ticket
from splitserve.kv.bridge import ConnectorEnd, Free, Held, Started
from splitserve.kv.layout import blocks_for, prompt_hash
from splitserve.kv.nixl import NixlTransport
from splitserve.kv.transfer import Claim, Offer, TransferKey, TransferService
from splitserve.kv.transport import Region

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

SOURCE, DESTINATION = "source", "destination"
FINISHED_WELL = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


def ticket_params(ticket: Ticket, side: str, deadline_s: float) -> dict[str, Any]:
    """A ticket as vLLM's `kv_transfer_params`, for the engine on `side` of it."""
    peer = ticket.destination if side == SOURCE else ticket.source
    return {
        "side": side,
        "transfer_id": ticket.transfer_id,
        "epoch": ticket.epoch,
        "peer_uuid": peer.uuid,
        "peer_endpoint": peer.endpoint,
        "deadline_s": deadline_s,
    }


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the worker half must do in one step. `requests` names the vLLM request of each key that it will report."""

    offers: list[Offer] = field(default_factory=list)
    preempted: list[TransferKey] = field(default_factory=list)
    tables: list[tuple[TransferKey, list[int], int]] = field(default_factory=list)  # key, blocks, how many are computed
    ready: list[tuple[TransferKey, int]] = field(default_factory=list)  # key, blocks complete after this step
    claims: list[Claim] = field(default_factory=list)
    ended: list[TransferKey] = field(default_factory=list)
    aborted: list[TransferKey] = field(default_factory=list)
    abandoned: list[TransferKey] = field(default_factory=list)
    requests: dict[TransferKey, str] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.offers or self.claims or self.ended or self.aborted or self.abandoned)


@dataclass(slots=True)
class _Source:
    """A prefill whose KV is offered; `scheduled` once it holds blocks, until it is preempted."""

    key: TransferKey
    request: "Request"
    scheduled: bool = False


@dataclass(slots=True)
class _Destination:
    key: TransferKey
    peer: KvPeer
    deadline_s: float
    claimed: bool = False


class SchedulerHalf:
    """Decides from vLLM's scheduling what the worker half does in this step."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._sources: dict[str, _Source] = {}
        self._destinations: dict[str, _Destination] = {}
        self._next = StepMetadata()
        self._sending: set[str] = set()

    def admit(self, request: "Request") -> None:
        """A request with a ticket came: a source offers its KV at once, so that a bad claim is refused early."""
        params = request.kv_transfer_params
        if not params or "side" not in params:
            return
        key = TransferKey(params["transfer_id"], params["epoch"])
        peer = KvPeer(params["peer_uuid"], params["peer_endpoint"])
        if params["side"] == DESTINATION:
            self._destinations[request.request_id] = _Destination(key, peer, params["deadline_s"])
            return
        self._next.requests[key] = request.request_id
        self._sources[request.request_id] = _Source(key, request)
        blocks = blocks_for(request.num_prompt_tokens, self._block_size)
        self._next.offers.append(Offer(key, peer, prompt_hash(request.prompt_token_ids), blocks))

    def external_tokens(self, request: "Request", computed: int) -> tuple[int, bool]:
        """Tokens that will come from the source; vLLM asks on every step, so this only looks."""
        destination = self._destinations.get(request.request_id)
        if destination is None or destination.claimed:
            return 0, False
        tokens = request.num_tokens - computed
        return tokens, tokens > 0

    def claim(self, request: "Request", blocks: "KVCacheBlocks", external: int) -> None:
        """Blocks are allocated: ask the source to fill those that hold no computed token yet."""
        destination = self._destinations.get(request.request_id)
        if destination is None or destination.claimed or external == 0:
            return
        destination.claimed = True
        self._next.requests[destination.key] = request.request_id
        first = (request.num_tokens - external) // self._block_size
        needed = blocks_for(request.num_tokens, self._block_size)
        table = blocks.get_block_ids()[0][first:needed]
        digest = prompt_hash(request.all_token_ids)
        self._next.claims.append(
            Claim(destination.key, destination.peer, digest, first, tuple(table), destination.deadline_s)
        )

    def step(self, output: "SchedulerOutput") -> StepMetadata:
        """Takes what gathered since the last step and adds the prefill chunks of this one."""
        metadata, self._next = self._next, StepMetadata()
        self._note_preempted(output, metadata)
        for request in output.scheduled_new_reqs:
            self._note_chunk(metadata, output, request.req_id, request.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._note_chunk(metadata, output, request_id, computed)
        return metadata

    def finish(self, request: "Request") -> bool:
        """A request ended. True for a source: its blocks stay until the worker half reports them sent."""
        destination = self._destinations.pop(request.request_id, None)
        if destination is not None:
            if destination.claimed:
                self._next.abandoned.append(destination.key)
            return False
        source = self._sources.pop(request.request_id, None)
        if source is None:
            return False
        (self._next.ended if request.status in FINISHED_WELL else self._next.aborted).append(source.key)
        self._sending.add(request.request_id)
        return True

    def reported(self, output: "KVConnectorOutput") -> None:
        self._sending -= set(output.finished_sending or ())

    @property
    def busy(self) -> bool:
        return bool(self._sending) or not self._next.empty

    def _note_preempted(self, output: "SchedulerOutput", metadata: StepMetadata) -> None:
        for request_id, source in self._sources.items():
            running = request_id in output.num_scheduled_tokens
            if source.scheduled and not running and source.request.status == RequestStatus.PREEMPTED:
                source.scheduled = False
                metadata.preempted.append(source.key)

    def _note_chunk(self, metadata: StepMetadata, output: "SchedulerOutput", request_id: str, computed: int) -> None:
        source = self._sources.get(request_id)
        if source is None:
            return
        source.scheduled = True
        prompt = source.request.num_prompt_tokens
        end = min(computed + output.num_scheduled_tokens[request_id], prompt)
        table = list(output.kv_connector_block_state.get_block_ids(request_id)[0])
        complete = blocks_for(end, self._block_size) if end == prompt else end // self._block_size
        metadata.tables.append((source.key, table, computed // self._block_size))
        metadata.ready.append((source.key, complete))


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


class _BlockReports:
    """Scheduler half of both connectors: tells the adapter how many blocks are free, also after the last step."""

    _pool: "BlockPool | None" = None
    _reports: ConnectorEnd | None = None
    _told = -1

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        self._pool = gpu_block_pool

    def _open_reports(self, vllm_config: "VllmConfig") -> None:
        self._reports = ConnectorEnd(vllm_config.kv_transfer_config.get_from_extra_config("bridge", ""))

    def _report_free(self) -> None:
        assert self._pool is not None
        assert self._reports is not None
        free = self._pool.get_num_free_blocks()
        if free != self._told:
            self._told = free
            self._reports.tell(Free(free))

    @property
    def _unreported(self) -> bool:
        return self._pool is not None and self._pool.get_num_free_blocks() != self._told


class PushConnector(_BlockReports, KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Layer-wise push (kv_transfer.mode: push)."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        block_size = vllm_config.cache_config.block_size
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(block_size)
            self._open_reports(vllm_config)
        else:
            settings = KvTransferSettings.model_validate(extra("settings", {}))
            uuid, fingerprint, bridge = (extra(name, "") for name in ("uuid", "fingerprint", "bridge"))
            self._worker = WorkerHalf(settings, uuid, fingerprint, block_size, bridge)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str:
        return "LBHNC"  # heads outside tokens: one block of one layer is one run of bytes

    # Scheduler half
    def on_new_request(self, request: "Request") -> None:
        self._scheduler.admit(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        return self._scheduler.external_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        self._scheduler.claim(request, blocks, num_external_tokens)

    def get_loaded_kv_cache_group_ids(self, request: "Request") -> tuple[int, ...]:
        groups: tuple[int, ...] = self._kv_cache_config.transfer_group_ids
        return groups

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> StepMetadata:
        self._report_free()
        return self._scheduler.step(scheduler_output)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, None]:
        return self._scheduler.finish(request), None

    def request_finished_all_groups(self, request: "Request", block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        return self._scheduler.finish(request), None

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self._scheduler.reported(connector_output)

    def has_pending_push_work(self) -> bool:
        return self._scheduler.busy or self._unreported

    # Worker half
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._worker.begin(connector_metadata)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self._worker.drain(kv_connector_metadata)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        self._worker.save(self._get_connector_metadata(), layer_name)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to start: sources write on their own."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs only after all its KV is there."""

    def wait_for_save(self) -> None:
        self._worker.settle(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._worker.results()

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER:
            self._worker.close()
        elif self._reports is not None:
            self._reports.close()


class PullConnector(_BlockReports, NixlPullConnector):  # type: ignore[misc]
    """vLLM's stock pull connector (kv_transfer.mode: pull), which also reports free blocks."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._extra = vllm_config.kv_transfer_config.get_from_extra_config
        if role == KVConnectorRole.SCHEDULER:
            self._open_reports(vllm_config)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        self._report_free()
        return super().build_connector_meta(scheduler_output)

    def has_pending_push_work(self) -> bool:
        return super().has_pending_push_work() or self._unreported
