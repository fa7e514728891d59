"""The scheduler half: decides from vLLM's scheduling what the worker half does in a step.

It lives where vLLM's scheduler does and runs on its thread. Which request has which ticket travels in the request's
`kv_transfer_params`, written by `ticket_params`. It sees no tensor and moves nothing.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.request import RequestStatus

from splitserve.core.worker import KvPeer, Ticket
from splitserve.kv.layout import blocks_for, full_blocks, prompt_hash
from splitserve.kv.transfer import Claim, Offer, TransferKey

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
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
        first = full_blocks(request.num_tokens - external, self._block_size)
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
        complete = blocks_for(end, self._block_size) if end == prompt else full_blocks(end, self._block_size)
        metadata.tables.append((source.key, table, full_blocks(computed, self._block_size)))
        metadata.ready.append((source.key, complete))
