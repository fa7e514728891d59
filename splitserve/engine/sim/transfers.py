"""The transfers of the simulated engine's jobs: what is offered and claimed, and which blocks must stay for it.

Used by the engine's thread; the transfer service has threads of its own. A transfer holds its job's blocks until the
service names it, and the job may be over long before. Not here: when a job computes (`schedule.py`), what a ticket may
be used for (`ticket.py`).
"""

from collections.abc import Callable, Iterable, Sequence

from splitserve.core.worker import KvPeer, PrefillJob, Ticket
from splitserve.engine.sim.job import Running
from splitserve.engine.sim.schedule import Sequence as Scheduled
from splitserve.engine.sim.ticket import Side, key_of
from splitserve.kv.layout import blocks_for, prompt_hash, tokens_to_move
from splitserve.kv.transfer import Claim, Offer, Table, TransferEnded, TransferKey, TransferService


class Transfers:
    """`release` is called with what a job has computed once it is over and no transfer holds its blocks."""

    def __init__(self, service: TransferService, block_size: int, release: Callable[[Scheduled], None]) -> None:
        self._service = service
        self._block_size = block_size
        self._release = release
        self._live: dict[Side, Running] = {}  # by their own tickets
        self._open: dict[Side, Running] = {}  # what the service has yet to name

    # Jobs ------------------------------------------------------------------------------------------------------------
    def in_use(self, side: Side) -> bool:
        return side in self._live or side in self._open

    def add(self, run: Running) -> None:
        """A job came. A prefill offers its prompt's KV at once, so that a bad claim is refused early."""
        if run.side is None:
            return
        self._live[run.side] = run
        if isinstance(run.job, PrefillJob):
            self._offer(run, run.side[0], run.job.ticket.destination, run.job.prompt)

    def over(self, run: Running, failed: bool) -> None:
        """The job has ended. One that failed is not to get its KV, nor to send it."""
        run.ended = True
        if run.side is not None:
            del self._live[run.side]
        if failed and run.side in run.holds:
            key, source = run.side
            (self._service.prefill_aborted if source else self._service.abandon)(key)
        self._release_if_free(run)

    def of(self, event: TransferEnded) -> Running | None:
        """The live job that took part under its own ticket."""
        return self._live.get((event.key, event.source_side))

    # Source ----------------------------------------------------------------------------------------------------------
    def announce(self, runs: Iterable[tuple[Running, int]]) -> list[tuple[TransferKey, int]]:
        """Before a step: for each job so many tokens will be computed after it. Returns what to tell of prefills after
        each layer."""
        prefills = [(run, run.side[0], end) for run, end in runs if run.side is not None and run.side[1]]
        for run, key, _ in prefills:
            self._service.computing(key, [run.sequence.table], run.sequence.computed)
        return [(key, end) for _, key, end in prefills]

    def computed(self, layer: int, ready: Sequence[tuple[TransferKey, int]]) -> None:
        self._service.computed(layer, ready)

    def prompt_computed(self, run: Running) -> None:
        assert run.side is not None
        self._service.prefill_ended(run.side[0])

    def hand_over(self, run: Running, ticket: Ticket) -> None:
        """Offers what is computed of a decode now."""
        sequence, key = run.sequence, key_of(ticket)
        self._offer(run, key, ticket.destination, sequence.tokens[: sequence.computed])
        self._service.computing(key, [sequence.table], sequence.computed)
        self._service.prefill_ended(key)

    def preempted(self, runs: Sequence[Running]) -> None:
        """Their blocks are given to others: WRITEs from them end first. What a decode had offered fails; a prefill's
        prompt is computed anew."""
        sources = [(run, side) for run in runs for side in run.holds if side[1]]
        if sources:
            self._service.drain([key for _, (key, _) in sources])
        for run, side in sources:
            if side != run.side:
                self._service.prefill_aborted(side[0])

    # Destination -----------------------------------------------------------------------------------------------------
    def claim(self, run: Running) -> None:
        """A decode has got its blocks: asks for the KV of all its tokens but the last."""
        assert run.side is not None
        assert run.job.ticket is not None
        tokens = run.sequence.tokens[: tokens_to_move(len(run.sequence.tokens))]
        blocks = tuple(run.sequence.table[: blocks_for(len(tokens), self._block_size)])
        key = self._hold(run, run.side)
        self._service.claim(
            Claim(key, run.job.ticket.source, prompt_hash(tokens), len(tokens), (Table(0, blocks),), run.job.deadline_s)
        )

    # Both ------------------------------------------------------------------------------------------------------------
    def hear(self) -> list[Running]:
        """Lets go of what the service has done with. Returns live jobs whose KV has arrived."""
        results = self._service.take_results()
        received = [self._let_go((key, False)) for key in results.received]
        for key in (*results.failed, *results.released):
            self._let_go((key, False))
        for key in results.sent:
            self._let_go((key, True))
        return [run for run in received if not run.ended]

    @property
    def any_open(self) -> bool:
        return bool(self._open)

    @property
    def pinned_blocks(self) -> int:
        """Of computed prompts and ended decodes whose KV is still offered or being sent."""
        pinned = {run for (_, source), run in self._open.items() if source and (run.computed or run.ended)}
        return sum(len(run.sequence.table) for run in pinned)

    @property
    def quarantined_blocks(self) -> int:
        """Of ended decodes whose KV may still be written."""
        return sum(len(run.sequence.table) for (_, source), run in self._open.items() if not source and run.ended)

    def _offer(self, run: Running, key: TransferKey, destination: tuple[KvPeer, ...], tokens: Sequence[int]) -> None:
        self._hold(run, (key, True))
        self._service.offer(Offer(key, destination, tokens, blocks_for(len(tokens), self._block_size)))

    def _hold(self, run: Running, side: Side) -> TransferKey:
        self._open[side] = run
        run.holds.add(side)
        return side[0]

    def _let_go(self, side: Side) -> Running:
        run = self._open.pop(side)
        run.holds.discard(side)
        self._release_if_free(run)
        return run

    def _release_if_free(self, run: Running) -> None:
        if run.ended and not run.holds:
            self._release(run.sequence)
