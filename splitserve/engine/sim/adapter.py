"""One job's life inside the simulated engine.

One thread (the engine's) owns the job table, the schedule and the KV; `submit`, `cancel`, `hand_over` and what the
transfer service reports are posted to it. A turn of it is one step: results of transfers, a plan, computing in real
time (layer by layer where a prefill's KV is pushed), one batch of deltas. It waits on its command queue when there is
nothing to do.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from splitserve.core.config import KvTransferSettings, SimSettings
from splitserve.core.errors import EngineError, InvalidRequest
from splitserve.core.model import ModelInfo
from splitserve.core.request import FinishReason
from splitserve.core.sampler_state import STATEFUL
from splitserve.core.worker import (
    DecodeJob,
    Delta,
    Failure,
    Job,
    KvMode,
    KvPeer,
    Outcome,
    Ticket,
    TransferEnd,
    rank_uuid,
)
from splitserve.engine.protocol import EngineInfo, EngineLoad, OnCached, OnDeltas, OnTransfer, uncached, unheard
from splitserve.engine.sim.job import Running
from splitserve.engine.sim.memory import BlockPool, ChainedKv
from splitserve.engine.sim.output import DecodeOutput
from splitserve.engine.sim.schedule import Chunk, Plan, Schedule
from splitserve.engine.sim.schedule import Sequence as Scheduled
from splitserve.engine.sim.script import Script, script_of
from splitserve.engine.sim.shape import kv_format, max_model_len, shard
from splitserve.engine.sim.text import load_tokenizer, vocabulary
from splitserve.engine.sim.ticket import (
    handover_of,
    key_of,
    not_transferred,
    prompt_fault,
    request_fault,
    side_of,
    ticket_fault,
)
from splitserve.engine.sim.transfers import Transfers
from splitserve.engine.sim.wire import kind_of, wired
from splitserve.kv.transfer import TransferEnded, TransferService
from splitserve.latency.cost import cost_of, latency_of
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import LatencyModel, PrefillChunk, Step
from splitserve.routing.pace import Batch, PacedJobs

TRANSFER_POLL_S = 0.002  # results of transfers are looked at so often while nothing computes
IDLE_S = 1.0
STOP_TIMEOUT_S = 10.0


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
        self._rank = rank_uuid(worker_uuid, 0)
        self._latency = latency or LinearLatency.of(settings)
        self._max_model_len = max_model_len(model, settings)
        self._format = kv_format(model, settings, kv.mode, kind_of(settings, kv.host))
        self._tokenizer = load_tokenizer(model)
        self._vocabulary = vocabulary(model, self._tokenizer)
        wire = wired(self._format.transport, self._rank, kv.host, model.layers, settings)
        self._kv = ChainedKv(wire.view, model.layers, settings.block_size, model.fingerprint)
        self._service = TransferService(
            self._rank, wire.transport, self._format, shard(self._format), kv, self._on_transfer
        )
        pool = BlockPool(settings.total_blocks)
        self._schedule = Schedule(pool, settings.block_size, settings.max_num_seqs, settings.max_num_batched_tokens)
        self._transfers = Transfers(self._service, settings.block_size, self._schedule.release)
        self._step_cost = cost_of(self._latency)
        self._paced = PacedJobs(latency_of(self._step_cost))  # by what routers are told
        self._jobs: dict[str, Running] = {}
        self._arrivals = 0
        self._deltas: list[Delta] = []
        self._load = EngineLoad(settings.total_blocks, 0, 0)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._broke = ""
        self._turned_at = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Engine ----------------------------------------------------------------------------------------------------------
    def start(
        self, on_deltas: OnDeltas, on_transfer: OnTransfer = unheard, on_cached: OnCached = uncached
    ) -> EngineInfo:
        self._on_deltas, self._tell_transfer = on_deltas, on_transfer
        peer = self._service.start()
        self._thread.start()
        return EngineInfo(
            uuid=self._uuid,
            kind="sim",
            kv=self._format,
            kv_peers=(peer,),
            total_blocks=self._settings.total_blocks,
            max_sequences=self._settings.max_num_seqs,
            max_model_len=self._max_model_len,
            max_batched_tokens=self._settings.max_num_batched_tokens,
            restores=tuple(sorted(STATEFUL)),
            loras=tuple(self._settings.loras),
            step_cost=self._step_cost,
        )

    def submit(self, job: Job) -> None:
        if self._broke:
            self._on_deltas([Delta(job.job_id, outcome=Outcome(failure=Failure.ENGINE, message=self._broke))])
        self._commands.put(partial(self._add, job))

    def cancel(self, job_id: str) -> None:
        self._commands.put(partial(self._cancel, job_id, "cancelled"))

    def hand_over(self, job_id: str, ticket: Ticket, *, at_end: bool) -> None:
        self._commands.put(partial(self._hand_over, job_id, ticket, at_end))

    def connect(self, peers: Sequence[KvPeer]) -> None:
        self._service.connect(peers)

    def load(self) -> EngineLoad:
        if self._broke:
            raise EngineError(self._broke)
        service = self._service
        return replace(
            self._load,
            in_flight_bytes=service.in_flight_bytes,
            counts=service.counters.counts(),
            turned_at=self._turned_at,
        )

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
        self._turned_at = time.monotonic()
        for run in self._transfers.hear():
            run.sequence.received()
            self._schedule.add(run.sequence)
        plan = self._schedule.plan(self._prompt_tokens())
        self._prepare(plan)
        if plan.chunks:
            self._compute(plan.chunks)
        self._publish()
        idle_s = TRANSFER_POLL_S if self._transfers.any_open else IDLE_S
        self._take_commands(0.0 if plan.chunks or plan.preempted else idle_s)

    def _prompt_tokens(self) -> int:
        """Of the next step: as many as its decodes leave time for."""
        schedule, now = self._schedule, time.monotonic()
        most = max(0, schedule.max_batched_tokens - len(schedule.decodes))
        prompt = schedule.prompt
        if prompt is None:
            return most
        return self._paced.chunk(prompt.job_id, prompt.left, prompt.computed, self._batch, most, now)

    @property
    def _batch(self) -> Batch:
        decodes = self._schedule.decodes
        return Batch(len(decodes), sum(len(each.tokens) for each in decodes))

    def _take_commands(self, wait_s: float) -> None:
        with suppress(queue.Empty):
            command = self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
            while True:
                command()
                command = self._commands.get_nowait()

    def _publish(self) -> None:
        """The load first: whoever hears of an end finds its blocks free."""
        transfers = self._transfers
        self._load = EngineLoad(
            self._schedule.pool.free,
            transfers.pinned_blocks,
            transfers.quarantined_blocks,
            pace=self._paced.pace(self._batch, time.monotonic()),
            preemptions=self._schedule.preemptions,
        )
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            self._on_deltas(deltas)

    # Jobs come and go ------------------------------------------------------------------------------------------------
    def _add(self, job: Job) -> None:
        refusal, script = self._refusal(job), Script()
        try:
            if refusal is None and isinstance(job, DecodeJob):
                script = script_of(job, self._tokenizer, self._settings)
        except InvalidRequest as error:
            refusal = Outcome(failure=Failure.INVALID, field=error.field, message=error.message)
        if refusal is not None:
            self._deltas.append(Delta(job.job_id, outcome=refusal))
            return
        run = self._admit(job, script)
        if run.output is not None and (over := run.output.outcome(None)) is not None:
            self._end(run, over)
            return
        self._schedule.add(run.sequence)

    def _admit(self, job: Job, script: Script) -> Running:
        output = job.output if isinstance(job, DecodeJob) else ()
        self._arrivals += 1
        waits = isinstance(job, DecodeJob) and job.ticket is not None
        sequence = Scheduled(job.job_id, [*job.prompt, *output], (job.priority, self._arrivals), waits)
        run = Running(job, sequence, side_of(job))
        if isinstance(job, DecodeJob):
            run.output = DecodeOutput(job, self._tokenizer, self._vocabulary, self._max_model_len, script)
        self._jobs[job.job_id] = run
        self._paced.add(job.job_id, job.objectives, waits, time.monotonic())
        self._transfers.add(run)
        return run

    def _refusal(self, job: Job) -> Outcome | None:
        if job.job_id in self._jobs:
            return Outcome(failure=Failure.INVALID, field="job_id", message=f"{job.job_id!r} is running already")
        fault, side = prompt_fault(job, self._max_model_len, self._model.vocab_size), side_of(job)
        fault = fault or request_fault(job, self._settings.loras, self._model.vocab_size)
        if fault is not None or job.ticket is None or side is None:
            return fault
        if self._transfers.in_use(side):
            return not_transferred(f"ticket {side[0]} is in use; a new try takes a new epoch")
        return ticket_fault(job.ticket, side[1], self._rank, self._mode)

    def _cancel(self, job_id: str, message: str) -> None:
        run = self._jobs.get(job_id)
        if run is not None:
            self._end(run, Outcome(failure=Failure.CANCELLED, message=message))

    def _hand_over(self, job_id: str, ticket: Ticket, at_end: bool) -> None:
        run = self._jobs.get(job_id)
        if run is None or not run.decodes or not self._may_offer(ticket):
            return
        if at_end:
            run.leaves_with = ticket
        else:
            self._transfers.hand_over(run, ticket)

    def _may_offer(self, ticket: Ticket) -> bool:
        """Whether a decode's KV can go under this ticket. In pull mode none can: the stock connector offers prompts."""
        fault = ticket_fault(ticket, True, self._rank, self._mode)
        return self._mode is KvMode.PUSH and fault is None and not self._transfers.in_use((key_of(ticket), True))

    def _end(self, run: Running, outcome: Outcome) -> None:
        self._deltas.append(Delta(run.job.job_id, outcome=outcome))
        self._forget(run, failed=outcome.failure is not None)

    def _forget(self, run: Running, failed: bool) -> None:
        """The job is over; its blocks are given back once no transfer holds them."""
        del self._jobs[run.job.job_id]
        self._paced.end(run.job.job_id, run.output.length if run.output is not None else 0)
        self._schedule.remove(run.sequence)
        self._transfers.over(run, failed)

    def _end_all(self, outcome: Outcome) -> None:
        for run in list(self._jobs.values()):
            self._end(run, outcome)
        self._publish()

    # Transfers -------------------------------------------------------------------------------------------------------
    def _on_transfer(self, event: TransferEnded) -> None:
        """Called on the transfer thread."""
        self._tell_transfer(TransferEnd(event.source_side, event.stats, event.reason))
        self._commands.put(partial(self._transfer_ended, event))

    def _transfer_ended(self, event: TransferEnded) -> None:
        run = self._transfers.of(event)
        if run is None:
            return
        if event.error:
            self._end(run, not_transferred(event.error))
            return
        run.stats = event.stats
        if event.source_side and run.computed:
            self._end_prefill(run)

    # One step --------------------------------------------------------------------------------------------------------
    def _prepare(self, plan: Plan) -> None:
        """WRITEs of preempted blocks end before anyone else gets them."""
        self._transfers.preempted([self._jobs[sequence.job_id] for sequence in plan.preempted])
        for sequence in plan.parked:
            self._transfers.claim(self._jobs[sequence.job_id])

    def _compute(self, chunks: Sequence[Chunk]) -> None:
        started, step = time.monotonic(), _step(chunks)
        duration_s = self._latency.step_s(step)
        ready = self._transfers.announce([(self._jobs[chunk.sequence.job_id], chunk.end) for chunk in chunks])
        work = [
            (
                chunk.sequence.table,
                self._kv.segments(chunk.sequence.tokens, chunk.sequence.computed, chunk.end),
                self._jobs[chunk.sequence.job_id].job.lora,
            )
            for chunk in chunks
        ]
        for layer in range(self._model.layers):
            for table, segments, lora in work:
                self._kv.write(layer, table, segments, lora)
            if ready:
                self._pause_until(started + duration_s * (layer + 1) / self._model.layers)
                self._transfers.computed(layer, ready)
        self._pause_until(started + duration_s)
        self._paced.pacer.took(step, time.monotonic() - started)
        for chunk in chunks:
            self._schedule.commit(chunk)
            if chunk.sequence.left == 0:
                self._advance(self._jobs[chunk.sequence.job_id])

    def _advance(self, run: Running) -> None:
        """All its tokens are computed: a prefill is done, a decode makes one more."""
        if run.output is None:
            self._prompt_computed(run)
            return
        read = partial(self._kv.read, run.sequence.table)
        delta = run.output.advance(read(len(run.sequence.tokens)), run.stats)
        delta = replace(delta, prompt_logprobs=run.output.prompt_logprobs(read))
        if delta.outcome is None and run.leaves_with is not None:
            self._transfers.hand_over(run, run.leaves_with)
            delta = replace(delta, outcome=Outcome(failure=Failure.MIGRATED, message="handed over to another worker"))
        self._deltas.append(delta)
        self._paced.made(run.job.job_id, run.output.made, time.monotonic())
        if delta.outcome is None:
            run.sequence.tokens.append(run.output.last_token)
        else:
            self._forget(run, failed=False)

    def _prompt_computed(self, run: Running) -> None:
        run.computed = True
        self._schedule.remove(run.sequence)
        self._deltas.append(Delta(run.job.job_id))
        self._transfers.prompt_computed(run)
        if run.stats is not None or self._mode is KvMode.PULL:
            self._end_prefill(run)

    def _end_prefill(self, run: Running) -> None:
        assert run.job.ticket is not None
        handover = handover_of(run.job.ticket) if self._mode is KvMode.PULL else b""
        self._end(run, Outcome(finish_reason=FinishReason.LENGTH, handover=handover, transfer=run.stats))

    def _pause_until(self, moment: float) -> None:
        """Passes the time that a real engine would compute; a closing worker doesn't wait for it."""
        left_s = moment - time.monotonic()
        if left_s > 0:
            self._closing.wait(left_s)


def _step(chunks: Iterable[Chunk]) -> Step:
    prefills, decodes = [], []
    for chunk in chunks:
        if chunk.decodes:
            decodes.append(chunk.end)
        else:
            prefills.append(PrefillChunk(chunk.tokens, chunk.sequence.computed))
    return Step.of(prefills, decodes)
