"""Multi-turn sessions: a user reads the answer, thinks, and asks again, with all that was said before as the history.

Sessions come open-loop, as single requests do; a session's later turns can't, since nobody replies to what has not been
written. So the load is partly open (Schroeder, Wierman and Harchol-Balter, NSDI'06): a server that is behind gets new
sessions no later, but their next turns as late as its answers. What rate it was really asked to serve, the run tells.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from splitserve.core.errors import ConfigError
from splitserve.workload.arrivals import Arrivals, Seconds
from splitserve.workload.lengths import LONGEST_TOKENS, Tokens
from splitserve.workload.pairs import Pair
from splitserve.workload.prefixes import Sharing, chosen, offsets_of
from splitserve.workload.requests import Prefixes, Requests
from splitserve.workload.statistics import summary
from splitserve.workload.synthetic import check_rate, streams
from splitserve.workload.workload import Summary

NumberT = TypeVar("NumberT", np.int64, np.float64)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A session has `turns` turns in the mean, as many as a coin says that is thrown after each (geometric), and pauses
    of `pause_s` seconds in the mean (exponential) between an answer and the next turn."""

    turns: float
    pause_s: float = 5.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.turns <= 1000.0:
            raise ConfigError("sessions", f"{self.turns:g} is not a mean number of turns between 1 and 1000")
        if not 0.0 <= self.pause_s <= 86400.0:
            raise ConfigError("pause", f"{self.pause_s:g} is not a mean of 0 to 86400 seconds")

    @property
    def note(self) -> str:
        return (
            f"sessions of {self.turns:g} turns in the mean, fewer where the limit ends them: a later turn comes "
            f"{self.pause_s:g} s in the mean after the answer before it, so a slow server is asked later turns later"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Sessions:
    """A Workload. `lengths` are of what a turn adds: the user's new tokens and the answer. A session ends early where
    its next turn would be longer, history and answer included, than the lengths' limit. `sharing` is of first turns.

    `draw` gives whole sessions but for the last, at a rate of so many turns, not sessions, per second: it is reached
    once sessions that began earlier have come to their later turns, so a run should be several sessions long and leave
    its warm-up out. Pauses are real seconds and do not scale with the rate; so the same seed has the same sessions at
    any rate, but their turns are interleaved otherwise."""

    name: str
    lengths: Pair
    arrivals: Arrivals
    dialogue: Dialogue
    sharing: Sharing | None = None
    notes: tuple[str, ...] = ()

    @property
    def mean_prompt_tokens(self) -> float:
        """With the history; of a sample."""
        return float(self._turns(_SAMPLE, 0).prompt_tokens.mean())

    @property
    def mean_output_tokens(self) -> float:
        return float(self._turns(_SAMPLE, 0).output_tokens.mean())

    def draw(self, requests: int, rate_rps: float, seed: int) -> Requests:
        check_rate(rate_rps)
        turns = self._turns(requests, seed)
        _, _, times, groups, _, _ = streams(seed, _STREAMS)
        count = int(turns.session[-1]) + 1 if requests else 0
        began_s = self.arrivals.times(count, rate_rps * count / max(1, requests), times)
        nominal_s = began_s[turns.session] + _within(turns.pause_s, turns.session)
        prefixes = self._prefixes(turns, groups)
        return _in_order(turns, nominal_s, prefixes)

    def describe(self) -> Summary:
        """Of a sample, whose size is the number of requests it says."""
        return replace(summary(self.draw(_SAMPLE, 1.0, 0)), rate_rps=None)

    def _turns(self, requests: int, seed: int) -> "_Turns":
        """So many turns, session after session. How many sessions that takes depends on how many end at the limit; the
        first sessions of a longer draw are the same, so it is tried."""
        sessions = 1 + int(1.25 * requests / self.dialogue.turns)
        while True:
            found = self._of_sessions(min(sessions, requests), seed)
            if len(found) >= requests:
                return found.first(requests)
            sessions *= 2

    def _of_sessions(self, sessions: int, seed: int) -> "_Turns":
        prompts, outputs, _, _, throws, pauses = streams(seed, _STREAMS)
        turns = throws.geometric(1.0 / self.dialogue.turns, sessions)
        session = np.repeat(np.arange(sessions), turns)
        new, answer = self.lengths.draw(len(session), prompts, outputs)
        pause_s = pauses.standard_exponential(len(session)) * self.dialogue.pause_s
        pause_s[_firsts(session)] = 0.0
        context = _within(new + answer, session)
        fits = np.flatnonzero(context <= (self.lengths.limit_tokens or LONGEST_TOKENS))
        return _Turns(session[fits], (context - answer)[fits], answer[fits], pause_s[fits])

    def _prefixes(self, turns: "_Turns", groups: np.random.Generator) -> Prefixes:
        """A session is one run of blocks, of which each of its prompts has the first. Where first turns are shared, a
        session's run begins with its group's blocks."""
        firsts = _firsts(turns.session)
        shared = self.sharing.draw(turns.prompt_tokens[firsts], groups) if self.sharing else None
        size = shared.block_tokens if shared is not None else _BLOCK_TOKENS
        blocks = turns.prompt_tokens // size
        offsets = offsets_of(blocks)
        at = np.arange(offsets[-1]) - np.repeat(offsets[:-1], blocks)
        longest = int(blocks.max(initial=0))
        session = np.repeat(turns.session, blocks)
        if shared is None or not len(shared.ids):
            return Prefixes(session * longest + at, offsets, size)
        owned = int(shared.ids.max()) + 1 + session * longest + at
        common = np.diff(shared.offsets)[session]
        theirs = np.minimum(shared.offsets[:-1][session] + at, len(shared.ids) - 1)
        return Prefixes(np.where(at < common, shared.ids[theirs], owned), offsets, size)


@dataclass(frozen=True, slots=True)
class _Turns:
    """Session after session, their turns in order. `prompt_tokens` has the history."""

    session: Tokens
    prompt_tokens: Tokens
    output_tokens: Tokens
    pause_s: Seconds

    def __len__(self) -> int:
        return len(self.session)

    def first(self, count: int) -> "_Turns":
        rows = slice(count)
        return _Turns(self.session[rows], self.prompt_tokens[rows], self.output_tokens[rows], self.pause_s[rows])


def _in_order(turns: _Turns, nominal_s: Seconds, prefixes: Prefixes) -> Requests:
    """By when they come at the earliest; a session's turns stay in order where that is the same."""
    order = np.argsort(nominal_s, kind="stable")
    row = np.empty(len(order), dtype=np.int64)
    row[order] = np.arange(len(order))
    follows = np.roll(row, 1)
    follows[_firsts(turns.session)] = -1
    return Requests(
        arrival_s=nominal_s[order],
        prompt_tokens=turns.prompt_tokens[order],
        output_tokens=turns.output_tokens[order],
        prefixes=chosen(prefixes, order),
        follows=follows[order],
        pause_s=turns.pause_s[order],
    )


def _firsts(session: Tokens) -> Tokens:
    """The row of each session's first turn."""
    return np.flatnonzero(np.diff(session, prepend=-1))


def _within(values: npt.NDArray[NumberT], session: Tokens) -> npt.NDArray[NumberT]:
    """Sums up to each turn, within its session."""
    total = np.cumsum(values)
    firsts = _firsts(session)
    before = total[firsts] - values[firsts]
    return np.asarray(total - np.repeat(before, np.diff(firsts, append=len(session))), dtype=values.dtype)


_SAMPLE = 20_000
_BLOCK_TOKENS = 16
_STREAMS = 6
