"""Engines that write down each of their steps, for a process of their own (`benchmarks/remote_engine`)."""

from typing import Any

from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.model import ModelInfo
from splitserve.engine.protocol import EngineInfo, OnCached, OnDeltas, OnTransfer, uncached, unheard
from splitserve.engine.vllm import VllmEngine
from splitserve.latency.linear import LinearLatency

LATENCY = LinearLatency(fixed_s=1e-4, prefill_token_s=1e-6, decode_token_s=1e-6)  # no machine is so fast


class Watched(VllmEngine):
    """One in this process, which writes down each of its steps."""

    def start(
        self, on_deltas: OnDeltas, on_transfer: OnTransfer = unheard, on_cached: OnCached = uncached
    ) -> EngineInfo:
        info = super().start(on_deltas, on_transfer, on_cached)
        self._steps: list[dict[str, int]] = []
        scheduler = self._vllm
        schedule = scheduler.schedule

        def watched(*arguments: Any, **named: Any) -> Any:
            output = schedule(*arguments, **named)
            self._steps.append(dict(output.num_scheduled_tokens))
            return output

        scheduler.schedule = watched
        return info

    def steps(self) -> list[dict[str, int]]:
        """Tokens by vLLM's name of the request."""
        return list(self._steps)

    def scheduler(self) -> str:
        """Its class."""
        return type(self._vllm).__name__

    @property
    def _vllm(self) -> Any:
        return self._runner._scheduler  # type: ignore[attr-defined]


def paced(model: ModelInfo, settings: VllmSettings, kv: KvTransferSettings, uuid: str, core: int) -> VllmEngine:
    return Watched(model, settings, kv, uuid, core, LATENCY)


def plain(model: ModelInfo, settings: VllmSettings, kv: KvTransferSettings, uuid: str, core: int) -> VllmEngine:
    return Watched(model, settings, kv, uuid, core)


def paced_in_processes(
    model: ModelInfo, settings: VllmSettings, kv: KvTransferSettings, uuid: str, core: int
) -> VllmEngine:
    """Of several ranks: its scheduler is out of sight."""
    return VllmEngine(model, settings, kv, uuid, core, LATENCY)


def paced_async(model: ModelInfo, settings: VllmSettings, kv: KvTransferSettings, uuid: str, core: int) -> VllmEngine:
    """vLLM's CPU platform turns asynchronous scheduling off, though its engine core and runner are up to it."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_leave_asynchronous(platform: Any, vllm_config: Any) -> None:
        check(platform, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_leave_asynchronous)
    return Watched(model, settings, kv, uuid, core, LATENCY)
