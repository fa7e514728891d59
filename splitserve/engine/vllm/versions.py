"""What differs between vLLM's releases, 0.25 to 0.33, for the engine. For the KV connector: `kv/connector/versions.py`.

Since which release:

    0.29  on a CPU, seeds count in a batch in which some requests have none

Parsers were looked at in 0.32 alone; features are looked for, where an older one may lack them.
"""

import inspect
from collections.abc import Mapping
from typing import Any

SEEDS_COUNT = (0, 29)


def keep_seeds(sampler: Any) -> None:
    """Makes a TopKTopPSampler that would ignore them draw as it does on other devices; the draws are the same. Called
    in vLLM's worker processes, on their step thread."""
    from vllm import __version_tuple__

    if __version_tuple__ < SEEDS_COUNT and sampler.forward == sampler.forward_cpu:
        sampler.forward = sampler.forward_native


def parser_class(tokenizer: Any, names: Mapping[str, str | None]) -> Any:
    """vLLM's parser of these names, which checks the tokenizer if it can. Raises TypeError if that does not fit."""
    from vllm.parser import ParserManager

    checks = "tokenizer" in inspect.signature(ParserManager.get_parser).parameters
    return ParserManager.get_parser(enable_auto_tools=True, **names, **({"tokenizer": tokenizer} if checks else {}))
