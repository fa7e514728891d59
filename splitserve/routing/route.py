"""What a request needs of the fleet, and what `policy` answers: plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import inf, isinf

MOST_WANTED = 4  # workers with the prompt's beginning cached that a decision always looks at


@dataclass(frozen=True, slots=True)
class Need:
    """What one request needs. `avoid`: workers that failed it, used only when no other is left; `exclude`: never.
    `alone`: one worker computes and decodes it. `beside`: the worker that has its prompt cached, which computes the
    rest, if it takes it now or once the prompts ahead are read. `lora`: the adapter that the worker must have.
    `cached`: how many of its leading tokens are in which worker's prefix cache, by uuid, as far as is known (`prefix`);
    the most come last.

    Its objectives, if it has any: `due` is when its first token should be out, on the caller's clock, and `tpot_s` what
    a token after that may take; `output_tokens` is how many it is expected to make."""

    tokens: int  # prompt and output already sent
    avoid: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    alone: bool = False
    beside: str = ""
    lora: str = ""
    due: float = inf
    tpot_s: float = inf
    output_tokens: int = 1
    cached: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Workers that are looked at in any case: `beside`, and a few that have the most of it cached."""
        few = tuple(islice(reversed(self.cached), MOST_WANTED))
        return (self.beside, *few) if self.beside else few

    @property
    def to_read(self) -> int:
        """Tokens that are left to compute on the worker that has most of them cached."""
        return self.tokens - next(reversed(self.cached.values()), 0)

    @property
    def to_read_elsewhere(self) -> int:
        """The same on any other worker."""
        return self.tokens - next(islice(reversed(self.cached.values()), 1, None), 0)

    @property
    def picky(self) -> bool:
        """It may have to wait where another request would not."""
        return bool(self.avoid or self.exclude or self.beside or self.lora)

    @property
    def has_objectives(self) -> bool:
        return not (isinf(self.due) and isinf(self.tpot_s))


@dataclass(frozen=True, slots=True)
class Split:
    """How many workers are to decode (`mix`). `keep`: which share of those that do should go on to, those that are best
    at it, and of equals the busiest; `opens`: whether one without decodes should begin to; `closed`: whether none but
    those that should go on to may take one. `worth`: how good a worker is at it, by the `id` of its latency model,
    where these differ."""

    keep: float = 1.0
    opens: bool = False
    closed: bool = False
    worth: Mapping[int, float] = field(default_factory=dict)


AS_IT_IS = Split()
ONE_MORE = Split(opens=True)


@dataclass(frozen=True, slots=True)
class Route:
    """Worker uuids. Without `prefill` the decode worker computes the prompt itself. If it was predicted, in seconds
    from now: `read_s` until the prompt is read, `ttft_s` until the first token is out."""

    decode: str
    prefill: str | None = None
    read_s: float = 0.0
    ttft_s: float = 0.0

    @property
    def reader(self) -> str:
        """Who reads the prompt."""
        return self.prefill or self.decode


@dataclass(frozen=True, slots=True)
class Wait:
    """Live workers could serve it, but none can take it now, or one that will soon serves everyone better."""


@dataclass(frozen=True, slots=True)
class NoRoute:
    """No live worker can ever serve it."""

    reason: str
