"""What vLLM says of a model's KV and of a rank, in our terms. Refuses what push can't move."""

from typing import TYPE_CHECKING

from splitserve.core.errors import ConfigError
from splitserve.kv.connector.scheduler import Group
from splitserve.kv.connector.worker import Rank

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

# By name: a subclass may keep something else in its blocks.
MOVABLE = frozenset({"FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"})


def kv_groups(kv_cache_config: "KVCacheConfig") -> tuple[Group, ...]:
    """vLLM's KV groups. Raises ConfigError for one whose blocks are not keys and values of single tokens, or of another
    size than the rest."""
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    kinds = sorted({type(spec).__name__ for spec in specs})
    shapes = {(spec.block_size, spec.page_size_bytes) for spec in specs}
    if not MOVABLE.issuperset(kinds) or len(shapes) != 1:
        raise ConfigError(
            "kv_transfer.mode",
            "push moves the KV of full, sliding-window and latent attention in blocks of one size; this model has "
            f"{len(specs)} KV group(s) of {', '.join(kinds)} and (tokens, bytes) a block of {sorted(shapes)}; use pull",
        )
    return tuple(Group(spec.block_size, _window(spec)) for spec in specs)


def group_of(kv_cache_config: "KVCacheConfig", layer_name: str) -> int:
    """The index of the KV group that holds this layer."""
    groups = kv_cache_config.kv_cache_groups
    return next(index for index, group in enumerate(groups) if layer_name in group.layer_names)


def rank_of(vllm_config: "VllmConfig") -> Rank:
    """Of the process that this is called in."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    tensor, size = get_tp_group().rank_in_group, parallel.tensor_parallel_size
    return Rank(
        rank=get_pp_group().rank_in_group * size + tensor,
        tensor_rank=tensor,
        tensor_size=size,
        kv_heads=1 if model.use_mla else model.get_total_num_kv_heads(),
        layers=model.get_total_num_hidden_layers(),
    )


def _window(spec: "KVCacheSpec") -> int | None:
    window: int | None = getattr(spec, "sliding_window", None) if type(spec).__name__ == "SlidingWindowSpec" else None
    return window
