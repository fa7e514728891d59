"""What an operator may look at without gRPC: the console's way into the router of its own process.

The same answers, for the same keys, as the Admin service gives.
"""

from collections.abc import Callable

from splitserve.core.fleet import FleetStatus, RunningRequests
from splitserve.router.access import AccessControl
from splitserve.router.keys import Scope
from splitserve.router.running import Running

USUAL_REQUESTS = 100
MOST_REQUESTS = 1000


class Oversight:
    """`bearer` is the API key that came with the call, "" without one. Raises Unauthenticated or PermissionDenied."""

    def __init__(self, status: Callable[[], FleetStatus], running: Running, access: AccessControl) -> None:
        self._status = status
        self._running = running
        self._access = access

    async def fleet(self, bearer: str = "") -> FleetStatus:
        self._access.identify(bearer, Scope.ADMIN)
        return self._status()

    async def requests(self, most: int = USUAL_REQUESTS, bearer: str = "") -> RunningRequests:
        """The newest ones that wait or run, no more than `MOST_REQUESTS`."""
        self._access.identify(bearer, Scope.ADMIN)
        return self._running.newest(listed(most))


def listed(most: int) -> int:
    """How many are told of, of whom so many were asked for; 0 is for who says nothing."""
    return min(most or USUAL_REQUESTS, MOST_REQUESTS)
