"""One live worker as `policy` sees it. State whose owner (`fleet`, or a simulated worker) says when it has changed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from splitserve.core.fleet import Health
from splitserve.core.worker import Pool, WorkerInfo
from splitserve.latency.model import LatencyModel
from splitserve.routing.admission import Limits, Room
from splitserve.routing.outlook import Held, Outlook, decode_s, outlook


@dataclass(slots=True, eq=False)
class Candidate:
    """`load` has every promise taken off that the worker has not reported yet. Workers of the same `kv_class` can write
    each other's KV. `latency`: what its steps cost, if that is known, and `slowdown` by which factor they are longer
    now. `tpot_s`: the tightest objective of its decodes, and `slack_s` the time for prompts that these leave, in its
    own word; `read_until`: when it is predicted to have read the prompts that it was given, and
    `heard_at` when it last said anything, on the caller's clock."""

    info: WorkerInfo
    limits: Limits
    kv_class: int
    pool: Pool
    health: Health
    load: Room
    accepting: bool  # False before the first report, and from a NotNow until the next
    latency: LatencyModel | None = None
    slowdown: float = 1.0
    tpot_s: float = inf
    slack_s: float = inf
    read_until: float = -inf
    heard_at: float = inf
    _outlook: Outlook | None = None
    _decode_s: float = field(default=0.0, init=False)  # of the latency model alone

    def __post_init__(self) -> None:
        if self.latency is not None:
            self._decode_s = decode_s(self.latency)

    @property
    def decodes(self) -> int:
        """Sequences that are decoded there, or will be. A worker may grant all, the one for prefills too."""
        return max(0, max(1, self.info.max_sequences - 1) - self.load.free_sequences)

    @property
    def outlook(self) -> Outlook:
        """Of a worker whose latency is known, as of the last `changed`."""
        if self._outlook is None:
            assert self.latency is not None
            held = Held(self.decodes, self.tpot_s, self.slack_s)
            self._outlook = outlook(
                self.latency, self.slowdown, self._decode_s, held, self.load, self.limits, self.info.kv.block_size
            )
        return self._outlook

    def changed(self) -> None:
        """What it holds, grants or says of its pace is not what it was."""
        self._outlook = None

    def look_ahead(self) -> None:
        """Works its outlook out now, so that no decision has to."""
        if self.latency is not None:
            _ = self.outlook


def outlooks(candidates: Sequence[Candidate]) -> list[Outlook]:
    """Of each, in order. Most are worked out already, and a decision asks for dozens."""
    return [each._outlook or each.outlook for each in candidates]
