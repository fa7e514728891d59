"""How many workers of a fleet are to decode: what its requests are of late, against what steps take. Pure, one owner.

A worker's first decode costs it more of its time than each after that, and prompts beside decodes are read in what time
these leave. So a fleet serves more if few workers decode and the others read, as long as these are fast enough for the
TTFT objectives; where prompts are short, outputs long or TTFT objectives tight it serves more if all do both. Which it
is follows from how long prompts and outputs are and from the objectives, not from how many requests there are.

Of a fleet, say, `k` decode. The mean request takes `read_s` for its prompt on an idle worker, and `more_s` for its
decode beside others. Where it goes on from what was said before, the worker that decoded this has it cached; one that
only reads has not, and takes `elsewhere_s`. Decodes may fill their workers' time but for `first_s / tpot_s` of it,
where `first_s` is what a step takes however few decodes it has. Readers may fill theirs up to `_most_busy` of it,
beyond which prompts wait too long; what they do not manage is read by those that decode. Where workers differ those
decode that lose fewest prompts by it.

A request that no decoder takes in time is decoded by a reader, which is then slower at prompts. Where that would cost
the readers `MOST_LOST` of their time, and few decoding is `WORTH_IT`, no more are: else a burst would leave all of them
decoding, for good.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import sqrt

from splitserve.latency.model import LatencyModel, Step
from splitserve.routing.adaptive import IN_HAND
from splitserve.routing.candidate import Candidate
from splitserve.routing.outlook import FEW, alone_s, decode_s
from splitserve.routing.route import AS_IT_IS, ONE_MORE, Need, Split

WINDOW = 32  # requests, of the moving means
REFRESH = 128  # requests, after which it is worked out anew; before that at each power of two
LARGEST = 32  # workers; a larger fleet is split as one of so many
MOST_LOST = 0.1  # of the readers' time, by those that begin to decode though enough do
WORTH_IT = 1.1  # times as many requests as if all did both: from there on that limit holds
LONGEST_TTFT_S = 60.0  # an objective that is longer, or none, counts as this
WAIT_P90 = 2.67  # of the mean wait, with lengths that vary as those of prompts do
_BUSY = (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True, slots=True)
class _Costs:
    """Of the mean request on one worker: `read_s` on the one with most of it cached, `elsewhere_s` on another. `spare`:
    the share of its time that decodes may fill."""

    read_s: float
    elsewhere_s: float
    more_s: float
    first_s: float
    spare: float

    @property
    def worth(self) -> float:
        """Prompts that it could read in the time that one decode takes of it: how good it is at decoding."""
        return self.spare * self.elsewhere_s / self.more_s


@dataclass(frozen=True, slots=True)
class _Best:
    """How many are to decode, how many may, and how good each kind of worker is at it, by latency model, where kinds
    differ."""

    decoders: int
    most: int
    worth: dict[int, float]


class Mix:
    """The requests of one router."""

    def __init__(self) -> None:
        self._count = 0
        self._tokens = self._to_read = self._to_read_elsewhere = self._output_tokens = self._ttft_s = 0.0
        self._known: dict[tuple[int, float], _Best] = {}  # by workers and TPOT objective

    def add(self, need: Need, ttft_s: float) -> None:
        """A request, and its TTFT objective."""
        self._count += 1
        weight = max(1.0 / self._count, 1.0 / WINDOW)
        self._tokens += weight * (need.tokens - self._tokens)
        self._to_read += weight * (need.to_read - self._to_read)
        self._to_read_elsewhere += weight * (need.to_read_elsewhere - self._to_read_elsewhere)
        self._output_tokens += weight * (need.output_tokens - self._output_tokens)
        self._ttft_s += weight * (min(LONGEST_TTFT_S, ttft_s) - self._ttft_s)
        if self._count % REFRESH == 0 or self._count.bit_count() == 1:
            self._known.clear()

    def split(self, seen: Sequence[Candidate], workers: int, decoding: int, tpot_s: float) -> Split:
        """For a request with this TPOT objective, in a fleet of so many workers, of which so many decode now. `seen`:
        some of them, or all, whose steps stand for all."""
        if not self._count or not seen:
            return AS_IT_IS
        of = workers, tpot_s
        best = self._known.get(of)
        if best is None:
            self._known[of] = best = self._best(seen, workers, tpot_s)
        if decoding > best.decoders:
            return Split(best.decoders / decoding, closed=decoding > best.most, worth=best.worth)
        return ONE_MORE if decoding < best.decoders else AS_IT_IS

    def _best(self, seen: Sequence[Candidate], workers: int, tpot_s: float) -> _Best:
        kinds: dict[int, list[Candidate]] = {}
        for each in seen:
            if each.latency is not None:
                kinds.setdefault(id(each.latency), []).append(each)
        if not kinds:
            return _Best(workers, workers, {})
        costs = {kind: self._costs(members, tpot_s) for kind, members in kinds.items()}
        order = sorted(costs, key=lambda kind: costs[kind].worth, reverse=True)
        there = [costs[kind] for kind in order for _ in kinds[kind]]
        of = min(workers, LARGEST)
        fleet = [there[number * len(there) // of] for number in range(of)]
        share, gain = self._decoders(fleet)
        decoders, most = round(share * workers), workers
        if gain >= WORTH_IT:
            lost = 1.0 - sum([each.spare for each in fleet]) / of  # of a reader's time, once it decodes
            most = decoders + int(MOST_LOST * (workers - decoders) / max(MOST_LOST, lost))
        return _Best(decoders, most, {kind: costs[kind].worth for kind in order} if len(order) > 1 else {})

    def _costs(self, alike: Sequence[Candidate], tpot_s: float) -> _Costs:
        latency = alike[0].latency
        assert latency is not None
        slowdown = sum([each.slowdown for each in alike]) / len(alike)
        context = self._tokens + self._output_tokens / 2.0
        each_s = max(1e-9, decode_s(latency, context)) * slowdown
        first_s = max(0.0, latency.step_s(Step(0, 0, 0, FEW, int(FEW * context))) * slowdown - FEW * each_s)
        return _Costs(
            read_s=self._read_s(latency, self._to_read) * slowdown,
            elsewhere_s=self._read_s(latency, self._to_read_elsewhere) * slowdown,
            more_s=each_s * max(1.0, self._output_tokens),
            first_s=first_s,
            spare=max(0.0, 1.0 - first_s / tpot_s),
        )

    def _read_s(self, latency: LatencyModel, left: float) -> float:
        """So many tokens of the mean prompt."""
        return alone_s(latency, int(self._tokens), int(self._tokens - left))

    def _decoders(self, fleet: Sequence[_Costs]) -> tuple[float, float]:
        """The share with which most requests are served, all where as many are; and how many times as many that is as
        if all did both. `fleet`: those first that are better at decoding."""
        workers = len(fleet)
        spare = [0.0, *accumulate([each.spare for each in fleet])]
        decoded = [0.0, *accumulate([each.spare / each.more_s for each in fleet])]  # per second, by the first so many
        read = [0.0, *accumulate([1.0 / each.read_s for each in fleet])]  # prompts, if each had them cached
        elsewhere = [0.0, *accumulate([1.0 / each.elsewhere_s for each in fleet])]  # if none had
        if not decoded[-1]:
            return 1.0, 1.0
        mean_read_s, mean_first_s = workers / elsewhere[-1], sum([each.first_s for each in fleet]) / workers
        in_hand = round((self._ttft_s - 2.0 * mean_first_s) / mean_read_s - IN_HAND, 1)

        def served(decoders: int) -> tuple[float, bool]:
            """How many requests a second, and whether the readers manage all of their prompts."""
            readers = workers - decoders
            managed = _most_busy(readers, in_hand) * (elsewhere[-1] - elsewhere[decoders]) if readers else 0.0
            if decoded[decoders] <= managed:
                return decoded[decoders], True
            read_s, more_s = decoders / read[decoders], spare[decoders] / decoded[decoders]
            return (spare[decoders] + managed * read_s) / (read_s + more_s), False

        fewest, too_many = 0, workers  # the more decode, the more are served, until the readers do not manage
        while too_many - fewest > 1:
            between = (fewest + too_many) // 2
            if served(between)[1]:
                fewest = between
            else:
                too_many = between
        best = max((workers, too_many, max(1, fewest)), key=lambda decoders: served(decoders)[0])
        return best / workers, served(best)[0] / served(workers)[0]


@lru_cache(maxsize=4096)
def _most_busy(readers: int, in_hand: float) -> float:
    """The share of their time that so many workers may read for nine of ten prompts to be read within `in_hand` times
    what one takes alone, waiting included. Waits as in an M/D/c queue (Allen and Cunneen's approximation)."""
    for busy in _BUSY:
        wait = WAIT_P90 * busy ** (sqrt(2.0 * (readers + 1)) - 1.0) / (2.0 * readers * (1.0 - busy))
        if 1.0 + wait <= in_hand:
            return busy
    return 0.0
