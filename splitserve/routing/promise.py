"""What jobs will take of a worker, before the worker has said so itself. Pure values that add up, so that a thousand
promises cost no more to take off a load than one."""

from dataclasses import dataclass, replace
from operator import add, sub
from typing import NamedTuple

from splitserve.core.worker import Load, Pool
from splitserve.kv.layout import blocks_for
from splitserve.routing.admission import decode_blocks


@dataclass(frozen=True, slots=True)
class Promise:
    """What one job will take of a worker. `waits_for_kv`: a decode whose prompt another worker computes."""

    pool: Pool  # PREFILL for a prefill job, DECODE for a decode job, whatever the worker's own pool
    tokens: int  # of prompt and of output already sent
    waits_for_kv: bool = False


class Effect(NamedTuple):
    """By how much jobs change a load; the fields are Load's own."""

    free_blocks: int = 0
    free_sequences: int = 0
    parked_limit_blocks: int = 0
    prefill_tokens: int = 0
    running: int = 0

    @classmethod
    def of(cls, promise: Promise, block_size: int) -> "Effect":
        """By the worker's own rule (`admission.Capacity`)."""
        tokens = promise.tokens
        if promise.pool is Pool.PREFILL:
            return cls(free_blocks=-blocks_for(tokens, block_size), prefill_tokens=tokens, running=1)
        blocks = decode_blocks(tokens, block_size)
        if promise.waits_for_kv:
            return cls(free_blocks=-blocks, free_sequences=-1, parked_limit_blocks=-blocks)
        return cls(free_blocks=-blocks, free_sequences=-1, prefill_tokens=tokens, running=1)

    def plus(self, other: "Effect") -> "Effect":
        return Effect(*map(add, self, other))

    def minus(self, other: "Effect") -> "Effect":
        return Effect(*map(sub, self, other))

    def on(self, load: Load) -> Load:
        """The load once the worker has taken these jobs."""
        return replace(
            load,
            **{name: max(0, getattr(load, name) + change) for name, change in zip(self._fields, self, strict=True)},
        )


def nothing(pool: Pool) -> Load:
    """Grants nothing: a worker that has not reported yet."""
    return Load(
        seen_jobs=0,
        free_blocks=0,
        free_sequences=0,
        prefill_tokens=0,
        prefill_token_limit=0,
        parked_limit_blocks=0,
        running=0,
        quarantined_blocks=0,
        pinned_blocks=0,
        pool=pool,
        draining=False,
        produced_tokens=0,
    )
