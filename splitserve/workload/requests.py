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
    """In order of arrival. Times are seconds from the start."""

    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]  # at least 1
    prefixes: Prefixes | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)
