"""What the simulated engine says of itself, worked out from the model and the settings. Pure."""

from splitserve.core.config import SimSettings
from splitserve.core.errors import ConfigError
from splitserve.core.model import ModelInfo
from splitserve.core.worker import KvFormat, KvMode
from splitserve.kv.layout import Shard, block_bytes, part_of

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def max_model_len(model: ModelInfo, settings: SimSettings) -> int:
    """Tokens of prompt and output together. Raises ConfigError for a length that the model or the memory can't hold."""
    memory = settings.total_blocks * settings.block_size
    most = min(model.max_position_embeddings, memory)
    wanted = settings.max_model_len or most
    if wanted > most:
        raise ConfigError(
            "engine.max_model_len",
            f"{wanted} is too long: the model takes {model.max_position_embeddings} tokens, the blocks hold {memory}",
        )
    return wanted


def kv_format(model: ModelInfo, settings: SimSettings, mode: KvMode, transport: str) -> KvFormat:
    """The real model's, so that bytes are accounted as if they were moved. Raises ConfigError for an unknown dtype."""
    if model.dtype not in DTYPE_BYTES:
        raise ConfigError(
            str(model.path / "config.json"), f"dtype {model.dtype!r} is unknown; use one of {', '.join(DTYPE_BYTES)}"
        )
    return KvFormat(
        model_fingerprint=model.fingerprint,
        dtype=model.dtype,
        block_size=settings.block_size,
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        block_bytes=block_bytes(settings.block_size, model.kv_heads, model.head_dim, DTYPE_BYTES[model.dtype]),
        mode=mode,
        transport=transport,
    )


def shard(kv: KvFormat) -> Shard:
    """One rank that holds all of it, in one group."""
    return Shard(part_of(0, 1, kv.kv_heads, 0, kv.layers), kv.block_size, (0,) * kv.layers)
