"""A rank of an engine that spans machines ends with the process that started it. Runs in vLLM's worker processes.

vLLM asks such a rank to end, which it hears of between two steps; one that waits in a step for a rank of another
machine that is gone never does, and would hold its device for good.
"""

from typing import Any

from splitserve.core.parent import end_with_starter


class NodeRank:
    """To be mixed into a vLLM worker class, before vLLM's own."""

    vllm_config: Any

    def init_device(self) -> None:
        if self.vllm_config.parallel_config.nnodes > 1:
            end_with_starter()
        super().init_device()  # type: ignore[misc]
