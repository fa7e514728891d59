"""vLLM workers that misname what they hold, for tests that must notice it. Built by vLLM, by name, in a rank's process
before its connector: what these change there, no other process sees."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index

from splitserve.engine.vllm.on_cpu import CpuWorker
from splitserve.kv.connector.model import rank_of
from splitserve.kv.connector.worker import Rank


class SwappedHeads(CpuWorker):
    """Each tensor rank takes itself for its mirror image, so it sends its heads as others."""

    def __init__(self, vllm_config: VllmConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(vllm_config, *arguments, **named)
        patch("splitserve.kv.connector.rank_of", _mirrored).start()


class SwappedStages(CpuWorker):
    """Each of two stages counts its layers as the other's, so it sends them as those."""

    def __init__(self, vllm_config: VllmConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(vllm_config, *arguments, **named)
        layers = vllm_config.model_config.get_total_num_hidden_layers()

        def shifted(name: str) -> int:
            return int((extract_layer_index(name) + layers // 2) % layers)

        patch("splitserve.kv.connector.worker.extract_layer_index", shifted).start()


def _mirrored(vllm_config: VllmConfig) -> Rank:
    rank = rank_of(vllm_config)
    return replace(rank, tensor_rank=rank.tensor_size - 1 - rank.tensor_rank)
