"""A `VllmEngine` in a process of its own, driven through a pipe: vLLM's KV connector is one per process. For benchmarks
and tests that time or order what happens below the router."""

import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.errors import ConfigError, EngineError
from splitserve.core.model import ModelInfo
from splitserve.core.worker import Delta, Job, KvPeer, Outcome
from splitserve.engine.protocol import Engine, EngineInfo, EngineLoad, OnDeltas

START_TIMEOUT_S = 240
CALL_TIMEOUT_S = 60


def _serve(pipe: Connection, model: str, settings: VllmSettings, kv: KvTransferSettings, uuid: str, core: int) -> None:
    from splitserve.engine.vllm import VllmEngine

    engine = VllmEngine(ModelInfo.read(model), settings, kv, uuid, core)
    lock = threading.Lock()

    def tell(kind: str, value: object) -> None:
        with lock:
            pipe.send((kind, value))

    try:
        tell("info", engine.start(lambda deltas: tell("deltas", list(deltas))))
    except ConfigError as error:
        tell("refused", str(error))
        return
    while True:
        call, argument = pipe.recv()
        if call == "misread":
            _misread(argument)
        elif call == "sabotage":
            _sabotage(engine)
        elif call == "load":
            tell("load", _load(engine))
        elif call == "close":
            engine.close()
            tell("closed", None)
            return
        else:
            getattr(engine, call)(argument)


def _load(engine: Engine) -> EngineLoad | EngineError:
    try:
        return engine.load()
    except EngineError as error:
        return error


def _sabotage(engine: Any) -> None:
    """From now on vLLM's step raises."""

    def step() -> None:
        raise RuntimeError("sabotaged")

    engine._runner._engine.step = step


def _misread(on: bool) -> None:
    """While on, every WRITE reads block 0 instead of the block it should: a source of foreign KV."""
    from splitserve.kv.nixl import NixlTransport

    def write(self: Any, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        return NixlTransport.true_write(self, peer, layer, [0] * len(source), destination)  # type: ignore[attr-defined]

    if on:
        NixlTransport.true_write = NixlTransport.write  # type: ignore[attr-defined]
        NixlTransport.write = write  # type: ignore[method-assign]
    else:
        NixlTransport.write = NixlTransport.true_write  # type: ignore[attr-defined, method-assign]


@dataclass
class RemoteEngine:
    """An `Engine`. Deltas arrive on a reader thread; a dead child makes every wait fail at once."""

    model: Path
    settings: VllmSettings
    kv: KvTransferSettings
    uuid: str
    core: int
    _answers: dict[str, Any] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _dead: bool = False

    def spawn(self) -> None:
        """Starts the child; `start` then only waits for it, so that several can start at once."""
        self._pipe, child = mp.get_context("spawn").Pipe()
        arguments = (child, str(self.model), self.settings, self.kv, self.uuid, self.core)
        one_rank = self.settings.tensor_parallel_size * self.settings.pipeline_parallel_size == 1
        # A daemon may have no children, and several ranks are children. Such a child ends with the pipe.
        self.process = mp.get_context("spawn").Process(target=_serve, args=arguments, daemon=one_rank)
        self.process.start()
        child.close()

    def start(self, on_deltas: OnDeltas) -> EngineInfo:
        self._on_deltas = on_deltas
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        info = self._answer("info", START_TIMEOUT_S)
        assert isinstance(info, EngineInfo)
        return info

    def submit(self, job: Job) -> None:
        self._pipe.send(("submit", job))

    def cancel(self, job_id: str) -> None:
        self._pipe.send(("cancel", job_id))

    def connect(self, peers: Sequence[KvPeer]) -> None:
        self._pipe.send(("connect", list(peers)))

    @contextmanager
    def misreading(self) -> Iterator[None]:
        """Push mode: what this source writes is not the prompt's KV."""
        self._pipe.send(("misread", True))
        try:
            yield
        finally:
            self._pipe.send(("misread", False))

    def sabotage(self) -> None:
        """Breaks vLLM inside the child."""
        self._pipe.send(("sabotage", None))

    def load(self) -> EngineLoad:
        self._pipe.send(("load", None))
        load = self._answer("load", CALL_TIMEOUT_S)
        if isinstance(load, EngineError):
            raise load
        assert isinstance(load, EngineLoad)
        return load

    def close(self) -> None:
        if not self._dead:
            self._pipe.send(("close", None))
            self._answer("closed", CALL_TIMEOUT_S)
        self.process.join(CALL_TIMEOUT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(CALL_TIMEOUT_S)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def _read(self) -> None:
        while True:
            try:
                kind, value = self._pipe.recv()
            except (EOFError, OSError):
                kind, value = "dead", None
            if kind == "deltas":
                self._on_deltas(value)
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
    """Gathers deltas by job; waits are bounded."""

    def __init__(self) -> None:
        self._deltas: dict[str, list[Delta]] = {}
        self._first_at: dict[str, float] = {}
        self._changed = threading.Condition()

    def __call__(self, deltas: Sequence[Delta]) -> None:
        now = time.monotonic()
        with self._changed:
            for delta in deltas:
                self._first_at.setdefault(delta.job_id, now)
                self._deltas.setdefault(delta.job_id, []).append(delta)
            self._changed.notify_all()

    def first_at(self, job_id: str) -> float:
        """When the job's first delta came, on this process's monotonic clock."""
        with self._changed:
            return self._first_at[job_id]

    def outcome(self, job_id: str, timeout_s: float = 120) -> Outcome:
        with self._changed:
            assert self._changed.wait_for(lambda: self._outcome(job_id) is not None, timeout_s), f"{job_id} hangs"
            outcome = self._outcome(job_id)
        assert outcome is not None
        return outcome

    def wait_for_tokens(self, job_id: str, count: int, timeout_s: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._tokens(job_id)) >= count, timeout_s), f"{job_id} hangs"

    def wait_for_sign(self, job_id: str, timeout_s: float = 60) -> None:
        """Until the job's first delta."""
        with self._changed:
            assert self._changed.wait_for(lambda: job_id in self._deltas, timeout_s), f"{job_id} hangs"

    def tokens(self, job_id: str) -> list[int]:
        with self._changed:
            return self._tokens(job_id)

    def _tokens(self, job_id: str) -> list[int]:
        return [token for delta in self._deltas.get(job_id, []) for token in delta.token_ids]

    def _outcome(self, job_id: str) -> Outcome | None:
        return next((delta.outcome for delta in self._deltas.get(job_id, []) if delta.outcome is not None), None)
