"""When to ask a peer for a sign of life, when to call it silent. Pure; owned by the control thread.

Silence proves nothing: a stopped process may wake and write. Only a refused connection, another worker at its endpoint
or its own Goodbye prove that it has ended (`control.py`).
"""

from dataclasses import dataclass
from enum import Enum, auto

ASKS_PER_SILENCE = 5
UNANSWERED_BEFORE_PROBE = 1.5  # intervals


class Health(Enum):
    GREETING = auto()  # Hello sent, nothing heard yet
    ALIVE = auto()
    SILENT = auto()
    REFUSED = auto()  # it does not fit; no more is asked of it


class Need(Enum):
    ASK = auto()  # send Hello or Ping
    PROBE = auto()  # see whether its endpoint still takes connections
    FELL_SILENT = auto()  # tell


@dataclass(slots=True)
class Liveness:
    """One peer's. `silent_s` without a word makes it silent."""

    silent_s: float
    heard_at: float
    health: Health = Health.GREETING
    asked_at: float = 0.0

    @property
    def interval_s(self) -> float:
        return self.silent_s / ASKS_PER_SILENCE

    def heard(self, now: float) -> bool:
        """Any message from it. True when it had been silent."""
        self.heard_at = now
        woke = self.health is Health.SILENT
        if woke:
            self.health = Health.ALIVE
        return woke

    def due(self, now: float) -> list[Need]:
        """What to do now; asking and falling silent are noted as done."""
        if self.health is Health.REFUSED or now - self.asked_at < self.interval_s:
            return []
        self.asked_at = now
        needs = [Need.ASK]
        if now - self.heard_at > UNANSWERED_BEFORE_PROBE * self.interval_s:
            needs.append(Need.PROBE)
        if self.health is Health.ALIVE and now - self.heard_at > self.silent_s:
            self.health = Health.SILENT
            needs.append(Need.FELL_SILENT)
        return needs
