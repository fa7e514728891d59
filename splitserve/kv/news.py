"""What the control thread learns of peers and tells the transfer thread: plain values."""

from dataclasses import dataclass

from splitserve.kv.layout import Shard
from splitserve.kv.messages import Message


@dataclass(frozen=True, slots=True)
class Received:
    sender: str
    message: Message


@dataclass(frozen=True, slots=True)
class PeerUp:
    """Said Hello and fits, or speaks again after silence."""

    uuid: str
    shard: Shard
    address: bytes


@dataclass(frozen=True, slots=True)
class PeerRefused:
    uuid: str
    message: str


@dataclass(frozen=True, slots=True)
class PeerSilent:
    uuid: str


@dataclass(frozen=True, slots=True)
class PeerEnded:
    uuid: str
    proof: str


@dataclass(frozen=True, slots=True)
class ChannelBroke:
    """A defect of ours ended the control thread."""

    error: Exception


News = ChannelBroke | Received | PeerUp | PeerRefused | PeerSilent | PeerEnded
