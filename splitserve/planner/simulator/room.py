"""What a simulated worker grants, in the terms of `routing/admission`, and the blocks that it has."""

from splitserve.core.fleet import Health
from splitserve.core.worker import KvFormat, KvMode, Pool, WorkerInfo
from splitserve.planner.deployment import Role, WorkerSpec
from splitserve.routing.admission import Limits
from splitserve.routing.candidate import Candidate

_POOL = {Role.PREFILL: Pool.PREFILL, Role.DECODE: Pool.DECODE, Role.COLOCATED: Pool.DECODE}


class Room:
    """See `routing.admission.Room`; changed by its worker alone."""

    __slots__ = (
        "draining",
        "free_blocks",
        "free_sequences",
        "growth_blocks",
        "parked_limit_blocks",
        "prefill_token_limit",
        "prefill_tokens",
        "running",
    )

    def __init__(self, spec: WorkerSpec, limits: Limits) -> None:
        self.free_blocks = spec.kv_blocks
        self.growth_blocks = 0
        self.free_sequences = max(1, spec.max_sequences - 1)  # one stays free for a prefill: `admission.Capacity`
        self.prefill_tokens = 0
        self.prefill_token_limit = spec.steps_ahead * spec.max_batched_tokens
        self.parked_limit_blocks = limits.parked_limit
        self.running = 0
        self.draining = False


def candidate_of(spec: WorkerSpec, number: int, tpot_s: float) -> tuple[Candidate, Room]:
    """The worker as the router's policy sees it, and what it grants. `tpot_s`: the objective of all its decodes."""
    kv = KvFormat("plan", "plan", spec.block_tokens, 1, 1, 1, spec.block_tokens, KvMode.PUSH, "nixl")
    pool, name = _POOL[spec.role], f"{spec.role}-{number}"
    info = WorkerInfo(name, name, pool, "plan", kv, (), spec.kv_blocks, spec.max_sequences, spec.max_model_len, "plan")
    limits = Limits.of(spec.kv_blocks, spec.max_model_len, spec.block_tokens)
    room = Room(spec, limits)
    accepting = spec.cold_start_s <= 0
    candidate = Candidate(info, limits, 0, pool, Health.READY, room, accepting, latency=spec.latency, tpot_s=tpot_s)
    return candidate, room
