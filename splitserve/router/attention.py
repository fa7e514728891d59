"""Whether the router itself was there to hear its workers. Pure state of its watch; seconds on the caller's clock.

A router that the machine gave no time for a while has heard nobody. What they said meanwhile lies in its sockets, and
must be read before anyone is called silent.
"""

_LATE_SHARE = 0.25  # of the heartbeat timeout: who looks up later than that was not there


class Attention:
    def __init__(self, gap_s: float, heartbeat_timeout_s: float, now: float) -> None:
        """It means to look up every `gap_s`."""
        self._late_s = gap_s + _LATE_SHARE * heartbeat_timeout_s
        self._timeout_s = heartbeat_timeout_s
        self._looked_at = self._there_since = now

    def looks_up(self, now: float) -> bool:
        """Whether it has been there for so long that a worker it has not heard is silent."""
        if now - self._looked_at > self._late_s:
            self._there_since = now
        self._looked_at = now
        return now - self._there_since >= self._timeout_s
