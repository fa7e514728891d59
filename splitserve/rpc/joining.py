"""The first message of a worker that attaches, read by whoever it attaches to."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from splitserve.core.errors import DeadlineExceeded, InvalidRequest, JoinRefused
from splitserve.core.versions import Versions
from splitserve.core.worker import WorkerInfo
from splitserve.rpc import convert
from splitserve.rpc.gen import worker_pb2
from splitserve.rpc.protocol import SPOKEN, agreed

_JOIN_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Joined:
    worker: WorkerInfo
    protocol_version: int  # what the two sides use


async def joined(messages: AsyncIterator[worker_pb2.WorkerMessage], spoken: Versions = SPOKEN) -> Joined:
    """Raises JoinRefused, or DeadlineExceeded if the first message does not come. `spoken`: by this side."""
    try:
        async with asyncio.timeout(_JOIN_WITHIN_S):
            first = await anext(messages, None)
    except TimeoutError as error:
        raise DeadlineExceeded(f"no join within {_JOIN_WITHIN_S:g} s of attaching") from error
    if first is None or not first.HasField("join"):
        raise JoinRefused("join", "is missing; a worker's first message must have it")
    join = first.join
    version = agreed(Versions(join.protocol_version, join.max_protocol_version or join.protocol_version), spoken)
    try:
        return Joined(convert.worker_info_from_proto(join.worker), version)
    except InvalidRequest as error:
        raise JoinRefused(error.field, error.message) from error
