"""The first message of a worker that attaches, read by whoever it attaches to."""

import asyncio
from collections.abc import AsyncIterator

from splitserve.core.errors import DeadlineExceeded, InvalidRequest, JoinRefused
from splitserve.core.worker import WorkerInfo
from splitserve.rpc import convert
from splitserve.rpc.gen import worker_pb2

_JOIN_WITHIN_S = 10.0


async def joining(messages: AsyncIterator[worker_pb2.WorkerMessage]) -> WorkerInfo:
    """The first message's worker. Raises JoinRefused, or DeadlineExceeded if it does not come."""
    try:
        async with asyncio.timeout(_JOIN_WITHIN_S):
            first = await anext(messages, None)
    except TimeoutError as error:
        raise DeadlineExceeded(f"no join within {_JOIN_WITHIN_S:g} s of attaching") from error
    if first is None or not first.HasField("join"):
        raise JoinRefused("join", "is missing; a worker's first message must have it")
    if first.join.protocol_version != convert.PROTOCOL_VERSION:
        theirs, ours = first.join.protocol_version, convert.PROTOCOL_VERSION
        raise JoinRefused("protocol_version", f"{theirs}, but this router speaks {ours}; use one splitserve version")
    try:
        return convert.worker_info_from_proto(first.join.worker)
    except InvalidRequest as error:
        raise JoinRefused(error.field, error.message) from error
