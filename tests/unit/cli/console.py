"""The console script run within the test's own process, and what came of it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Done:
    code: object
    out: str
    err: str


class Run(Protocol):
    def __call__(self, *arguments: str) -> Done: ...
