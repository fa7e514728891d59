"""vLLM's stock push connector, used in the benchmark's child processes only.

It adds what splitserve's engine adapter needs of any connector: how many blocks are free. Its two sides find each other
by the request's id alone, so a prefill job and its decode job must have the same one; where they differ it waits for
ever and says nothing.
"""

from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPushConnector

from splitserve.kv.connector import Reports

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig


class StockPushConnector(Reports, NixlPushConnector):  # type: ignore[misc]
    """Transfers the whole prompt when its prefill has ended; the decode side registers its blocks before."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self._open_reports(vllm_config)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        self._report_free()
        return super().build_connector_meta(scheduler_output)

    def has_pending_push_work(self) -> bool:
        return super().has_pending_push_work() or self._unreported
