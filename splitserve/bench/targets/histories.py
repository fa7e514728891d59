"""What the sessions in progress have said so far, of which their next prompts are made. One event loop's; no I/O.

A session is held from one turn's answer to the next turn's prompt, and no longer: one that fails is never held.
"""

from collections.abc import Sequence

import numpy as np

from splitserve.bench.targets.prompts import prompt_ids
from splitserve.workload.requests import Requests


class Histories:
    """Of requests with sessions. A later turn's prompt is the prompt before it, the answer that the server gave, and
    new made-up tokens; each part as long as the workload says."""

    def __init__(self, requests: Requests, vocabulary: int, seed: int) -> None:
        self._requests, self._vocabulary, self._seed = requests, vocabulary, seed
        self._next_turn = requests.next_turn.tolist()
        self._history_tokens = requests.history_tokens.tolist()
        self._said: dict[int, list[int]] = {}  # by the turn that it is the history of

    def __len__(self) -> int:
        """How many sessions are held."""
        return len(self._said)

    def prompt(self, index: int) -> list[int]:
        """A later turn's can be asked for once, after `answered` of the turn before it."""
        if not self._history_tokens[index]:
            return list(prompt_ids(self._requests, index, self._vocabulary, self._seed).tolist())
        new = int(self._requests.prompt_tokens[index]) - self._history_tokens[index]
        return self._said.pop(index) + self._made_up(_NEW, index, new)

    def answered(self, index: int, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """What came for a prompt that `prompt` gave. Where the server has not said which tokens came, or not all, the
        rest is made up: what it has cached of them it then can't find."""
        following = self._next_turn[index]
        if following < 0:
            return
        length = int(self._requests.output_tokens[index])
        missing = self._made_up(_ANSWER, index, length - min(length, len(answer)))
        self._said[following] = [*prompt, *answer[:length], *missing]

    def _made_up(self, part: int, index: int, tokens: int) -> list[int]:
        random = np.random.default_rng((self._seed, part, index))
        return random.integers(0, self._vocabulary, tokens).tolist() if tokens else []


_NEW, _ANSWER = 2, 3  # streams of random numbers beside those of `prompts`
