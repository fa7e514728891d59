"""The systems that `benchmarks/kv_transfer` compares: their engines, and in which order each dispatches a request.

Used by the benchmark's main thread; a pull's decode job is submitted by the thread that hears of its prefill's end.
"""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.kv_transfer.engines import MeasuredEngine, StockPushEngine
from benchmarks.kv_transfer.figures import Interval, Timing
from benchmarks.remote_engine import Build, Collector, RemoteEngine
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.request import SamplingParams
from splitserve.core.worker import DecodeJob, KvMode, Outcome, PrefillJob, Ticket

DEADLINE_S = 300.0
SETTLE_POLL_S = 0.005
STREAM_PROMPT = tuple(range(300, 316))
STREAM_TOKENS = 60  # before and after what disturbs it
TWO_TOKENS = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)

Prompt = tuple[int, ...]


class Worker:
    """One engine, what it said, and its memory."""

    def __init__(self, name: str, model: Path, settings: VllmSettings, mode: KvMode, build: Build, core: int) -> None:
        self.engine = RemoteEngine(model, settings, KvTransferSettings(mode=mode), name, core, build, "forkserver")
        self.deltas = Collector()

    def start(self) -> None:
        self.info = self.engine.start(lambda deltas: self.deltas.add(deltas, self.engine.told_at))

    def outcome(self, job_id: str) -> Outcome:
        """Raises RuntimeError if the job failed."""
        outcome = self.deltas.outcome(job_id, DEADLINE_S)
        if outcome.failure is not None:
            raise RuntimeError(f"{self.engine.uuid}: {job_id} failed: {outcome.message}")
        return outcome

    def warm_up(self, prompt: Prompt) -> None:
        """Computes without a peer."""
        self.engine.submit(DecodeJob("warm-up", "warm-up", prompt, TWO_TOKENS, DEADLINE_S))
        self.outcome("warm-up")

    def settle(self) -> None:
        """Until no block is held: what the last requests left behind does not run into the next ones."""
        until = time.monotonic() + DEADLINE_S
        while self.engine.load().free_blocks < self.info.total_blocks:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.engine.uuid} holds KV blocks of ended requests")
            threading.Event().wait(SETTLE_POLL_S)

    def moved(self) -> list[Interval]:
        moves: list[Interval] = self.engine.ask("moved")
        return moves

    @contextmanager
    def streaming(self, job_id: str) -> Iterator[None]:
        """A decode beside what happens inside; ended afterwards."""
        self.engine.submit(DecodeJob(job_id, job_id, STREAM_PROMPT, ENDLESS, DEADLINE_S))
        self.deltas.wait_for_tokens(job_id, STREAM_TOKENS)
        try:
            yield
            self.deltas.wait_for_tokens(job_id, len(self.deltas.tokens(job_id)) + STREAM_TOKENS)
        finally:
            self.engine.cancel(job_id)
            self.deltas.outcome(job_id)


class System:
    """Workers that serve together; the last one decodes. `restless`: it burns CPU when idle, so it is stopped then."""

    name: str
    build: Build = MeasuredEngine
    mode = KvMode.PUSH
    roles: tuple[str, ...] = ("prefill", "decode")

    def __init__(self, model: Path, settings: VllmSettings, cores: Sequence[int]) -> None:
        self.workers = [
            Worker(f"{self.name} {role}", model, settings, self.mode, type(self).build, core)
            for role, core in zip(self.roles, cores[-len(self.roles) :], strict=True)
        ]
        self.prefill, self.decode = self.workers[0], self.workers[-1]
        self.restless = False

    def join(self) -> None:
        """All workers have started."""

    def submit(self, job_id: str, prompt: Prompt) -> None:
        raise NotImplementedError

    def serve(self, name: str, prompts: Sequence[Prompt]) -> list[Timing]:
        """Asks for two tokens of each prompt, all at once. Raises RuntimeError if a request fails."""
        asked = {}
        for number, prompt in enumerate(prompts):
            asked[job_id := f"{name}.{number}"] = time.monotonic()
            self.submit(job_id, prompt)
        return [self._timing(job_id, asked_at) for job_id, asked_at in asked.items()]

    def settle(self) -> None:
        for worker in self.workers:
            worker.settle()

    def moved(self) -> list[Interval]:
        """When KV was on its way since the last call."""
        return [move for worker in self.workers for move in worker.moved()]

    @contextmanager
    def awake(self) -> Iterator[None]:
        """A system that burns CPU when idle runs only in here."""
        self.resume()
        try:
            yield
        finally:
            self.rest()

    def resume(self) -> None:
        if self.restless:
            for worker in self.workers:
                worker.engine.resume()

    def rest(self) -> None:
        if self.restless:
            for worker in self.workers:
                worker.engine.pause()

    def close(self) -> None:
        self.resume()
        for worker in self.workers:
            worker.engine.close()

    def _timing(self, job_id: str, asked_at: float) -> Timing:
        prefilled_at, uncovered_s = self._prefilled(job_id)
        self.decode.outcome(job_id)
        first_at, second_at = self.decode.deltas.token_times(job_id)[:2]
        tokens = tuple(self.decode.deltas.tokens(job_id))
        return Timing(asked_at, prefilled_at, first_at, second_at, tokens, uncovered_s)

    def _prefilled(self, job_id: str) -> tuple[float | None, float | None]:
        """When the prompt was computed, and the transfer's uncovered time where it is known."""
        stats = self.prefill.outcome(job_id).transfer
        return self.prefill.deltas.first_at(job_id), stats.uncovered_s if stats is not None else None

    def _start_prefill(self, job_id: str, prompt: Prompt) -> None:
        self.prefill.engine.submit(PrefillJob(job_id, job_id, prompt, self._ticket(job_id), DEADLINE_S))

    def _start_decode(self, job_id: str, prompt: Prompt, handover: bytes = b"") -> None:
        ticket = self._ticket(job_id, handover)
        self.decode.engine.submit(DecodeJob(job_id, job_id, prompt, TWO_TOKENS, DEADLINE_S, ticket=ticket))

    def _ticket(self, job_id: str, handover: bytes = b"") -> Ticket:
        return Ticket(job_id, 1, self.prefill.info.kv_peers, self.decode.info.kv_peers, handover)


class Colocated(System):
    """One engine that does both: the zero that overheads are counted from."""

    name = "colocated"
    roles = ("engine",)

    def submit(self, job_id: str, prompt: Prompt) -> None:
        self.decode.engine.submit(DecodeJob(job_id, job_id, prompt, TWO_TOKENS, DEADLINE_S))

    def _prefilled(self, job_id: str) -> tuple[None, None]:
        return None, None


class LayerPush(System):
    """splitserve's push: the decode job first, connected when the workers join."""

    name = "push"

    def join(self) -> None:
        self.prefill.engine.connect(self.decode.info.kv_peers)
        self.decode.engine.connect(self.prefill.info.kv_peers)

    def submit(self, job_id: str, prompt: Prompt) -> None:
        self._start_decode(job_id, prompt)
        self._start_prefill(job_id, prompt)


class StockPull(System):
    """The decode job needs what the prefill's end tells it."""

    name = "stock pull"
    build = MeasuredEngine
    mode = KvMode.PULL

    def submit(self, job_id: str, prompt: Prompt) -> None:
        def decode(prefilled: Outcome) -> None:
            if prefilled.failure is None:
                self._start_decode(job_id, prompt, prefilled.handover)

        self.prefill.deltas.after(job_id, decode)
        self._start_prefill(job_id, prompt)


class StockPush(System):
    """The decode job first, its best order: its blocks are registered when the prefill ends."""

    name = "stock push"
    build = StockPushEngine
    mode = KvMode.PULL

    def submit(self, job_id: str, prompt: Prompt) -> None:
        self._start_decode(job_id, prompt, self._handover(job_id))
        self._start_prefill(job_id, prompt)

    def _handover(self, job_id: str) -> bytes:
        """What the connector would have told at the prefill's end, as far as it is known before."""
        source = urlsplit(self.prefill.info.kv_peers[0].endpoint)
        return json.dumps(
            {
                "do_remote_prefill": True,
                "remote_engine_id": self.prefill.engine.uuid,
                "remote_request_id": job_id,
                "remote_host": source.hostname,
                "remote_port": source.port,
                "tp_size": 1,
            }
        ).encode()


KINDS: tuple[type[System], ...] = (LayerPush, StockPull, StockPush, Colocated)
