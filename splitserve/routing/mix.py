"""How many workers of a fleet are to decode: what its requests are of late, against what steps take. Pure, one owner.

A worker's first decode costs it more of its time than each after that, and prompts beside decodes are read in what time
these leave. So a fleet serves more if few workers decode and the others read, as long as these are fast enough for the
TTFT objectives; where prompts are short, outputs long or TTFT objectives tight it serves more if all do both. Which it
is follows from how long prompts and outputs are and from the objectives, not from how many requests there are.

Of `workers`, say, `k` decode. The mean request takes `read_s` for its prompt on an idle worker, and `more_s` for its
decode beside others. Decodes may fill their workers' time but for `first_s / tpot_s` of it, where `first_s` is what a
step takes however few decodes it has. Readers may fill theirs up to `_most_busy` of it, beyond which prompts wait too
long; what they do not manage is read by those that decode.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import sqrt

from splitserve.latency.model import LatencyModel, Step
from splitserve.routing.adaptive import IN_HAND
from splitserve.routing.candidate import Candidate
from splitserve.routing.outlook import FEW, alone_s, decode_s
from splitserve.routing.route import AS_IT_IS, ONE_MORE, Split

WINDOW = 32  # requests, of the moving means
REFRESH = 128  # requests, after which it is worked out anew; before that at each power of two
LARGEST = 32  # workers; a larger fleet is split as one of so many
SEEN = 8  # workers that stand for all
LONGEST_TTFT_S = 60.0  # an objective that is longer, or none, counts as this
WAIT_P90 = 2.67  # of the mean wait, with lengths that vary as those of prompts do
_BUSY = (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.3, 0.2, 0.1)


class Mix:
    """The requests of one router."""

    def __init__(self) -> None:
        self._count = 0
        self._tokens = self._output_tokens = self._ttft_s = 0.0
        self._known: dict[tuple[int, float], int] = {}  # by workers and TPOT objective

    def add(self, tokens: int, output_tokens: int, ttft_s: float) -> None:
        """A request: how many of its tokens are to be read and made, and its TTFT objective."""
        self._count += 1
        weight = max(1.0 / self._count, 1.0 / WINDOW)
        self._tokens += weight * (tokens - self._tokens)
        self._output_tokens += weight * (output_tokens - self._output_tokens)
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
            self._known[of] = best = self._decoders(seen, workers, tpot_s)
        if decoding > best:
            return Split(best / decoding)
        return ONE_MORE if decoding < best else AS_IT_IS

    def _decoders(self, seen: Sequence[Candidate], workers: int, tpot_s: float) -> int:
        """The number with which most requests are served; all, where as many are."""
        known = [each for each in seen if each.latency is not None]
        if not known:
            return workers
        of = min(workers, LARGEST)
        return round(self._decoders_of(of, tpot_s, *self._costs(known[:SEEN])) * workers / of)

    def _decoders_of(self, workers: int, tpot_s: float, first_s: float, more_s: float, read_s: float) -> int:
        spare = 1.0 - first_s / tpot_s
        if spare <= 0.0:
            return workers
        ttft = round((self._ttft_s - 2.0 * first_s) / read_s - IN_HAND, 1)

        def served(decoders: int) -> tuple[float, bool]:
            """How many requests, and whether the readers manage all of their prompts."""
            readers = workers - decoders
            reading = readers * _most_busy(readers, ttft) if readers else 0.0
            most = spare * decoders / more_s
            if most * read_s <= reading:
                return most, True
            return (spare * decoders + reading) / (read_s + more_s), False

        fewest, too_many = 0, workers  # the more decode, the more are served, until the readers do not manage
        while too_many - fewest > 1:
            between = (fewest + too_many) // 2
            if served(between)[1]:
                fewest = between
            else:
                too_many = between
        return max((workers, too_many, max(1, fewest)), key=lambda decoders: served(decoders)[0])

    def _costs(self, seen: Sequence[Candidate]) -> tuple[float, float, float]:
        """`first_s`, `more_s` and `read_s` of the mean request, on the mean of these workers."""
        first_s = more_s = read_s = 0.0
        latency, costs = None, (0.0, 0.0, 0.0)
        for each in seen:
            if each.latency is not latency:
                assert each.latency is not None
                latency, costs = each.latency, self._costs_on(each.latency)
            share = each.slowdown / len(seen)
            first_s, more_s, read_s = first_s + share * costs[0], more_s + share * costs[1], read_s + share * costs[2]
        return first_s, more_s, read_s

    def _costs_on(self, latency: LatencyModel) -> tuple[float, float, float]:
        context = self._tokens + self._output_tokens / 2.0
        each_s = max(1e-9, decode_s(latency, context))
        first_s = max(0.0, latency.step_s(Step(0, 0, 0, FEW, int(FEW * context))) - FEW * each_s)
        return first_s, each_s * max(1.0, self._output_tokens), alone_s(latency, max(1, int(self._tokens)))


@lru_cache(maxsize=4096)
def _most_busy(readers: int, in_hand: float) -> float:
    """The share of their time that so many workers may read for nine of ten prompts to be read within `in_hand` times
    what one takes alone, waiting included. Waits as in an M/D/c queue (Allen and Cunneen's approximation)."""
    for busy in _BUSY:
        wait = WAIT_P90 * busy ** (sqrt(2.0 * (readers + 1)) - 1.0) / (2.0 * readers * (1.0 - busy))
        if 1.0 + wait <= in_hand:
            return busy
    return 0.0
