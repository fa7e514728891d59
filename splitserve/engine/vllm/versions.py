"""What differs between vLLM's releases, 0.25 to 0.33, for the engine. For the KV connector: `kv/connector/versions.py`.

Called in vLLM's worker processes, on its step thread. Since which release:

    0.29  on a CPU, seeds count in a batch in which some requests have none
"""

from typing import Any

SEEDS_COUNT = (0, 29)


def keep_seeds(sampler: Any) -> None:
    """Makes a TopKTopPSampler that would ignore them draw as it does on other devices; the draws are the same."""
    from vllm import __version_tuple__

    if __version_tuple__ < SEEDS_COUNT and sampler.forward == sampler.forward_cpu:
        sampler.forward = sampler.forward_native
