"""Which versions of the worker protocol this release speaks, and which of them a worker and a router use. Pure.

A release that raises the highest version keeps the one before it, so that routers and workers of neighbouring releases
serve together while a fleet is being upgraded. What may only be said to a side that speaks a version depends on the one
agreed on, never on what somebody's release is called. A field that whoever does not know it may ignore needs none.
"""

from dataclasses import dataclass

from splitserve.core.errors import JoinRefused
from splitserve.rpc.convert import PROTOCOL_VERSION

FIELD = "protocol_version"


@dataclass(frozen=True, slots=True)
class Versions:
    """From the lowest to the highest, both included."""

    lowest: int
    highest: int

    def __str__(self) -> str:
        return f"{self.lowest}" if self.lowest == self.highest else f"{self.lowest} to {self.highest}"

    def __contains__(self, version: int) -> bool:
        return self.lowest <= version <= self.highest


SPOKEN = Versions(4, PROTOCOL_VERSION)


def agreed(worker: Versions, router: Versions) -> int:
    """The highest version that both speak. Raises JoinRefused, which says what to upgrade, if there is none."""
    version = min(worker.highest, router.highest)
    if version in worker and version in router:
        return version
    older = "router" if router.highest < worker.lowest else "worker"
    raise JoinRefused(
        FIELD, f"the worker speaks {worker} and this router {router}; upgrade the {older} to a release that speaks both"
    )
