"""What nodes of one worker say to each other, beside what the connector's halves do (`kv/bridge`)."""

import msgspec

from splitserve.kv.bridge import Connect, FromConnector, HandOver


class Join(msgspec.Struct, tag="join", frozen=True):
    """Said by a node until it is welcome. `process` tells two of one rank apart; `alike`: what must be the same on all
    nodes, by setting."""

    node: int
    process: str
    host: str
    alike: dict[str, str]


class Waiting(msgspec.Struct, tag="waiting", frozen=True):
    """You are in; these nodes are not yet."""

    missing: tuple[int, ...]


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """All are in: build your ranks of this worker."""

    uuid: str


class Refused(msgspec.Struct, tag="refused", frozen=True):
    field: str
    message: str


class Alive(msgspec.Struct, tag="alive", frozen=True):
    """Said by both sides, every `BEAT_S`."""


class Leaving(msgspec.Struct, tag="leaving", frozen=True):
    """This node was told to end: the worker is to drain."""


class Broke(msgspec.Struct, tag="broke", frozen=True):
    """This node's ranks ended."""

    reason: str


class Over(msgspec.Struct, tag="over", frozen=True):
    """The worker ends, and every node with it."""

    reason: str
    failed: bool


class Heard(msgspec.Struct, tag="heard", frozen=True):
    """That it is over. Before that the leader keeps the connection: closing it may undo what was just sent."""


FromNode = Join | Heard | Alive | Leaving | Broke | FromConnector
ToNode = Waiting | Welcome | Refused | Alive | Over | Connect | HandOver
