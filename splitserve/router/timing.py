"""When things happened to one request, and the `Timings` that follow. Plain state; seconds on the router's clock."""

from dataclasses import dataclass, field

from splitserve.core.request import Timings
from splitserve.core.slo import rank_of_p99
from splitserve.core.worker import KvMode, Outcome
from splitserve.router.decisions import Decisions
from splitserve.router.waiting import Binding


@dataclass(slots=True)
class Stopwatch:
    """Queue, prefill and transfer are those of the route that made the first token; `decode_worker` the last one's."""

    arrived_at: float
    first_token_at: float | None = None
    last_token_at: float = 0.0
    routes: int = 0
    moves: int = 0
    kv_bytes: int = 0
    kv_bytes_before_prefill_ended: int = 0
    watch_gaps: bool = False
    decisions: Decisions = field(default_factory=Decisions)
    _gaps_s: list[float] = field(default_factory=list)  # between the moments at which tokens came
    _served_by: Binding | None = None
    _decode_worker: str = ""
    _prefilled_at: float | None = None
    _uncovered_s: float = 0.0

    def bound(self, binding: Binding, *, moved: bool = False) -> None:
        self.routes += 1
        self.moves += moved
        self._decode_worker = binding.decode.name
        if self.first_token_at is None:
            self._served_by, self._prefilled_at, self._uncovered_s = binding, None, 0.0

    def prefilled(self, binding: Binding, outcome: Outcome, now: float) -> None:
        """The prefill worker has read the prompt and sent the KV."""
        transfer = outcome.transfer
        if transfer is not None:
            self.kv_bytes += transfer.bytes
            self.kv_bytes_before_prefill_ended += transfer.bytes_before_prefill_ended
        if binding is self._served_by:
            self._uncovered_s = max(0.0, transfer.uncovered_s) if transfer is not None else 0.0
            self._prefilled_at = now - self._uncovered_s

    def tokens(self, now: float) -> None:
        if self.first_token_at is None:
            self.first_token_at = now
        elif self.watch_gaps:
            self._gaps_s.append(now - self.last_token_at)
        self.last_token_at = now

    def gaps_p99_s(self, output_tokens: int) -> float:
        """What 99% of the gaps between its tokens are no longer than; tokens that came together have none."""
        gaps = max(output_tokens - 1, len(self._gaps_s))
        place = rank_of_p99(gaps) - (gaps - len(self._gaps_s))  # among those above 0
        return sorted(self._gaps_s)[place - 1] if place > 0 else 0.0

    def timings(self, output_tokens: int) -> Timings:
        """Only once something was served: a request that has not finished has none."""
        served, first = self._served_by, self.first_token_at
        assert served is not None
        assert first is not None
        prefilled_at = self._prefilled_at if self._prefilled_at is not None else first
        return Timings(
            queue_s=served.bound_at - self.arrived_at,
            prefill_s=max(0.0, prefilled_at - served.bound_at),
            transfer_s=self._transfer_s(served, first),
            ttft_s=first - self.arrived_at,
            tpot_s=(self.last_token_at - first) / (output_tokens - 1) if output_tokens > 1 else 0.0,
            prefill_worker=served.prefill.name if served.prefill is not None else "",
            decode_worker=self._decode_worker,
            kv_bytes=self.kv_bytes,
            kv_bytes_before_prefill_ended=self.kv_bytes_before_prefill_ended,
            attempts=self.routes - self.moves,
        )

    def _transfer_s(self, served: Binding, first_token_at: float) -> float:
        """Push: as the source measured it. Pull: the decode worker reads from then until its first token."""
        if self._prefilled_at is None:
            return 0.0
        if served.decode.kv.mode is KvMode.PULL:
            return max(0.0, first_token_at - self._prefilled_at)
        return self._uncovered_s
