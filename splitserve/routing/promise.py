"""What jobs will take of a worker, before the worker has said so itself. Pure values that add up, so that a thousand
promises cost no more to take off a load than one."""

from dataclasses import dataclass, fields, replace

from splitserve.core.worker import Load, Pool
from splitserve.routing.admission import after_decode, after_prefill


@dataclass(frozen=True, slots=True)
class Promise:
    """What one job will take of a worker. `waits_for_kv`: a decode whose prompt another worker computes."""

    pool: Pool  # PREFILL for a prefill job, DECODE for a decode job, whatever the worker's own pool
    tokens: int  # of prompt and of output already sent
    waits_for_kv: bool = False


@dataclass(frozen=True, slots=True)
class Effect:
    """By how much jobs change a load; the fields are Load's own."""

    free_blocks: int = 0
    free_sequences: int = 0
    parked_limit_blocks: int = 0
    prefill_tokens: int = 0
    running: int = 0

    @classmethod
    def of(cls, promise: Promise, block_size: int) -> "Effect":
        """By the worker's own rule, seen on a load that nothing exhausts."""
        if promise.pool is Pool.PREFILL:
            after = after_prefill(_PLENTY, promise.tokens, block_size)
        else:
            after = after_decode(_PLENTY, promise.tokens, block_size, promise.waits_for_kv)
        return cls(**{name: getattr(after, name) - getattr(_PLENTY, name) for name in _NAMES})

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(**{name: getattr(self, name) + getattr(other, name) for name in _NAMES})

    def __sub__(self, other: "Effect") -> "Effect":
        return Effect(**{name: getattr(self, name) - getattr(other, name) for name in _NAMES})

    def on(self, load: Load) -> Load:
        """The load once the worker has taken these jobs."""
        return replace(load, **{name: max(0, getattr(load, name) + getattr(self, name)) for name in _NAMES})


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


_NAMES = tuple(field.name for field in fields(Effect))
_PLENTY = replace(nothing(Pool.DECODE), free_blocks=2**60, free_sequences=2**60, parked_limit_blocks=2**60)
