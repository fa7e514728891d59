"""What a worker says of its prefix cache: values. A block is named by its engine's own hash, of 64 bits."""

from collections.abc import Sequence
from dataclasses import dataclass

Extra = tuple[str, ...] | None  # what else than its tokens a block is keyed by


@dataclass(frozen=True, slots=True)
class Stored:
    """These blocks are cached, each after the one before it and the first after `parent` (None: it begins a prompt).
    `tokens` are those of all of them, 32 bits each; `extras` is empty where no block has any."""

    hashes: Sequence[int]
    parent: int | None
    tokens: Sequence[int]
    block_size: int
    extras: Sequence[Extra] = ()


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Cleared:
    """The worker has nothing cached any more."""


CacheEvent = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class CacheNews:
    """One batch of a worker's stream, which counts them from 0."""

    number: int
    events: Sequence[CacheEvent]
