"""Requests to come, as columns: what the simulator serves and the load generator sends."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Which blocks of which prompts are the same. `ids[offsets[i]:offsets[i + 1]]` names the leading blocks of prompt
    i, each of `block_tokens` tokens; two prompts share their first k blocks exactly if their first k ids agree."""

    ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]  # one more than there are requests
    block_tokens: int

    def of(self, request: int) -> npt.NDArray[np.int64]:
        return self.ids[self.offsets[request] : self.offsets[request + 1]]


@dataclass(frozen=True, slots=True)
class Requests:
    """In order of arrival. Times are seconds from the start.

    A request may be a later turn of a session: `follows` is then the row of the turn before it, which is above its own
    and which no other follows, and -1 for a first turn. Its prompt is what that turn read and wrote (its history) and
    then new tokens. It comes `pause_s` after that answer has ended, whenever that is; its `arrival_s` is when it would
    come if answers took no time. Both columns are there or none."""

    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]  # at least 1
    prefixes: Prefixes | None = None
    follows: npt.NDArray[np.int64] | None = None
    pause_s: npt.NDArray[np.float64] | None = None  # 0 for a first turn

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def history_tokens(self) -> npt.NDArray[np.int64]:
        """Of each prompt: what the turn before it read and wrote; 0 for a first turn."""
        if self.follows is None:
            return np.zeros(len(self), dtype=np.int64)
        read_and_written = (self.prompt_tokens + self.output_tokens)[self.follows]
        return np.asarray(np.where(self.follows >= 0, read_and_written, 0))

    @property
    def next_turn(self) -> npt.NDArray[np.int64]:
        """The row of the turn after each, or -1 where its session ends."""
        following = np.full(len(self), -1)
        if self.follows is not None:
            later = np.flatnonzero(self.follows >= 0)
            following[self.follows[later]] = later
        return following
