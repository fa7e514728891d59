"""Which versions of the worker protocol this release speaks, and which of them a worker and a router use. Pure.

A release that raises the highest version keeps the one before it, so that routers and workers of neighbouring releases
serve together while a fleet is being upgraded. What may only be said to a side that speaks a version depends on the one
agreed on, never on what somebody's release is called. A field that whoever does not know it may ignore needs none.
"""

from splitserve.core.errors import JoinRefused
from splitserve.core.versions import Versions
from splitserve.rpc.convert import PROTOCOL_VERSION

FIELD = "protocol_version"


SPOKEN = Versions(4, PROTOCOL_VERSION)


def agreed(worker: Versions, router: Versions) -> int:
    """The highest version that both speak. Raises JoinRefused, which says what to upgrade, if there is none."""
    version = worker.common(router)
    if version is not None:
        return version
    older = "router" if router.highest < worker.lowest else "worker"
    raise JoinRefused(
        FIELD, f"the worker speaks {worker} and this router {router}; upgrade the {older} to a release that speaks both"
    )
