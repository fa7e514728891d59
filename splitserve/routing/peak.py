"""How much memory running decodes will need at their fullest moment. Pure.

Decodes grow by a token a step and give everything back when they end, some while others still grow. Counting what they
hold now lets too many in, and some are preempted and computed anew; counting each at its longest lets too few in. The
fullest moment comes just before one of them ends; how long each will be is drawn from the outputs of late. After
Past-Future scheduling (Gong et al., ASPLOS 2025).
"""

from collections.abc import Iterable
from itertools import count

from splitserve.routing.lengths import OutputLengths

RESERVE = 0.08  # of all blocks, kept free beside the peak: outputs are only expected to be so long
_GOLDEN = 0.6180339887498949


def peak_tokens(sequences: Iterable[tuple[int, int]]) -> int:
    """What these hold at their fullest moment, if each grows by a token a step. Of each: tokens that it holds, and that
    are to come."""
    longest_first = sorted(sequences, key=lambda each: each[1], reverse=True)
    held = peak = 0
    for alive, (now, to_come) in enumerate(longest_first, start=1):
        held += now
        peak = max(peak, held + alive * to_come)
    return peak


def growth_blocks(peak: int, held: int, total_blocks: int, block_size: int) -> int:
    """Of the free blocks, those that decodes will need until their peak, and the reserve. `peak` and what is `held`
    now are tokens."""
    return max(0, -(-(peak - held) // block_size)) + int(RESERVE * total_blocks)


class Expectations:
    """Which share of outputs each new one is taken to be longer than: spread evenly, so that many together are as the
    outputs of late were, and each keeps its own however it goes on. One owner."""

    def __init__(self) -> None:
        self.lengths = OutputLengths()
        self._numbers = count(1)

    @property
    def known(self) -> bool:
        """Whether enough outputs have ended to expect anything."""
        return self.lengths.known

    def share(self) -> float:
        """Of the next one, in [0, 1)."""
        return next(self._numbers) * _GOLDEN % 1.0

    def tokens(self, share: float, made: int, most: int) -> int:
        """Of its whole output, `made` of which are out; `most` it may have. While too few have ended to tell, none is
        expected beyond those."""
        return min(most, made + self.lengths.remaining(made, share))
