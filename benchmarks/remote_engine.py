"""A `VllmEngine` in a process of its own, driven through a pipe: vLLM's KV connector is one per process. For benchmarks
and tests that time or order what happens below the router."""

import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.errors import ConfigError, EngineError
from splitserve.core.model import ModelInfo
from splitserve.core.worker import Delta, Job, KvPeer, Outcome, Ticket
from splitserve.engine.protocol import Engine, EngineInfo, EngineLoad, OnCached, OnDeltas, OnTransfer, uncached, unheard
from splitserve.engine.vllm import VllmEngine

START_TIMEOUT_S = 240
CALL_TIMEOUT_S = 60

Build = Callable[[ModelInfo, VllmSettings, KvTransferSettings, str, int], Engine]  # importable by the child


def _serve(
    pipe: Connection, build: Build, model: str, settings: VllmSettings, kv: KvTransferSettings, uuid: str, core: int
) -> None:
    engine = build(ModelInfo.read(model), settings, kv, uuid, core)
    lock = threading.Lock()

    def tell(kind: str, value: object) -> None:
        with lock:
            pipe.send((kind, value))

    try:
        info = engine.start(
            lambda deltas: tell("deltas", (time.monotonic(), list(deltas))),
            lambda end: tell("transfer", end),
            lambda events: tell("cached", list(events)),
        )
        tell("info", info)
    except ConfigError as error:
        tell("refused", str(error))
        return
    while True:
        call, arguments, options = pipe.recv()
        if call == "close":
            engine.close()
            tell("closed", None)
            return
        if call == "ask":
            tell("answer", _ask(engine, *arguments))
        elif call in FAULTS:
            FAULTS[call](engine, *arguments)
        else:
            getattr(engine, call)(*arguments, **options)


def _ask(engine: Engine, question: str) -> object:
    try:
        return getattr(engine, question)()
    except EngineError as error:
        return error


def _sabotage(engine: Engine) -> None:
    """From now on vLLM's step raises."""

    def step() -> None:
        raise RuntimeError("sabotaged")

    engine._runner._engine.step = step  # type: ignore[attr-defined]


def _misread(engine: Engine, on: bool) -> None:
    """While on, every WRITE reads block 0 instead of the block it should: a source of foreign KV."""
    from splitserve.kv.nixl import NixlTransport

    def write(self: Any, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        return NixlTransport.true_write(self, peer, layer, [0] * len(source), destination)  # type: ignore[attr-defined]

    if on:
        NixlTransport.true_write = NixlTransport.write  # type: ignore[attr-defined]
        NixlTransport.write = write  # type: ignore[method-assign]
    else:
        NixlTransport.write = NixlTransport.true_write  # type: ignore[attr-defined, method-assign]


FAULTS: dict[str, Callable[..., None]] = {"misread": _misread, "sabotage": _sabotage}


@dataclass
class RemoteEngine:
    """An `Engine`. Deltas arrive on a reader thread; a dead child makes every wait fail at once. `told_at`: when the
    child's engine made the deltas being delivered, on the monotonic clock that all processes of a machine share."""

    model: Path
    settings: VllmSettings
    kv: KvTransferSettings
    uuid: str
    core: int
    build: Build = VllmEngine
    method: str = "spawn"  # of starting the child
    told_at: float = 0.0
    _sending: threading.Lock = field(default_factory=threading.Lock)
    _answers: dict[str, Any] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _dead: bool = False

    def spawn(self) -> None:
        """Starts the child; `start` then only waits for it, so that several can start at once."""
        context: Any = mp.get_context(self.method)
        self._pipe, child = context.Pipe()
        arguments = (child, self.build, str(self.model), self.settings, self.kv, self.uuid, self.core)
        one_rank = self.settings.tensor_parallel_size * self.settings.pipeline_parallel_size == 1
        # A daemon may have no children, and several ranks are children. Such a child ends with the pipe.
        self.process = context.Process(target=_serve, args=arguments, daemon=one_rank)
        self.process.start()
        child.close()

    def start(
        self, on_deltas: OnDeltas, on_transfer: OnTransfer = unheard, on_cached: OnCached = uncached
    ) -> EngineInfo:
        self._on_deltas, self._on_transfer, self._on_cached = on_deltas, on_transfer, on_cached
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        info = self._answer("info", START_TIMEOUT_S)
        assert isinstance(info, EngineInfo)
        return info

    def submit(self, job: Job) -> None:
        self._send("submit", job)

    def cancel(self, job_id: str) -> None:
        self._send("cancel", job_id)

    def hand_over(self, job_id: str, ticket: Ticket, *, at_end: bool) -> None:
        self._send("hand_over", job_id, ticket, at_end=at_end)

    def connect(self, peers: Sequence[KvPeer]) -> None:
        self._send("connect", list(peers))

    @contextmanager
    def misreading(self) -> Iterator[None]:
        """Push mode: what this source writes is not the prompt's KV."""
        self._send("misread", True)
        try:
            yield
        finally:
            self._send("misread", False)

    def sabotage(self) -> None:
        """Breaks vLLM inside the child."""
        self._send("sabotage")

    def load(self) -> EngineLoad:
        load = self.ask("load")
        assert isinstance(load, EngineLoad)
        return load

    def ask(self, question: str) -> Any:
        """What the engine's method of this name returns. One question at a time."""
        self._send("ask", question)
        answer = self._answer("answer", CALL_TIMEOUT_S)
        if isinstance(answer, EngineError):
            raise answer
        return answer

    def close(self) -> None:
        if not self._dead:
            self._send("close")
            self._answer("closed", CALL_TIMEOUT_S)
        self.process.join(CALL_TIMEOUT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(CALL_TIMEOUT_S)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def _send(self, call: str, *arguments: object, **options: object) -> None:
        with self._sending:  # a delta's reader may submit what follows from it
            self._pipe.send((call, arguments, options))

    def _read(self) -> None:
        while True:
            try:
                kind, value = self._pipe.recv()
            except (EOFError, OSError):
                kind, value = "dead", None
            if kind == "deltas":
                self.told_at, deltas = value
                self._on_deltas(deltas)
                continue
            if kind == "transfer":
                self._on_transfer(value)
                continue
            if kind == "cached":
                self._on_cached(value)
                continue
            with self._changed:
                self._dead = kind in ("dead", "closed")
                self._answers[kind] = value
                self._changed.notify_all()
            if self._dead:
                return

    def _answer(self, kind: str, timeout_s: float) -> Any:
        with self._changed:
            if not self._changed.wait_for(lambda: kind in self._answers or self._dead, timeout_s):
                raise TimeoutError(f"no {kind} within {timeout_s} s")
            if kind not in self._answers:
                raise RuntimeError(self._answers.get("refused", f"the engine process ended without {kind}"))
            return self._answers.pop(kind)


class Collector:
    """Gathers deltas by job; waits end in a TimeoutError. What follows from a job's end is called on
    the thread that tells it."""

    def __init__(self) -> None:
        self._deltas: dict[str, list[tuple[float, Delta]]] = {}
        self._after: dict[str, Callable[[Outcome], None]] = {}
        self._changed = threading.Condition()

    def __call__(self, deltas: Sequence[Delta]) -> None:
        self.add(deltas, time.monotonic())

    def add(self, deltas: Sequence[Delta], at: float) -> None:
        with self._changed:
            for delta in deltas:
                self._deltas.setdefault(delta.job_id, []).append((at, delta))
            self._changed.notify_all()
        for delta in deltas:
            if delta.outcome is not None and (call := self._after.pop(delta.job_id, None)) is not None:
                call(delta.outcome)

    def after(self, job_id: str, call: Callable[[Outcome], None]) -> None:
        """To be set before the job is submitted."""
        self._after[job_id] = call

    def first_at(self, job_id: str) -> float:
        """When the job's first delta came."""
        with self._changed:
            return self._deltas[job_id][0][0]

    def token_times(self, job_id: str) -> list[float]:
        with self._changed:
            return [at for at, delta in self._deltas.get(job_id, []) for _ in delta.token_ids]

    def outcome(self, job_id: str, timeout_s: float = 120) -> Outcome:
        with self._changed:
            self._wait(lambda: self._outcome(job_id) is not None, job_id, timeout_s)
            outcome = self._outcome(job_id)
        assert outcome is not None
        return outcome

    def wait_for_tokens(self, job_id: str, count: int, timeout_s: float = 60) -> None:
        with self._changed:
            self._wait(lambda: len(self._tokens(job_id)) >= count, job_id, timeout_s)

    def wait_for_sign(self, job_id: str, timeout_s: float = 60) -> None:
        """Until the job's first delta."""
        with self._changed:
            self._wait(lambda: job_id in self._deltas, job_id, timeout_s)

    def tokens(self, job_id: str) -> list[int]:
        with self._changed:
            return self._tokens(job_id)

    def _wait(self, holds: Callable[[], bool], job_id: str, timeout_s: float) -> None:
        if not self._changed.wait_for(holds, timeout_s):
            raise TimeoutError(f"{job_id} hangs")

    def _tokens(self, job_id: str) -> list[int]:
        return [token for _, delta in self._deltas.get(job_id, []) for token in delta.token_ids]

    def _outcome(self, job_id: str) -> Outcome | None:
        told = self._deltas.get(job_id, [])
        return next((delta.outcome for _, delta in told if delta.outcome is not None), None)
