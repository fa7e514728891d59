"""Prompts made of random tokens, as a workload says them. Pure."""

import numpy as np

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
    size = requests.prefixes.block_tokens
    blocks = requests.prefixes.of(index).tolist()
    for position, block in enumerate(blocks):
        shared = np.random.default_rng((seed, _SHARED, block)).integers(0, vocabulary, size)
        own[position * size : (position + 1) * size] = shared
    return own


_OWN, _SHARED = 0, 1  # streams of random numbers
