"""A rank ends with the process that started it. Runs in vLLM's own processes, where the engine is not in the worker's.

vLLM asks its processes to end when a worker does, but a worker that is killed asks nobody, and a rank that waits in a
step for one of another machine hears nobody. Either would hold its device for good, and the next worker find it taken.
"""

from splitserve.core.parent import ENGINE_CORE, RANK, end_with_starter


class RankProcess:
    """To be mixed into a vLLM worker class, before vLLM's own."""

    def init_device(self) -> None:
        end_with_starter(ENGINE_CORE, RANK)
        super().init_device()  # type: ignore[misc]
