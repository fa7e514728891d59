"""One decode's move to another worker while its stream goes on, up to the moment that it stops here.

    copy   the KV so far goes to the target, whose prefix cache keeps it; the decode goes on meanwhile
    stop   the decode ends at its next token; what is left of its KV waits at its worker under a ticket
    go on  an attempt at the target takes that over, computes the last token and makes the next

Used on the router's event loop only. What fails before `stop` leaves the request where it is, and so does a target that
would not take it any more by then; what fails after it is a setback like any other.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace

from splitserve.core.request import SamplingParams
from splitserve.core.worker import DecodeJob, KvMode, Ticket, WorkerInfo
from splitserve.kv.layout import full_blocks, tokens_to_move
from splitserve.router.mailbox import Mailbox
from splitserve.router.membership import Membership
from splitserve.router.move import Move
from splitserve.router.resume import migration_refusal
from splitserve.router.waiting import Binding, WaitingRequests

_LOAD_ONLY = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)  # its one token is dropped


@dataclass(frozen=True, slots=True)
class Decoding:
    """The decode that is to move, as it is now. `name` begins the names of this move's jobs and tickets."""

    job_id: str
    request_id: str
    worker: WorkerInfo
    sampling: SamplingParams
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    deadline_s: float
    priority: int
    name: str
    lora: str = ""
    cache_salt: str = ""

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.output


class Departure:
    """A move under way, from the order to the decode's end here. `binding` is where it goes on, once it is known; what
    is promised to the target is held until `close`."""

    def __init__(self, move: Move, decoding: Decoding, waiting: WaitingRequests, membership: Membership) -> None:
        self.move = move
        self._decoding = decoding
        self._waiting = waiting
        self._membership = membership
        self._held = ExitStack()
        self.copy_job_id = f"{decoding.name}/copy/decode"
        self.binding: Binding | None = None

    def start(self, mailbox: Mailbox) -> str:
        """Copies what is there, or stops at once if that is less than a block. Returns why it can't move, if so."""
        decoding = self._decoding
        if decoding.worker.kv.mode is KvMode.PULL:
            return "kv_transfer.mode is pull: only push can move a decode"
        if self.move.to == decoding.worker.uuid:
            return f"it decodes on worker {decoding.worker.name} already"
        refusal = self._promise(len(decoding.tokens), self.move.to)
        if self.binding is None:
            return refusal
        target = self.binding.decode
        refusal = migration_refusal(decoding.sampling, decoding.output, target.restores)
        if decoding.lora and decoding.lora not in target.loras:
            refusal = f"worker {target.name} does not have the LoRA adapter {decoding.lora!r}"
        if refusal or self._copy(target, mailbox):
            return refusal
        return self.stop(len(decoding.tokens))

    @property
    def source(self) -> WorkerInfo:
        return self._decoding.worker

    @property
    def target(self) -> str:
        return self.binding.decode.name if self.binding is not None else ""

    def stop(self, tokens: int) -> str:
        """The copy is there, or was not to be had: the rest of so many tokens' KV goes now. Returns why not, if the
        target has left, drains or is full since."""
        assert self.binding is not None
        self._held.close()
        refusal = self._promise(tokens, self.binding.decode.uuid)
        if not refusal:
            assert self.binding.takeover is not None
            self._membership.hand_over(self._decoding.job_id, self.binding.takeover, at_end=True)
        return refusal

    def close(self, reason: str) -> None:
        """Gives back what is still promised. If the decode has not moved, the order hears why."""
        self._membership.cancel(self.copy_job_id)
        self._held.close()
        self.move.refuse(reason)

    def _promise(self, tokens: int, wanted: str | None) -> str:
        """Finds the target, or asks it anew, and holds room there for so many tokens. Returns why not, if so."""
        worker = self._decoding.worker
        bound = self._held.enter_context(self._waiting.target(worker, tokens, self._decoding.name, wanted))
        if bound is None:
            return f"{self._nobody(wanted)} take over {tokens} tokens of KV now; try again later"
        ticket = Ticket(f"{self._decoding.name}/stop", 0, worker.kv_peers, bound.decode.kv_peers)
        self.binding = replace(bound, takeover=ticket)
        return ""

    def _nobody(self, wanted: str | None) -> str:
        if wanted is None:
            return "no other worker can"
        info = self._membership.worker(wanted)
        return f"worker {info.name if info is not None else wanted} can't"

    def _copy(self, target: WorkerInfo, mailbox: Mailbox) -> bool:
        """Has the target load the blocks that are full now. False if there are none, or no room for them beside what is
        promised."""
        decoding, size = self._decoding, target.kv.block_size
        loaded = full_blocks(tokens_to_move(len(decoding.tokens)), size) * size
        with self._waiting.target(decoding.worker, loaded + 1, f"{decoding.name}/copy", target.uuid) as bound:
            if loaded == 0 or bound is None:
                return False
            ticket = Ticket(f"{decoding.name}/copy", 0, decoding.worker.kv_peers, target.kv_peers)
            job = DecodeJob(
                job_id=self.copy_job_id,
                request_id=decoding.request_id,
                prompt=decoding.tokens[: loaded + 1],
                sampling=_LOAD_ONLY,
                deadline_s=decoding.deadline_s,
                ticket=ticket,
                priority=decoding.priority,
                lora=decoding.lora,
                cache_salt=decoding.cache_salt,
            )
            self._membership.send(target.uuid, job, mailbox)
            self._membership.hand_over(decoding.job_id, ticket, at_end=False)
        return True
