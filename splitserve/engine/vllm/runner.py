"""How vLLM is stepped: by a thread of ours in this process on a CPU, by AsyncLLM in processes of its own otherwise.

Both run every call that is posted, and `on_outputs`, on one thread. They know nothing of jobs.
"""

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from splitserve.core.errors import ConfigError
from splitserve.engine.vllm.requests import VllmRequest
from splitserve.engine.vllm.translate import refusals

IDLE_POLL_S = 1.0
STEPS_PER_NEWS = 2  # one hears that KV has arrived, the next runs the request
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0

OnOutputs = Callable[[Sequence[Any]], None]  # vllm.RequestOutput, of one engine step
OnBroken = Callable[[Exception], None]  # vLLM is beyond use; no call follows
Refuse = Callable[[Exception], None]


class Runner(Protocol):
    """`post` may be called by any thread; the rest only by posted calls and `on_outputs`."""

    vllm_config: Any
    turned_at: float | None  # `EngineLoad`'s

    def post(self, call: Callable[[], None]) -> None: ...

    def add(self, request: VllmRequest, refuse: Refuse) -> None:
        """Starts a request; `refuse` is told if vLLM won't have it."""

    def abort(self, job_id: str) -> None: ...

    def forget_prefixes(self) -> None:
        """Empties the prefix cache (after warming up)."""

    def stop(self) -> None: ...


def start_runner(
    arguments: dict[str, Any],
    in_process: bool,
    core: int | None,
    parked_poll_s: float,
    on_outputs: OnOutputs,
    on_broken: OnBroken,
    loras: Sequence[Any] = (),
) -> Runner:
    """Builds vLLM from EngineArgs; minutes for a large model. `parked_poll_s`: how long an engine in this process waits
    for news when a step had nothing to run. `loras`: LoRARequests, loaded at once, so that one that can't be is found
    now. Raises ConfigError with vLLM's reason."""
    if in_process:
        return InProcessRunner(arguments, core, parked_poll_s, on_outputs, on_broken, loras)
    return AsyncRunner(arguments, on_outputs, on_broken, loras)


class InProcessRunner:
    """LLMEngine stepped by a thread of ours: one process, one core."""

    def __init__(
        self,
        arguments: dict[str, Any],
        core: int | None,
        parked_poll_s: float,
        on_outputs: OnOutputs,
        on_broken: OnBroken,
        loras: Sequence[Any],
    ) -> None:
        self._loras = loras
        self._parked_poll_s = parked_poll_s
        self._on_outputs = on_outputs
        self._on_broken = on_broken
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self.turned_at: float | None = None
        self._fresh_steps = 0  # steps that may still act on news, before there is nothing to do but wait
        self._built: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(arguments, core), name="engine", daemon=True)
        self._thread.start()
        try:
            failure = self._built.get(timeout=START_TIMEOUT_S)
        except queue.Empty:
            failure = TimeoutError(f"not started within {START_TIMEOUT_S:.0f} s")
        if failure is not None:
            raise _start_error(failure) from failure

    def post(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def add(self, request: VllmRequest, refuse: Refuse) -> None:
        try:
            self._engine.add_request(request.job_id, request.prompt, request.params, **request.options)
        except refusals() as error:
            refuse(error)

    def abort(self, job_id: str) -> None:
        self._engine.abort_request([job_id])

    def forget_prefixes(self) -> None:
        self._engine.reset_prefix_cache()

    def stop(self) -> None:
        self.post(self._stop)
        self._thread.join(STOP_TIMEOUT_S)

    def _stop(self) -> None:
        self._stopping = True

    def _run(self, arguments: dict[str, Any], core: int | None) -> None:
        try:
            self._build(arguments, core)
        except Exception as error:  # whatever vLLM raises, the constructor passes it on
            self._built.put(error)
            return
        self._built.put(None)
        try:
            while not self._stopping:
                self._turn()
        except Exception as error:  # whatever breaks vLLM must reach its jobs
            self._on_broken(error)
        self._engine.engine_core.shutdown()

    def _turn(self) -> None:
        self.turned_at = time.monotonic()
        self._run_calls()
        if self._has_work:
            outputs = self._engine.step()
            self._fresh_steps = STEPS_PER_NEWS if outputs else max(0, self._fresh_steps - 1)
            self._on_outputs(outputs)

    def _build(self, arguments: dict[str, Any], core: int | None) -> None:
        import torch

        torch.set_num_threads(1)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        for lora in self._loras:
            self._engine.add_lora(lora)
        self.vllm_config = self._engine.vllm_config
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        if core is not None:  # this thread alone, and now: threads that vLLM and the connector start would inherit it
            os.sched_setaffinity(0, {core})

    @property
    def _has_work(self) -> bool:
        return bool(self._engine.has_unfinished_requests() or self._scheduler.has_requests())

    def _run_calls(self) -> None:
        """Runs what was posted; waits for it if the last step had nothing to run (requests parked for KV, or none)."""
        busy = self._scheduler.running or (self._fresh_steps and self._has_work)
        wait_s = 0.0 if busy else self._parked_poll_s if self._has_work else IDLE_POLL_S
        with contextlib.suppress(queue.Empty):
            call = self._calls.get(timeout=wait_s) if wait_s else self._calls.get_nowait()
            while True:
                self._fresh_steps = STEPS_PER_NEWS
                call()
                call = self._calls.get_nowait()


class AsyncRunner:
    """AsyncLLM on an event loop of its own thread."""

    def __init__(
        self, arguments: dict[str, Any], on_outputs: OnOutputs, on_broken: OnBroken, loras: Sequence[Any]
    ) -> None:
        self._loras = loras
        self._on_outputs = on_outputs
        self._on_broken = on_broken
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._gathered: list[Any] = []
        self.turned_at: float | None = None  # its steps are another process's, which vLLM itself watches
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        try:
            self._llm = self._on_loop(self._build(arguments), START_TIMEOUT_S)
        except Exception as error:  # whatever vLLM raises, the caller must see it
            raise _start_error(error) from error
        self.vllm_config = self._llm.vllm_config

    def post(self, call: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(call)

    def add(self, request: VllmRequest, refuse: Refuse) -> None:
        self._tasks[request.job_id] = self._loop.create_task(self._generate(request, refuse))

    def abort(self, job_id: str) -> None:
        if (task := self._tasks.pop(job_id, None)) is not None:
            task.cancel()  # AsyncLLM aborts the request of a cancelled generator

    def forget_prefixes(self) -> None:
        self._tasks["forget_prefixes"] = self._loop.create_task(self._forget_prefixes())

    def stop(self) -> None:
        self._on_loop(self._shut_down(), STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        self._loop.close()

    def _on_loop(self, work: Any, timeout_s: float) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    async def _build(self, arguments: dict[str, Any]) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        for lora in self._loras:
            await llm.add_lora(lora)
        return llm

    async def _forget_prefixes(self) -> None:
        await self._llm.reset_prefix_cache()
        self._tasks.pop("forget_prefixes", None)

    async def _generate(self, request: VllmRequest, refuse: Refuse) -> None:
        outputs = self._llm.generate(request.prompt, request.params, request.job_id, **request.options)
        try:
            async for output in outputs:
                self._gather(output)
        except refusals() as error:
            refuse(error)
        except Exception as error:  # whatever breaks vLLM must reach its jobs
            self._on_broken(error)
        finally:
            self._tasks.pop(request.job_id, None)

    def _gather(self, output: Any) -> None:
        """The outputs of one engine step become ready in one turn of the loop, so they make one batch."""
        if not self._gathered:
            self._loop.call_soon(self._flush)
        self._gathered.append(output)

    def _flush(self) -> None:
        gathered, self._gathered = self._gathered, []
        self._on_outputs(gathered)

    async def _shut_down(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._llm.shutdown()


def _start_error(error: BaseException) -> ConfigError:
    return ConfigError("engine", f"vLLM could not start: {type(error).__name__}: {error}")
