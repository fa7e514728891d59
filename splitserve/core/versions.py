"""Ranges of protocol versions, which two sides of neighbouring releases agree within. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Versions:
    """From the lowest to the highest, both included."""

    lowest: int
    highest: int

    def __str__(self) -> str:
        return f"{self.lowest}" if self.lowest == self.highest else f"{self.lowest} to {self.highest}"

    def __contains__(self, version: int) -> bool:
        return self.lowest <= version <= self.highest

    def common(self, other: "Versions") -> int | None:
        """The highest that both speak; None if there is none."""
        version = min(self.highest, other.highest)
        return version if version in self and version in other else None
