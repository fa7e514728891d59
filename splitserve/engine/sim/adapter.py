"""One job's life inside the simulated engine.

One thread (the engine's) owns the job table, the schedule and the KV; `submit`, `cancel` and what the transfer service
reports are posted to it. A turn of it is one step: results of transfers, a plan, computing in real time (layer by
layer where a prefill's KV is pushed), one batch of deltas. It waits on its command queue when there is nothing to do.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from splitserve.core.config import KvTransferSettings, SimSettings
from splitserve.core.errors import EngineError
from splitserve.core.model import ModelInfo
from splitserve.core.request import FinishReason
from splitserve.core.worker import (
    DecodeJob,
    Delta,
    Failure,
    Job,
    KvMode,
    KvPeer,
    Outcome,
    PrefillJob,
    TransferStats,
)
from splitserve.engine.protocol import EngineInfo, EngineLoad, OnDeltas
from splitserve.engine.sim.memory import DIGEST_BYTES, BlockPool, ChainedKv
from splitserve.engine.sim.output import DecodeOutput
from splitserve.engine.sim.schedule import Chunk, Plan, Schedule
from splitserve.engine.sim.schedule import Sequence as Scheduled
from splitserve.engine.sim.shape import kv_format, max_model_len
from splitserve.engine.sim.text import load_tokenizer, vocabulary
from splitserve.engine.sim.ticket import Side, handover_of, not_transferred, prompt_fault, side_of, ticket_fault
from splitserve.kv.layout import blocks_for, prompt_hash
from splitserve.kv.shm import ShmTransport
from splitserve.kv.transfer import Claim, Offer, Results, TransferEnded, TransferKey, TransferService
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import LatencyModel, PrefillChunk, Step

TRANSFER_POLL_S = 0.002  # results of transfers are looked at so often while nothing computes
IDLE_S = 1.0
STOP_TIMEOUT_S = 10.0

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Running:
    """A job. `output` is a decode's; `stats` come when its transfer has ended; `computed`: a prefill's prompt is."""

    job: Job
    sequence: Scheduled
    side: Side | None
    output: DecodeOutput | None = None
    stats: TransferStats | None = None
    computed: bool = False


class SimEngine:
    """See `Engine`. `latency` defaults to the linear model of the settings."""

    def __init__(
        self,
        model: ModelInfo,
        settings: SimSettings,
        kv: KvTransferSettings,
        worker_uuid: str,
        latency: LatencyModel | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._mode = kv.mode
        self._uuid = worker_uuid
        self._latency = latency or LinearLatency.of(settings)
        self._max_model_len = max_model_len(model, settings)
        self._format = kv_format(model, settings, kv.mode)
        self._tokenizer = load_tokenizer(model)
        self._vocabulary = vocabulary(model, self._tokenizer)
        transport = ShmTransport(model.layers, settings.total_blocks, DIGEST_BYTES)
        self._kv = ChainedKv(transport.block, model.layers, settings.block_size, model.fingerprint)
        self._service = TransferService(worker_uuid, lambda: transport, self._format, kv, self._on_transfer)
        pool = BlockPool(settings.total_blocks)
        self._schedule = Schedule(pool, settings.block_size, settings.max_num_seqs, settings.max_num_batched_tokens)
        self._jobs: dict[str, _Running] = {}
        self._sides: dict[Side, _Running] = {}  # of live jobs
        self._owed: dict[Side, _Running] = {}  # the service will name these; until then their blocks stay
        self._arrivals = 0
        self._deltas: list[Delta] = []
        self._load = EngineLoad(settings.total_blocks, 0, 0)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._broke = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Engine ----------------------------------------------------------------------------------------------------------
    def start(self, on_deltas: OnDeltas) -> EngineInfo:
        self._on_deltas = on_deltas
        peer = self._service.start()
        self._thread.start()
        return EngineInfo(
            kind="sim",
            kv=self._format,
            kv_peer=peer,
            total_blocks=self._settings.total_blocks,
            max_sequences=self._settings.max_num_seqs,
            max_model_len=self._max_model_len,
            max_batched_tokens=self._settings.max_num_batched_tokens,
        )

    def submit(self, job: Job) -> None:
        if self._broke:
            self._on_deltas([Delta(job.job_id, outcome=Outcome(failure=Failure.ENGINE, message=self._broke))])
        self._commands.put(partial(self._add, job))

    def cancel(self, job_id: str) -> None:
        self._commands.put(partial(self._cancel, job_id, "cancelled"))

    def connect(self, peers: Sequence[KvPeer]) -> None:
        self._service.connect(peers)

    def load(self) -> EngineLoad:
        if self._broke:
            raise EngineError(self._broke)
        return self._load

    def close(self) -> None:
        self._closing.set()
        self._commands.put(lambda: None)
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S)
        self._service.close()

    # The engine's thread ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._turn()
            self._end_all(Outcome(failure=Failure.CANCELLED, message="the worker stopped"))
        except Exception as error:
            self._broke = f"the engine broke: {error!r}"
            self._end_all(Outcome(failure=Failure.ENGINE, message=self._broke))
            raise

    def _turn(self) -> None:
        self._hear(self._service.take_results())
        plan = self._schedule.plan()
        self._prepare(plan)
        if plan.chunks:
            self._compute(plan.chunks)
        self._publish()
        idle_s = TRANSFER_POLL_S if self._owed else IDLE_S
        self._take_commands(0.0 if plan.chunks or plan.preempted else idle_s)

    def _take_commands(self, wait_s: float) -> None:
        with suppress(queue.Empty):
            command = self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
            while True:
                command()
                command = self._commands.get_nowait()

    def _publish(self) -> None:
        """The load first: whoever hears of an end finds its blocks free."""
        owed = self._owed.items()
        pinned = sum(len(run.sequence.table) for side, run in owed if side[1] and not self._computes(run))
        quarantined = sum(len(run.sequence.table) for side, run in owed if not side[1] and side not in self._sides)
        self._load = EngineLoad(self._schedule.pool.free, pinned, quarantined)
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            self._on_deltas(deltas)

    def _computes(self, run: _Running) -> bool:
        return not run.computed and run.job.job_id in self._jobs

    # Jobs come and go ------------------------------------------------------------------------------------------------
    def _add(self, job: Job) -> None:
        refusal = self._refusal(job)
        if refusal is not None:
            self._deltas.append(Delta(job.job_id, outcome=refusal))
            return
        run = self._admit(job)
        if run.output is not None and (over := run.output.outcome(None)) is not None:
            self._end(run, over)
            return
        if isinstance(job, PrefillJob):
            self._offer(job, run)
        self._schedule.add(run.sequence)

    def _admit(self, job: Job) -> _Running:
        output = job.output if isinstance(job, DecodeJob) else ()
        self._arrivals += 1
        waits = isinstance(job, DecodeJob) and job.ticket is not None
        sequence = Scheduled(job.job_id, [*job.prompt, *output], (job.priority, self._arrivals), waits)
        run = _Running(job, sequence, side_of(job))
        if isinstance(job, DecodeJob):
            run.output = DecodeOutput(job, self._tokenizer, self._vocabulary, self._max_model_len)
        self._jobs[job.job_id] = run
        if run.side is not None:
            self._sides[run.side] = run
        return run

    def _offer(self, job: PrefillJob, run: _Running) -> None:
        key, _ = _known(run.side)
        blocks = blocks_for(len(job.prompt), self._settings.block_size)
        self._owed[key, True] = run
        self._service.offer(Offer(key, job.ticket.destination, prompt_hash(job.prompt), blocks))

    def _refusal(self, job: Job) -> Outcome | None:
        if job.job_id in self._jobs:
            return Outcome(failure=Failure.INVALID, field="job_id", message=f"{job.job_id!r} is running already")
        fault = prompt_fault(job, self._max_model_len, self._model.vocab_size)
        if fault is not None or job.ticket is None:
            return fault
        key, source = side = _known(side_of(job))
        if side in self._sides or side in self._owed:
            return not_transferred(f"ticket {key} is in use; a new try takes a new epoch")
        return ticket_fault(job.ticket, source, self._uuid, self._mode)

    def _cancel(self, job_id: str, message: str) -> None:
        run = self._jobs.get(job_id)
        if run is not None:
            self._end(run, Outcome(failure=Failure.CANCELLED, message=message))

    def _end(self, run: _Running, outcome: Outcome) -> None:
        """The job is over. Blocks that a peer may still read or write stay until the transfer service names them."""
        self._deltas.append(Delta(run.job.job_id, outcome=outcome))
        self._forget(run, failed=outcome.failure is not None)

    def _forget(self, run: _Running, failed: bool) -> None:
        del self._jobs[run.job.job_id]
        self._schedule.remove(run.sequence)
        if run.side is not None:
            del self._sides[run.side]
        if run.side is None or run.side not in self._owed:
            self._schedule.release(run.sequence)
        elif failed:
            key, source = run.side
            (self._service.prefill_aborted if source else self._service.abandon)(key)

    def _end_all(self, outcome: Outcome) -> None:
        for run in list(self._jobs.values()):
            self._end(run, outcome)
        self._publish()

    # Transfers -------------------------------------------------------------------------------------------------------
    def _on_transfer(self, event: TransferEnded) -> None:
        """Called on the transfer thread."""
        self._commands.put(partial(self._transfer_ended, event))

    def _transfer_ended(self, event: TransferEnded) -> None:
        run = self._sides.get((event.key, event.source_side))
        if run is None:
            return
        if event.error:
            self._end(run, not_transferred(event.error))
            return
        run.stats = event.stats
        if event.source_side and run.computed:
            self._end_prefill(run)

    def _hear(self, results: Results) -> None:
        for key in results.received:
            self._received(key)
        for key in (*results.failed, *results.released):
            self._schedule.release(self._owed.pop((key, False)).sequence)
        for key in results.sent:
            self._schedule.release(self._owed.pop((key, True)).sequence)

    def _received(self, key: TransferKey) -> None:
        run = self._owed.pop((key, False))
        if self._sides.get((key, False)) is run:
            run.sequence.received()
            self._schedule.add(run.sequence)
        else:  # cancelled while the last of it came
            self._schedule.release(run.sequence)

    def _claim(self, run: _Running) -> None:
        key, _ = _known(run.side)
        source = _known(run.job.ticket).source
        blocks, digest = tuple(run.sequence.table), prompt_hash(run.sequence.tokens)
        self._owed[key, False] = run
        self._service.claim(Claim(key, source, digest, 0, blocks, run.job.deadline_s))

    # One step --------------------------------------------------------------------------------------------------------
    def _prepare(self, plan: Plan) -> None:
        """WRITEs of preempted blocks end before anyone else gets them."""
        preempted = [self._jobs[sequence.job_id].side for sequence in plan.preempted]
        sources = [side[0] for side in preempted if side is not None and side[1]]
        if sources:
            self._service.drain(sources)
        for sequence in plan.parked:
            self._claim(self._jobs[sequence.job_id])

    def _compute(self, chunks: Sequence[Chunk]) -> None:
        started, duration_s = time.monotonic(), self._latency.step_s(_step(chunks))
        ready = list(self._announce(chunks))
        work = [
            (chunk.sequence.table, self._kv.fold(chunk.sequence.tokens, chunk.sequence.written, chunk.end))
            for chunk in chunks
        ]
        for layer in range(self._model.layers):
            for table, segments in work:
                self._kv.write(layer, table, segments)
            if ready:
                self._pause_until(started + duration_s * (layer + 1) / self._model.layers)
                self._service.computed(layer, ready)
        self._pause_until(started + duration_s)
        for chunk in chunks:
            self._schedule.commit(chunk)
            if chunk.sequence.left == 0:
                self._advance(self._jobs[chunk.sequence.job_id])

    def _announce(self, chunks: Iterable[Chunk]) -> Iterable[tuple[TransferKey, int]]:
        """Tells the service which blocks the prefills compute; yields how many of each are complete after the step."""
        size = self._settings.block_size
        for chunk in chunks:
            side = self._jobs[chunk.sequence.job_id].side
            if side is not None and side[1]:
                self._service.computing(side[0], chunk.sequence.table, chunk.sequence.computed // size)
                whole = chunk.end == len(chunk.sequence.tokens)
                yield side[0], blocks_for(chunk.end, size) if whole else chunk.end // size

    def _advance(self, run: _Running) -> None:
        """All its tokens are computed: a prefill is done, a decode makes one more."""
        if run.output is None:
            self._prompt_computed(run)
            return
        delta = run.output.advance(self._kv.read(run.sequence.table, len(run.sequence.tokens)), run.stats)
        self._deltas.append(delta)
        if delta.outcome is None:
            run.sequence.tokens.append(run.output.last_token)
        else:
            self._forget(run, failed=False)

    def _prompt_computed(self, run: _Running) -> None:
        run.computed = True
        self._schedule.remove(run.sequence)
        self._deltas.append(Delta(run.job.job_id))
        self._service.prefill_ended(_known(run.side)[0])
        if run.stats is not None or self._mode is KvMode.PULL:
            self._end_prefill(run)

    def _end_prefill(self, run: _Running) -> None:
        handover = handover_of(_known(run.job.ticket)) if self._mode is KvMode.PULL else b""
        self._end(run, Outcome(finish_reason=FinishReason.LENGTH, handover=handover, transfer=run.stats))

    def _pause_until(self, moment: float) -> None:
        """Passes the time that a real engine would compute; a closing worker doesn't wait for it."""
        left_s = moment - time.monotonic()
        if left_s > 0:
            self._closing.wait(left_s)


def _known(value: T | None) -> T:
    """What a job with a ticket always has."""
    assert value is not None
    return value


def _step(chunks: Iterable[Chunk]) -> Step:
    prefills, decodes = [], []
    for chunk in chunks:
        if chunk.decodes:
            decodes.append(chunk.end)
        else:
            prefills.append(PrefillChunk(chunk.tokens, chunk.sequence.computed))
    return Step(prefills, decodes)
