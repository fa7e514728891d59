"""The engines that `benchmarks/kv_transfer` compares, as their child processes build them.

Each is a `VllmEngine` that notes when NIXL has bytes on their way: where every connector calls NIXL, so that it means
the same for all, from posting a transfer to the call that says it is done. The threads that own the agents write the
notes, the child's main thread reads them; hence the lock. Nothing here is part of splitserve.
"""

import ctypes
import os
import signal
import threading
import time
from typing import Any

from splitserve.engine.protocol import EngineInfo, OnCached, OnDeltas, OnTransfer, uncached, unheard
from splitserve.engine.vllm import VllmEngine

PR_SET_PDEATHSIG = 1  # linux/prctl.h

Interval = tuple[float, float]  # on the monotonic clock


class Moves:
    """When NIXL had transfers on their way in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[Any, float] = {}
        self._done: list[Interval] = []

    def watch(self) -> None:
        """From now on every agent's transfers are noted."""
        from nixl._api import nixl_agent

        post, check = nixl_agent.transfer, nixl_agent.check_xfer_state

        def noted_post(agent: Any, handle: Any, *arguments: Any, **options: Any) -> str:
            began = time.monotonic()
            state: str = post(agent, handle, *arguments, **options)
            self._note(handle, began, state)
            return state

        def noted_check(agent: Any, handle: Any) -> str:
            state: str = check(agent, handle)
            self._note(handle, None, state)
            return state

        nixl_agent.transfer, nixl_agent.check_xfer_state = noted_post, noted_check

    def take(self) -> list[Interval]:
        with self._lock:
            done, self._done = self._done, []
        return done

    def _note(self, handle: Any, posted_at: float | None, state: str) -> None:
        with self._lock:
            began = self._begun.pop(handle, posted_at)
            if began is None:
                return  # seen as done before
            if state == "PROC":
                self._begun[handle] = began
            elif state == "DONE":
                self._done.append((began, time.monotonic()))


class MeasuredEngine(VllmEngine):
    """splitserve's engine as it is, watched."""

    def start(
        self, on_deltas: OnDeltas, on_transfer: OnTransfer = unheard, on_cached: OnCached = uncached
    ) -> EngineInfo:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a paused child would outlive its parent
        os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # vLLM sets it, unless NIXL is imported before
        self._moves = Moves()
        self._moves.watch()
        return super().start(on_deltas, on_transfer, on_cached)

    def moved(self) -> list[Interval]:
        """Transfers that were done since the last call."""
        return self._moves.take()


class StockPushEngine(MeasuredEngine):
    """vLLM's push connector, which splitserve doesn't offer, in the place of its pull connector. To be built with
    `kv_transfer.mode: pull`: the adapter then leaves the connector's parameters to whoever makes the job."""

    def start(
        self, on_deltas: OnDeltas, on_transfer: OnTransfer = unheard, on_cached: OnCached = uncached
    ) -> EngineInfo:
        from benchmarks.kv_transfer.stock_push import StockPushConnector
        from splitserve.kv import connector

        connector.PullConnector = StockPushConnector  # type: ignore[misc]
        return super().start(on_deltas, on_transfer, on_cached)
