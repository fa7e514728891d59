"""Which prompts begin alike: from a trace's block hashes, or made up from a share."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitserve.core.errors import ConfigError
from splitserve.workload.lengths import Tokens
from splitserve.workload.requests import Prefixes, Requests


@dataclass(frozen=True, slots=True)
class Sharing:
    """The first `share` of each prompt is its group's, whose longest member the others are prefixes of. There are
    `groups` at a time, equally popular. With `turns`, a group ends after as many requests and another takes its place,
    as sessions do; without, groups last, as system prompts do. A group's first prompt hits nothing, and a longer one
    only as far as those before it: so with few turns, less than `share` can be found in any cache."""

    share: float
    groups: int = 16
    turns: int | None = None
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ConfigError("shared", f"{self.share:g} is not a share above 0 and up to 1 of a prompt's tokens")
        for name, value in (("groups", self.groups), ("turns", self.turns), ("block", self.block_tokens)):
            if value is not None and value < 1:
                raise ConfigError(name, f"{value} is not a number of 1 or more")

    def draw(self, prompt_tokens: Tokens, rng: np.random.Generator) -> Prefixes:
        """Whole blocks only: the share is rounded to the nearest."""
        group = self._groups(rng.integers(0, self.groups, len(prompt_tokens)))
        blocks = np.rint(self.share * prompt_tokens / self.block_tokens).astype(np.int64)
        blocks = np.minimum(blocks, prompt_tokens // self.block_tokens)
        offsets = offsets_of(blocks)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], blocks)
        longest = int(blocks.max(initial=0))
        return Prefixes(np.repeat(group * longest, blocks) + within, offsets, self.block_tokens)

    def __str__(self) -> str:
        turns = "" if self.turns is None else f",turns={self.turns}"
        return f"shared={self.share:g},groups={self.groups}{turns},block={self.block_tokens}"

    def _groups(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which group each request is of, where `slots` says which of those that live at a time."""
        if self.turns is None:
            return slots
        order = np.argsort(slots, kind="stable")
        sizes = np.bincount(slots, minlength=self.groups)
        turn = np.arange(len(slots)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # how many of the slot came before
        generation = np.empty(len(slots), dtype=np.int64)
        generation[order] = turn // self.turns
        return slots + generation * self.groups


def offsets_of(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each of consecutive runs starts, and where the last one ends."""
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)))


def chosen(prefixes: Prefixes, requests: npt.NDArray[np.int64]) -> Prefixes:
    """Those of the given requests, in that order."""
    sizes = np.diff(prefixes.offsets)[requests]
    offsets = offsets_of(sizes)
    source = np.repeat(prefixes.offsets[:-1][requests] - offsets[:-1], sizes) + np.arange(offsets[-1])
    return Prefixes(prefixes.ids[source], offsets, prefixes.block_tokens)


def history_blocks(requests: Requests) -> Tokens:
    """Of each prompt, the leading blocks that the turn before it read or wrote; 0 for a first turn. The KV of an
    answer's last token was never computed."""
    if requests.prefixes is None:
        return np.zeros(len(requests), dtype=np.int64)
    return np.asarray(np.maximum(requests.history_tokens - 1, 0) // requests.prefixes.block_tokens)


def repeated_share(prefixes: Prefixes, prompt_tokens: Tokens, history: Tokens | None = None) -> float:
    """The share of prompt tokens in leading blocks that an earlier prompt had, or in the so many of its `history`: what
    one cache without bound would hit. A prompt's last token is always computed, so at most all but one of its tokens
    count."""
    if not len(prompt_tokens) or not len(prefixes.ids):
        return 0.0
    sizes = np.diff(prefixes.offsets)
    _, first, which = np.unique(prefixes.ids, return_index=True, return_inverse=True)
    new = first[which] >= np.repeat(prefixes.offsets[:-1], sizes)
    hits = np.maximum(_leading(~new, prefixes.offsets), 0 if history is None else history)
    return float(np.minimum(hits * prefixes.block_tokens, prompt_tokens - 1).sum() / prompt_tokens.sum())


def _leading(held: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Per run, how many of its first are all held."""
    misses = np.flatnonzero(~held)
    next_miss = np.append(misses, len(held))[np.searchsorted(misses, offsets[:-1])]
    return np.asarray(np.minimum(next_miss, offsets[1:]) - offsets[:-1])
