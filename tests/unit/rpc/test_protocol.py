"""Which version of the worker protocol two sides use."""

from collections.abc import AsyncIterator

import pytest

from splitserve.core.errors import JoinRefused
from splitserve.core.versions import Versions
from splitserve.core.worker import Pool
from splitserve.rpc import convert
from splitserve.rpc.gen import worker_pb2
from splitserve.rpc.joining import joined
from splitserve.rpc.protocol import SPOKEN, agreed
from tests.unit.router.scripted import worker_info


@pytest.mark.parametrize(
    ("worker", "router", "used"),
    [
        (Versions(4, 4), Versions(4, 4), 4),
        (Versions(4, 5), Versions(4, 5), 5),
        (Versions(3, 4), Versions(4, 5), 4),
        (Versions(5, 6), Versions(4, 5), 5),
        (Versions(4, 4), Versions(3, 6), 4),
        (Versions(3, 6), Versions(4, 4), 4),
    ],
)
def test_the_highest_version_that_both_speak_is_used(worker: Versions, router: Versions, used: int) -> None:
    assert agreed(worker, router) == agreed(router, worker) == used


@pytest.mark.parametrize(
    ("worker", "router", "says"),
    [
        (Versions(5, 6), Versions(3, 4), "the worker speaks 5 to 6 and this router 3 to 4; upgrade the router"),
        (Versions(2, 3), Versions(4, 4), "the worker speaks 2 to 3 and this router 4; upgrade the worker"),
        (Versions(6, 5), Versions(5, 6), "the worker speaks 6 to 5"),
        (Versions(0, 0), Versions(4, 4), "upgrade the worker"),
    ],
)
def test_sides_without_a_common_version_are_told_which_to_upgrade(
    worker: Versions, router: Versions, says: str
) -> None:
    with pytest.raises(JoinRefused, match=f"^protocol_version: .*{says}"):
        agreed(worker, router)


@pytest.mark.parametrize(("lowest", "highest", "used"), [(4, 0, 4), (4, 5, 5), (3, 4, 4), (5, 7, 5)])
async def test_a_join_is_read_by_the_range_that_it_says(lowest: int, highest: int, used: int) -> None:
    """0: a worker of before there was a range."""

    async def messages() -> AsyncIterator[worker_pb2.WorkerMessage]:
        info = convert.worker_info_to_proto(worker_info("d0", Pool.DECODE))
        join = worker_pb2.Join(protocol_version=lowest, max_protocol_version=highest, worker=info)
        yield worker_pb2.WorkerMessage(join=join)

    join = await joined(messages(), Versions(4, 5))
    assert (join.worker.name, join.protocol_version) == ("d0", used)


def test_what_this_release_speaks_is_a_range_that_ends_at_its_own_version() -> None:
    assert SPOKEN.highest == convert.PROTOCOL_VERSION
    assert SPOKEN.lowest <= SPOKEN.highest
