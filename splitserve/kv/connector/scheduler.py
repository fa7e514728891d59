"""The scheduler half: decides from vLLM's scheduling what the worker halves do in a step.

It lives where vLLM's scheduler does and runs on its thread; `hand_over` alone is called by another. Which request has
which ticket travels in the request's `kv_transfer_params`, written by `ticket_params`. It sees no tensor and moves
nothing.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.request import RequestStatus

from splitserve.core.worker import KvPeer
from splitserve.kv.bridge import HandOver
from splitserve.kv.connector.versions import BlockIds, BlockTables
from splitserve.kv.job_params import DESTINATION, peers_of
from splitserve.kv.layout import blocks_for, first_kept_block, full_blocks, prompt_hash, tokens_to_move
from splitserve.kv.transfer import Claim, Offer, Table, TransferKey

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

FINISHED_WELL = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass(frozen=True, slots=True)
class Group:
    """One of vLLM's KV groups: layers that share a block table. `window`: tokens, where its layers see no further."""

    block_size: int
    window: int | None = None


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the worker halves must do in one step. `loading` names the vLLM request that waits for each claim, `pinned`
    the keys that each ended request's blocks must outlive."""

    offers: list[Offer] = field(default_factory=list)
    preempted: list[TransferKey] = field(default_factory=list)
    tables: list[tuple[TransferKey, BlockIds, int]] = field(default_factory=list)  # key, blocks, tokens computed
    ready: list[tuple[TransferKey, int]] = field(default_factory=list)  # key, tokens computed after this step
    claims: list[Claim] = field(default_factory=list)
    ended: list[TransferKey] = field(default_factory=list)
    aborted: list[TransferKey] = field(default_factory=list)
    abandoned: list[TransferKey] = field(default_factory=list)
    loading: dict[TransferKey, str] = field(default_factory=dict)
    pinned: dict[str, tuple[TransferKey, ...]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.offers or self.claims or self.ended or self.aborted or self.abandoned or self.pinned)


@dataclass(slots=True)
class _Job:
    """One of our jobs inside vLLM. `source`: the ticket under which its prompt's KV is offered; `scheduled` once it
    holds blocks, until it is preempted; `handed`: tickets under which its KV so far was offered; `last`: that under
    which all of it will be."""

    request: "Request"
    source: TransferKey | None = None
    destination: "_Destination | None" = None
    scheduled: bool = False
    copies: list[HandOver] = field(default_factory=list)
    handed: list[TransferKey] = field(default_factory=list)
    last: HandOver | None = None


@dataclass(slots=True)
class _Destination:
    key: TransferKey
    peers: tuple[KvPeer, ...]
    deadline_s: float
    claimed: bool = False


class SchedulerHalf:
    """See the module's docstring."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = tuple(groups)
        self._block_size = groups[0].block_size
        self._jobs: dict[str, _Job] = {}  # by vLLM's request id
        self._by_job_id: dict[str, _Job] = {}
        self._next = StepMetadata()
        self._sending: set[str] = set()
        self._tables = BlockTables()

    # Another thread --------------------------------------------------------------------------------------------------
    def hand_over(self, order: HandOver) -> None:
        """Offers a running job's KV, now or at its end. Ignored if the job has ended."""
        job = self._by_job_id.get(order.job_id)
        if job is not None and order.at_end:
            job.last = order
        elif job is not None:
            job.copies.append(order)

    # vLLM's scheduler ------------------------------------------------------------------------------------------------
    def admit(self, request: "Request") -> None:
        """A job came: a source offers its KV at once, so that a bad claim is refused early."""
        params = request.kv_transfer_params
        if not params or "job_id" not in params:
            return
        job = self._jobs[request.request_id] = self._by_job_id[params["job_id"]] = _Job(request)
        if "side" not in params:
            return
        key, peers = TransferKey(params["transfer_id"], params["epoch"]), peers_of(params)
        if params["side"] == DESTINATION:
            job.destination = _Destination(key, peers, params["deadline_s"])
            return
        job.source = key
        prompt = array("i", request.prompt_token_ids)
        self._next.offers.append(Offer(key, peers, prompt, blocks_for(len(prompt), self._block_size)))

    def external_tokens(self, request: "Request", computed: int) -> tuple[int, bool]:
        """Tokens that will come from the source; vLLM asks on every step, so this only looks."""
        job = self._jobs.get(request.request_id)
        if job is None or job.destination is None or job.destination.claimed:
            return 0, False
        tokens = max(0, tokens_to_move(request.num_tokens) - computed)
        return tokens, tokens > 0

    def claim(self, request: "Request", blocks: "KVCacheBlocks", external: int) -> None:
        """Blocks are allocated: ask the source to fill those that hold no computed token yet. If there are none, an
        empty claim tells it so."""
        job = self._jobs.get(request.request_id)
        if job is None or job.destination is None or job.destination.claimed:
            return
        destination, tokens = job.destination, tokens_to_move(request.num_tokens)
        destination.claimed = True
        if external:
            self._next.loading[destination.key] = request.request_id
        tables = self._claimed_tables(blocks.get_block_ids(), tokens - external, tokens)
        digest = prompt_hash(request.all_token_ids[:tokens])
        self._next.claims.append(
            Claim(destination.key, destination.peers, digest, tokens, tables, destination.deadline_s)
        )

    def step(self, output: "SchedulerOutput") -> StepMetadata:
        """Takes what gathered since the last step and adds what this one computes of offered prompts."""
        metadata, self._next = self._next, StepMetadata()
        self._tables.follow(output)
        self._note_preempted(output, metadata)
        for request in output.scheduled_new_reqs:
            self._note_scheduled(metadata, output, request.req_id, request.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._note_scheduled(metadata, output, request_id, computed)
        return metadata

    def finish(self, request: "Request", tables: BlockIds) -> bool:
        """A request ended. True for a source: its blocks stay until the worker halves report them sent."""
        job = self._jobs.pop(request.request_id, None)
        if job is None:
            return False
        self._by_job_id.pop(request.kv_transfer_params["job_id"], None)
        if job.destination is not None and job.destination.claimed:
            self._next.abandoned.append(job.destination.key)
        keys = [*job.handed]
        if job.source is not None:
            (self._next.ended if request.status in FINISHED_WELL else self._next.aborted).append(job.source)
            keys.append(job.source)
        if job.last is not None and request.status == RequestStatus.FINISHED_ABORTED:
            keys.append(self._offer_computed(self._next, request, job.last, tables))
        if not keys:
            return False
        self._next.pinned[request.request_id] = tuple(keys)
        self._sending.add(request.request_id)
        return True

    def reported(self, sent: Sequence[str]) -> None:
        """vLLM was told that these requests' blocks are free of readers."""
        self._sending.difference_update(sent)

    @property
    def busy(self) -> bool:
        return bool(self._sending) or not self._next.empty

    def _offer_computed(
        self, metadata: StepMetadata, request: "Request", order: HandOver, tables: BlockIds
    ) -> TransferKey:
        """Offers what is computed of a decode. A token that was sampled has the KV of all before it computed. While it
        decodes on, the blocks are its own and none is kept for the offer."""
        key = TransferKey(order.transfer_id, order.epoch)
        computed = min(request.num_computed_tokens, tokens_to_move(request.num_tokens))
        tokens = array("i", request.all_token_ids[:computed])
        kept = blocks_for(computed, self._block_size) if order.at_end else 0
        metadata.offers.append(Offer(key, order.destination, tokens, kept))
        metadata.tables.append((key, tables, computed))
        metadata.ended.append(key)
        return key

    def _claimed_tables(self, blocks: BlockIds, computed: int, tokens: int) -> tuple[Table, ...]:
        """Per group the blocks that the source is to fill: none that are computed, none that no layer looks at."""
        return tuple(_table(ids, group, computed, tokens) for ids, group in zip(blocks, self._groups, strict=True))

    def _note_preempted(self, output: "SchedulerOutput", metadata: StepMetadata) -> None:
        for job in self._jobs.values():
            if job.scheduled and job.request.status == RequestStatus.PREEMPTED:
                job.scheduled = False
                metadata.preempted += [*([job.source] if job.source is not None else []), *job.handed]
                metadata.aborted += job.handed  # what it computes anew is not offered again

    def _note_scheduled(
        self, metadata: StepMetadata, output: "SchedulerOutput", request_id: str, computed: int
    ) -> None:
        job = self._jobs.get(request_id)
        if job is None:
            return
        job.scheduled = True
        if job.source is not None:
            end = computed + output.num_scheduled_tokens[request_id]
            metadata.tables.append((job.source, self._tables.of(request_id), computed))
            metadata.ready.append((job.source, min(end, job.request.num_prompt_tokens)))
        while job.copies:
            key = self._offer_computed(metadata, job.request, job.copies.pop(0), self._tables.of(request_id))
            job.handed.append(key)
            if any(group.window is not None for group in self._groups):
                metadata.aborted.append(key)  # as it decodes on, blocks fall out of the window while they are read


def _table(ids: Sequence[int], group: Group, computed: int, tokens: int) -> Table:
    needed = blocks_for(tokens, group.block_size)
    first = max(full_blocks(computed, group.block_size), first_kept_block(tokens, group.block_size, group.window))
    return Table(min(first, needed), tuple(ids[first:needed]))
