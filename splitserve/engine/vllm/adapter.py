"""One engine job's life inside vLLM: what is asked of vLLM, and what its outputs mean to a router.

The runner's thread owns the job table; `submit`, `cancel` and what the connector reports are posted to it. Text, stop
strings and tool calls are the work of vLLM's own detokeniser and parsers, run here (`output.py`) so that a resumed
request can replay what its client has.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.errors import EngineError, InvalidRequest
from splitserve.core.model import ModelInfo
from splitserve.core.request import FinishReason
from splitserve.core.worker import (
    DecodeJob,
    Delta,
    Failure,
    Job,
    KvFormat,
    KvMode,
    KvPeer,
    Outcome,
    PrefillJob,
    Ticket,
    TransferEnd,
    TransferStats,
)
from splitserve.engine.nodes.channel import VERDICT_S
from splitserve.engine.nodes.leader import LeaderEnd
from splitserve.engine.protocol import EngineInfo, EngineLoad, OnCached, OnDeltas, OnTransfer, uncached, unheard
from splitserve.engine.vllm.arguments import (
    engine_arguments,
    prepare_environment,
    ranks_of,
    side_channel,
    step_cost_of,
)
from splitserve.engine.vllm.cache_events import CacheListener, follows_cache
from splitserve.engine.vllm.connector_state import ConnectorState
from splitserve.engine.vllm.output import Output
from splitserve.engine.vllm.parsing import Parsers
from splitserve.engine.vllm.ranks import end_processes
from splitserve.engine.vllm.requests import Requests, VllmRequest
from splitserve.engine.vllm.runner import Runner, start_runner
from splitserve.engine.vllm.sampler_state import restorable
from splitserve.engine.vllm.translate import (
    STRUCTURED_OUTPUT,
    field_of,
    logprobs_of,
    lora_requests,
    refusals,
    tokenizer,
)
from splitserve.engine.vllm.warm import warm_up
from splitserve.kv.bridge import AdapterEnd, Connect, HandOver, ToConnector
from splitserve.kv.layout import block_bytes, part_of
from splitserve.kv.transfer import TransferKey
from splitserve.latency.model import LatencyModel

PARKED_POLL_S = {KvMode.PUSH: 0.05, KvMode.PULL: 0.001}  # our connector rings when KV has come, the stock one never
NULL_BLOCKS = 1  # vLLM keeps one block as padding


@dataclass(slots=True)
class _Running:
    """One job inside vLLM; `output`: a decode's. `constrained`: a grammar is being compiled for it."""

    job: Job
    key: TransferKey | None
    output: Output | None = None
    constrained: bool = False
    prefilled: bool = False
    stats: TransferStats | None = None

    @property
    def made(self) -> int:
        """Output tokens made here."""
        return self.output.sent - len(self.job.output) if isinstance(self.job, DecodeJob) and self.output else 0


class VllmEngine:
    """See `Engine`. `cpu_core` pins an in-process engine to one core. `latency`: what its steps take; without it, or
    with another scheduler than ours, prompts are read without regard to objectives. `nodes`: the other machines that it
    spans; all of them have joined before it starts."""

    def __init__(
        self,
        model: ModelInfo,
        settings: VllmSettings,
        kv: KvTransferSettings,
        worker_uuid: str,
        cpu_core: int | None = None,
        latency: LatencyModel | None = None,
        nodes: LeaderEnd | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._kv = kv
        self._uuid = worker_uuid
        self._cpu_core = cpu_core
        self._step_cost = step_cost_of(settings, latency)
        self._nodes = nodes
        self._jobs: dict[str, _Running] = {}
        self._by_key: dict[TransferKey, str] = {}
        self._moving: dict[str, TransferKey] = {}  # jobs that stop once the connector is ready to keep their KV
        self._connector = ConnectorState(ranks_of(settings), self._hear_ended, self._hear_armed)
        self._broken: Exception | None = None
        self._closing = ExitStack()  # what `close` ends, however far `start` came

    def start(
        self, on_deltas: OnDeltas, on_transfer: OnTransfer = unheard, on_cached: OnCached = uncached
    ) -> EngineInfo:
        """See `Engine`. Imports vLLM (11 s on an idle machine), builds it, warms it up."""
        try:
            return self._start(on_deltas, on_transfer, on_cached)
        except Exception as error:  # whatever it is, it may come of a node that is gone
            self._broken = self._cause_of(error)
            raise self._broken from error

    def _start(self, on_deltas: OnDeltas, on_transfer: OnTransfer, on_cached: OnCached) -> EngineInfo:
        nodes = self._nodes.settings if self._nodes is not None else None
        prepare_environment(self._kv.host, ranks_of(self._settings), nodes.count if nodes is not None else 1)
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        in_process = on_cpu and ranks_of(self._settings) == 1
        self._on_transfer = on_transfer
        self._bridge = AdapterEnd(self._connector.hear)
        self._closing.callback(self._bridge.close)
        arguments = engine_arguments(
            self._model, self._settings, self._kv, self._uuid, self._bridge.address, on_cpu, self._step_cost, nodes
        )
        if follows_cache(self._settings):
            listener = CacheListener(self._bridge.beside("cached"), self._bridge.beside("cached-before"), on_cached)
            self._closing.callback(listener.close)
            listener.start()
            arguments["kv_events_config"] = listener.config()
        self._tokenizer = tokenizer(str(self._model.path))
        self._parsers = Parsers(self._settings, self._tokenizer)
        self._loras = lora_requests(self._settings.loras)
        if self._nodes is not None:
            self._nodes.listen(self._connector.hear, lambda lost: end_processes())
            if lost := self._nodes.lost_within(0):
                raise EngineError(lost)
        self._runner: Runner = start_runner(
            arguments,
            in_process,
            self._cpu_core,
            PARKED_POLL_S[self._kv.mode],
            self._on_outputs,
            self._on_broken,
            tuple(self._loras.values()),
        )
        self._closing.callback(self._runner.stop)
        self._max_model_len = self._runner.vllm_config.model_config.max_model_len
        self._restorable = restorable(self._runner.vllm_config)
        self._requests = Requests(self._max_model_len, self._kv.mode, self._restorable, self._loras)
        self._warm_up()
        info = self._describe()
        self._connector.wait_until_free(info.total_blocks)
        self._on_deltas = on_deltas
        return info

    def submit(self, job: Job) -> None:
        self._runner.post(lambda: self._add(job))

    def cancel(self, job_id: str) -> None:
        self._runner.post(lambda: self._cancel(job_id))

    def hand_over(self, job_id: str, ticket: Ticket, *, at_end: bool) -> None:
        self._runner.post(lambda: self._hand_over(job_id, ticket, at_end))

    def connect(self, peers: Sequence[KvPeer]) -> None:
        if self._kv.mode is KvMode.PUSH:
            self._tell(Connect(list(peers)))

    def load(self) -> EngineLoad:
        if self._nodes is not None and (lost := self._nodes.lost_within(0)):
            raise EngineError(lost)
        if self._broken is not None:
            raise EngineError(f"vLLM is beyond use: {type(self._broken).__name__}: {self._broken}") from self._broken
        return replace(self._connector.load, turned_at=self._runner.turned_at)

    def close(self) -> None:
        if self._nodes is not None:  # first, so that their ranks do not take ours for broken
            self._nodes.close(str(self._broken or ""))
        self._closing.close()

    def _tell(self, message: ToConnector) -> None:
        """To every half of the connector, wherever it is."""
        self._bridge.tell(message)
        if self._nodes is not None:
            self._nodes.tell(message)

    def _cause_of(self, error: Exception) -> Exception:
        """A node that is gone, if one is: vLLM may say first that something is wrong."""
        lost = self._nodes.lost_within(VERDICT_S) if self._nodes is not None else ""
        return EngineError(lost) if lost else error

    def _warm_up(self) -> None:
        ended: SimpleQueue[Delta] = SimpleQueue()

        def keep_last(deltas: Sequence[Delta]) -> None:
            for delta in deltas:
                if delta.outcome is not None:
                    ended.put(delta)

        self._on_deltas = keep_last
        warm_up(self.submit, ended, self._model.vocab_size, self._max_model_len)
        self._runner.post(self._runner.forget_prefixes)

    def _describe(self) -> EngineInfo:
        config = self._runner.vllm_config
        if self._kv.mode is KvMode.PULL:
            kv_format = _stock_format(self._model, config)
            whole = part_of(0, 1, kv_format.kv_heads, 0, kv_format.layers)
            peers: tuple[KvPeer, ...] = (KvPeer(self._uuid, side_channel(), whole),)
        else:
            kv_format, peers = self._connector.wait_for_ranks()
        return EngineInfo(
            uuid=self._uuid,
            kind="vllm",
            kv=kv_format,
            kv_peers=peers,
            total_blocks=config.cache_config.num_gpu_blocks - NULL_BLOCKS,
            max_sequences=config.scheduler_config.max_num_seqs,
            max_model_len=self._max_model_len,
            max_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            restores=tuple(sorted(self._restorable)),
            loras=tuple(self._loras),
            step_cost=self._step_cost,
        )

    # On the runner's thread ------------------------------------------------------------------------------------------
    def _add(self, job: Job) -> None:
        output = job.output if isinstance(job, DecodeJob) else ()
        count = len(job.prompt) + len(output)
        if not 0 < count < self._max_model_len:
            sentence = f"has {count} tokens; this worker takes 1 to {self._max_model_len - 1}"
            self._refuse(job.job_id, "prompt", sentence)
            return
        try:
            model_config = self._runner.vllm_config.model_config
            parser = self._parsers.of(job, model_config) if isinstance(job, DecodeJob) else None
            request = self._requests.of(job, parser)
            made = Output(self._tokenizer, job, parser) if isinstance(job, DecodeJob) else None
        except InvalidRequest as error:
            self._refuse(job.job_id, error.field, error.message)
            return
        except refusals() as error:
            self._refuse(job.job_id, "sampling", str(error))
            return
        except EngineError as error:
            self._end(job.job_id, Outcome(failure=Failure.ENGINE, message=str(error)))
            return
        key = TransferKey(job.ticket.transfer_id, job.ticket.epoch) if job.ticket is not None else None
        if key in self._by_key:
            self._refuse(job.job_id, "ticket", f"ticket {key} is in use by another job")
            return
        self._jobs[job.job_id] = _Running(job, key, made, request.params.structured_outputs is not None)
        if key is not None:
            self._by_key[key] = job.job_id
        self._runner.add(request, lambda error: self._refuse_for(error, request))

    def _refuse_for(self, error: Exception, request: VllmRequest) -> None:
        field = field_of(error, request.params, self._runner.vllm_config, self._tokenizer)
        running = self._jobs.get(request.job_id)
        if running is not None and field == STRUCTURED_OUTPUT:
            field = _grammar_field(running.job)
        self._refuse(request.job_id, field, str(error))

    def _cancel(self, job_id: str) -> None:
        if self._forget(job_id) is not None:
            self._runner.abort(job_id)
            self._end(job_id, Outcome(failure=Failure.CANCELLED, message="cancelled"))

    def _hand_over(self, job_id: str, ticket: Ticket, at_end: bool) -> None:
        running = self._jobs.get(job_id)
        if running is None or running.output is None or not running.made:
            return  # nothing is decoded yet, or not any more
        key = TransferKey(ticket.transfer_id, ticket.epoch)
        self._tell(HandOver(job_id, key.transfer_id, key.epoch, ticket.destination, at_end))
        if at_end:
            self._moving[job_id] = key

    def _on_armed(self, job_id: str) -> None:
        """The connector keeps this job's KV when it ends now, between two steps."""
        key = self._moving.pop(job_id, None)
        if key is None or self._forget(job_id) is None:
            return
        self._connector.handed_over(key)
        self._runner.abort(job_id)
        self._end(job_id, Outcome(failure=Failure.MIGRATED, message="handed over to another worker"))

    def _on_outputs(self, outputs: Sequence[Any]) -> None:
        """One engine step: at most one batch of deltas."""
        deltas = [delta for output in outputs if (delta := self._delta(output)) is not None]
        if deltas:
            self._on_deltas(deltas)

    def _delta(self, output: Any) -> Delta | None:
        running = self._jobs.get(output.request_id)
        if running is None:
            return None
        if output.outputs[0].finish_reason in ("error", "abort"):
            return self._failed(running)
        if isinstance(running.job, PrefillJob):
            return self._prefill_delta(running, output) if output.finished else None
        return self._decode_delta(running, output)

    def _on_broken(self, error: Exception) -> None:
        """Every job fails; `load` tells the worker, which ends so that it is replaced."""
        cause = self._broken = self._cause_of(error)
        jobs, self._jobs = list(self._jobs), {}
        self._by_key.clear()
        for job_id in jobs:
            self._end(job_id, Outcome(failure=Failure.ENGINE, message=f"vLLM broke: {cause}"))

    def _failed(self, running: _Running) -> Delta:
        self._forget(running.job.job_id)
        if running.key is None and running.constrained and not running.made:
            sentence = "vLLM can't compile it, or the output so far does not keep to it"
            outcome = Outcome(failure=Failure.INVALID, field=_grammar_field(running.job), message=sentence)
        elif running.key is None:
            outcome = Outcome(failure=Failure.ENGINE, message="vLLM ended the request with an error")
        else:
            outcome = Outcome(failure=Failure.TRANSFER, message="the KV did not arrive")
        return Delta(running.job.job_id, outcome=outcome)

    def _prefill_delta(self, running: _Running, output: Any) -> Delta:
        """The prompt is computed; the outcome goes along if its KV is sent already, or is the puller's affair."""
        running.prefilled = True
        if self._kv.mode is KvMode.PUSH:
            return Delta(running.job.job_id, outcome=self._sent(running))
        self._forget(running.job.job_id)
        handover = json.dumps(output.kv_transfer_params or {}).encode()
        return Delta(running.job.job_id, outcome=Outcome(finish_reason=FinishReason.LENGTH, handover=handover))

    def _sent(self, running: _Running) -> Outcome | None:
        """A prefill's outcome, once its prompt is computed and its KV is sent."""
        if running.stats is None or not running.prefilled:
            return None
        self._forget(running.job.job_id)
        return Outcome(finish_reason=FinishReason.LENGTH, transfer=running.stats)

    def _decode_delta(self, running: _Running, output: Any) -> Delta:
        assert running.output is not None
        completion, index = output.outputs[0], running.output.sent
        try:
            tokens, parsed, finish = running.output.take(list(completion.token_ids), completion.finish_reason)
        except EngineError as error:
            self._forget(running.job.job_id)
            self._runner.abort(running.job.job_id)
            return Delta(running.job.job_id, outcome=Outcome(failure=Failure.ENGINE, message=str(error)))
        outcome = None
        if finish is not None:
            outcome = Outcome(finish_reason=finish, transfer=running.stats)
            self._forget(running.job.job_id)
            if not completion.finish_reason:
                self._runner.abort(running.job.job_id)
        return Delta(
            running.job.job_id,
            index,
            tuple(tokens),
            parsed.text,
            logprobs_of(completion.logprobs)[: len(tokens)],
            outcome,
            parsed.reasoning,
            parsed.tool_calls,
            logprobs_of(output.prompt_logprobs),
        )

    def _on_ended(self, key: TransferKey, end: TransferEnd, error: str) -> None:
        """One side of a transfer is over."""
        running = self._jobs.get(self._by_key.get(key, ""))
        if running is None:
            return
        running.stats = end.stats
        job_id = running.job.job_id
        if error:
            self._forget(job_id)
            self._runner.abort(job_id)
            self._end(job_id, Outcome(failure=Failure.TRANSFER, message=error))
        elif end.source_side and (outcome := self._sent(running)) is not None:
            self._end(job_id, outcome)

    def _refuse(self, job_id: str, field: str, message: str) -> None:
        self._forget(job_id)
        self._end(job_id, Outcome(failure=Failure.INVALID, field=field, message=message))

    def _end(self, job_id: str, outcome: Outcome) -> None:
        self._on_deltas([Delta(job_id, outcome=outcome)])

    def _forget(self, job_id: str) -> _Running | None:
        running = self._jobs.pop(job_id, None)
        if running is not None and running.key is not None:
            self._by_key.pop(running.key, None)
        return running

    # On the bridge's thread ------------------------------------------------------------------------------------------
    def _hear_ended(self, key: TransferKey, end: TransferEnd, error: str) -> None:
        self._on_transfer(end)
        self._runner.post(lambda: self._on_ended(key, end, error))

    def _hear_armed(self, job_id: str) -> None:
        self._runner.post(lambda: self._on_armed(job_id))


def _grammar_field(job: Job) -> str:
    """What its grammar was made of."""
    of_tools = isinstance(job, DecodeJob) and job.sampling.structured_output is None
    return "messages.tools" if of_tools else STRUCTURED_OUTPUT


def _stock_format(model: ModelInfo, config: Any) -> KvFormat:
    """Pull mode: the stock connector compares layouts itself; ours says what the model implies."""
    block_size, dtype = config.cache_config.block_size, config.model_config.dtype
    return KvFormat(
        model_fingerprint=model.fingerprint,
        dtype=str(dtype).removeprefix("torch."),
        block_size=block_size,
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        block_bytes=block_bytes(block_size, model.kv_heads, model.head_dim, dtype.itemsize),
        mode=KvMode.PULL,
        transport="nixl",
    )
