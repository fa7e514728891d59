"""The LoRA adapters that a worker has, read from their directories before vLLM starts. Pure but for reading."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitserve.core.errors import ConfigError

ON_DEVICE = 8  # adapters that take part in one step; `extra: {max_loras: ...}` says otherwise
CONFIG = "adapter_config.json"


def lora_arguments(loras: Mapping[str, str], ranks: Sequence[int]) -> dict[str, Any]:
    """vLLM's EngineArgs for these adapters, by name; `ranks`: those that vLLM has room for, rising. Raises ConfigError
    for a directory that holds none."""
    largest = max(_rank(name, Path(path)) for name, path in loras.items())
    room = next((rank for rank in ranks if rank >= largest), None)
    if room is None:
        raise ConfigError("engine.loras", f"an adapter has rank {largest}; this vLLM takes up to {max(ranks)}")
    return {
        "enable_lora": True,
        "max_loras": min(len(loras), ON_DEVICE),
        "max_cpu_loras": len(loras),
        "max_lora_rank": room,
    }


def _rank(name: str, path: Path) -> int:
    field = f"engine.loras.{name}"
    if not (path / CONFIG).is_file():
        raise ConfigError(field, f"{path} has no {CONFIG}; name a directory in PEFT's format")
    try:
        return int(json.loads((path / CONFIG).read_text())["r"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(field, f"{path / CONFIG} says no rank r: {error!r}") from error
