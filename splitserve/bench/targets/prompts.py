"""Prompts made of random tokens, as a workload says them. Pure."""

import numpy as np
import numpy.typing as npt

from splitserve.workload.lengths import Tokens
from splitserve.workload.requests import Requests


def prompt_ids(requests: Requests, index: int, vocabulary: int, seed: int = 0) -> Tokens:
    """As many token ids as the request's prompt has, each below `vocabulary`. Prompts share their leading blocks as
    `requests.prefixes` say, and are otherwise different; the same seed gives the same ones."""
    assert vocabulary > 1
    length = int(requests.prompt_tokens[index])
    own = np.random.default_rng((seed, _OWN, index)).integers(0, vocabulary, length)
    if requests.prefixes is None:
        return own
    blocks = requests.prefixes.of(index)
    shared = _of_blocks(blocks, requests.prefixes.block_tokens, vocabulary, seed)
    own[: len(shared)] = shared
    return own


def _of_blocks(blocks: Tokens, size: int, vocabulary: int, seed: int) -> Tokens:
    """Each block's tokens are its number's alone. All at once: a generator for each block would take a prompt of many
    blocks milliseconds, in which nothing is sent."""
    place = (blocks[:, None] * size + np.arange(size)).ravel().astype(np.uint64)
    start = np.random.SeedSequence((seed, _SHARED)).generate_state(1, np.uint64)
    return np.asarray(_mixed(place * _GOLDEN + start) % np.uint64(vocabulary), dtype=np.int64)


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output for each state (Steele, Lea and Flood, OOPSLA'14): neighbours come out unlike each other."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_OWN, _SHARED = 0, 1  # streams of random numbers
