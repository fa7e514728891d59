"""How long outputs have been of late, and so how many more tokens a request may still make. Pure state, one owner."""

from bisect import bisect_right, insort
from collections import deque
from math import log1p

WINDOW = 512  # outputs
FEWEST = 16  # of them that say anything
FIRST = 300  # tokens, that outputs are taken to have before any has ended


class OutputLengths:
    """Lengths in tokens, of the last `WINDOW` outputs that ended."""

    __slots__ = ("_recent", "_sorted")

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, tokens: int) -> None:
        self._recent.append(tokens)
        insort(self._sorted, tokens)
        if len(self._recent) > WINDOW:
            del self._sorted[bisect_right(self._sorted, self._recent.popleft()) - 1]

    @property
    def known(self) -> bool:
        """Whether enough outputs have ended to say anything."""
        return len(self._sorted) >= FEWEST

    def remaining(self, made: int, share: float) -> int:
        """What all but a `share` of those that were longer than `made` had still to come then; 0 where too few were."""
        beyond = bisect_right(self._sorted, made)
        count = len(self._sorted) - beyond
        if count < FEWEST:
            return 0
        return self._sorted[beyond + int(share * count)] - made

    def to_come(self, made: int, share: float, running: int) -> int:
        """The same; while too few have ended to tell, of any output, `running` tokens having been made by those that
        have not. Then the more tokens were made and the fewer of them were the last, the longer outputs are taken to
        be: all but a `share` of them as long as if any token could be the last."""
        ended = self._sorted
        if self.known:
            return self.remaining(made, share)
        return max(0, int(-log1p(-share) * (FIRST + sum(ended) + running) / (1 + len(ended))) - made)
