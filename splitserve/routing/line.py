"""In which order requests wait for a route: by priority, then the earliest due first. Pure values.

A request is due when its TTFT objective says so. One that can't be in time any more when its turn comes lets those pass
that can, once: it is due again after `PUT_OFF` times its objective. So a burst costs the requests that it makes late
and not all that follow; and nobody waits for ever, since what comes later is due later.
"""

from math import isinf
from typing import NamedTuple

NO_OBJECTIVE_S = 60.0  # after its arrival one without an objective is due
PUT_OFF = 4.0  # times its objective


class Place(NamedTuple):
    """The least goes first; `number` is that of its arrival. `first_token_s`: its objective."""

    priority: int
    due: float
    number: int
    arrived_at: float
    first_token_s: float
    put_off: bool = False

    @classmethod
    def of(cls, priority: int, arrived_at: float, first_token_s: float, number: int) -> "Place":
        patience_s = NO_OBJECTIVE_S if isinf(first_token_s) else first_token_s
        return cls(priority, arrived_at + patience_s, number, arrived_at, first_token_s)

    def after(self, first_token_at: float) -> "Place":
        """Where it stands if its first token would come then: behind those in time, unless it was put off before."""
        if self.put_off or isinf(self.first_token_s) or first_token_at <= self.due:
            return self
        return self._replace(due=self.arrived_at + PUT_OFF * self.first_token_s, put_off=True)
