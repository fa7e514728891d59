"""splitserve's KV connectors for vLLM: layer-wise push, and the stock pull.

vLLM builds two halves, often in different processes, and calls both on its step thread. `scheduler.py` watches requests
and writes what a step needs into `StepMetadata`; `worker.py` holds the tensors. The classes here only forward to them.
This package and `engine/vllm` are the only ones that import vLLM.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector

from splitserve.core.config import CudaGraphs, KvTransferSettings
from splitserve.core.parent import ENGINE_CORE, end_with_starter
from splitserve.core.worker import Pace
from splitserve.kv.bridge import Armed, ConnectorEnd, Free, HandOver, Paced, Preempted, ToConnector
from splitserve.kv.connector.grammar import start_grammar
from splitserve.kv.connector.model import group_of, kv_groups, rank_of
from splitserve.kv.connector.scheduler import SchedulerHalf, StepMetadata
from splitserve.kv.connector.versions import CompletionHooks, TransferResults, heads_first_layout, refuse_broken_pull
from splitserve.kv.connector.worker import WorkerHalf

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class Reports:
    """Scheduler half of both connectors: tells the adapter how many blocks are free, also after the last step, who was
    preempted, and how decodes stand."""

    _pool: "BlockPool | None" = None
    _reports: ConnectorEnd | None = None
    _told = -1
    _preempted = 0

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        self._pool = gpu_block_pool

    def _open_reports(self, vllm_config: "VllmConfig") -> None:
        self._reports = ConnectorEnd(vllm_config.kv_transfer_config.get_from_extra_config("bridge", ""), self._hear)

    def _hear(self, message: ToConnector) -> None:
        """Called on the bridge's thread. Most is for the worker halves."""

    def report_pace(self, pace: Pace) -> None:
        """Called by our scheduler (`engine/vllm/scheduler`)."""
        assert self._reports is not None
        self._reports.tell(Paced(pace))

    def _report_preempted(self, output: "SchedulerOutput") -> None:
        if output.preempted_req_ids:
            assert self._reports is not None
            self._preempted += len(output.preempted_req_ids)
            self._reports.tell(Preempted(self._preempted))

    def _report_free(self) -> None:
        assert self._pool is not None
        assert self._reports is not None
        free = self._pool.get_num_free_blocks()
        if free != self._told:
            self._told = free
            self._reports.tell(Free(free))

    @property
    def _unreported(self) -> bool:
        return self._pool is not None and self._pool.get_num_free_blocks() != self._told


class PushConnector(Reports, CompletionHooks, KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Layer-wise push (kv_transfer.mode: push)."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.get_from_extra_config
        groups = kv_groups(kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            end_with_starter(ENGINE_CORE)  # or this process and its ranks keep the worker's devices and ports
            self._scheduler = SchedulerHalf(groups)
            self._open_reports(vllm_config)
        else:
            settings = KvTransferSettings.model_validate(extra("settings", {}))
            uuid, fingerprint, bridge = (extra(name, "") for name in ("uuid", "fingerprint", "bridge"))
            self._worker = WorkerHalf(
                settings,
                uuid,
                fingerprint,
                groups[0].block_size,
                rank_of(vllm_config),
                lambda name: group_of(kv_cache_config, name),
                bridge,
            )

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Full graphs for decode-only batches leave every prefill's layer hooks alone, so nothing requires it."""
        settings = KvTransferSettings.model_validate(extra_config.get("settings", {}))
        return settings.cuda_graphs is CudaGraphs.PIECEWISE

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str:
        return heads_first_layout()

    # Scheduler half
    def _hear(self, message: ToConnector) -> None:
        if isinstance(message, HandOver):
            self._scheduler.hand_over(message)
            if message.at_end and self._reports is not None:
                self._reports.tell(Armed(message.job_id))

    def on_new_request(self, request: "Request") -> None:
        start_grammar(request)
        self._scheduler.admit(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        return self._scheduler.external_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        self._scheduler.claim(request, blocks, num_external_tokens)

    def get_loaded_kv_cache_group_ids(self, request: "Request") -> tuple[int, ...]:
        groups: tuple[int, ...] = self._kv_cache_config.transfer_group_ids
        return groups

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> StepMetadata:
        self._report_free()
        self._report_preempted(scheduler_output)
        return self._scheduler.step(scheduler_output)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, None]:
        return self._scheduler.finish(request, (block_ids,)), None

    def request_finished_all_groups(self, request: "Request", block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        return self._scheduler.finish(request, block_ids), None

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self._scheduler.reported(tuple(connector_output.finished_sending or ()))

    def has_pending_push_work(self) -> bool:
        return self._scheduler.busy or self._unreported

    # Worker half
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._worker.begin(connector_metadata)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self._worker.drain(kv_connector_metadata)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        self._worker.save(self._get_connector_metadata(), layer_name)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to start: sources write on their own."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs only after all its KV is there."""

    def wait_for_save(self) -> None:
        """Not called in every step by every release: `_completions` does what is due."""

    def _completions(self) -> TransferResults:
        self._worker.settle(self._get_connector_metadata())
        return self._worker.results()

    def _loading(self) -> Collection[str]:
        return self._worker.loading

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER:
            self._worker.close()
        elif self._reports is not None:
            self._reports.close()


class PullConnector(Reports, NixlPullConnector):  # type: ignore[misc]
    """vLLM's stock pull connector (kv_transfer.mode: pull), which also reports free blocks and starts grammars."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        refuse_broken_pull()
        super().__init__(vllm_config, role, kv_cache_config)
        self._extra = vllm_config.kv_transfer_config.get_from_extra_config
        if role == KVConnectorRole.SCHEDULER:
            self._open_reports(vllm_config)

    def on_new_request(self, request: "Request") -> None:
        start_grammar(request)
        super().on_new_request(request)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        self._report_free()
        self._report_preempted(scheduler_output)
        return super().build_connector_meta(scheduler_output)

    def has_pending_push_work(self) -> bool:
        return super().has_pending_push_work() or self._unreported
