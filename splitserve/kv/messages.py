"""Messages between KV control channels: msgpack by msgspec, versioned, size-limited. Nothing here is ever pickled.

A frame is the envelope `[version, sender uuid, recipient uuid, body]`; the body is a tagged union, so a frame says what
it is. Its version is the highest that both sides speak, as `KvPeer.control` says of each; a router pairs no workers
that have none in common. A release that raises the highest reads and writes the one before it too. What can't be
decoded raises `Malformed` with the kind to count it under; the channel drops it.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from splitserve.core.versions import Versions
from splitserve.core.worker import CONTROL_UNSAID, KvFormat, TransferStats
from splitserve.kv.layout import PROMPT_HASH_BYTES, Shard
from splitserve.kv.ticket import TransferKey

SPOKEN = Versions(2, 2)
MAX_MESSAGE_BYTES = 4 << 20

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Sentence = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, lt=1 << 40)]
BlockId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Digest = Annotated[bytes, Meta(min_length=PROMPT_HASH_BYTES, max_length=PROMPT_HASH_BYTES)]
Endpoint = Annotated[str, Meta(pattern=r"^tcp://(\[[0-9a-fA-F:]+\]|[0-9.]+):[0-9]{1,5}$", max_length=128)]


class Body(msgspec.Struct, frozen=True, array_like=True, tag=str.lower):
    """Base of every message."""


class Hello(Body, frozen=True):
    """Both, at join: who I am, how to reach me, how to write my memory, which versions I speak."""

    endpoint: Endpoint
    kv: KvFormat
    shard: Shard
    address: bytes
    control: Versions = CONTROL_UNSAID


class HelloReply(Body, frozen=True):
    """Answer to a Hello that asked for worker `asked`: my own side, or why we don't fit."""

    asked: Name
    kv: KvFormat
    shard: Shard
    address: bytes
    refused: Sentence = ""


class GroupTable(msgspec.Struct, frozen=True, array_like=True):
    """One group's `Table` in a Register."""

    first_block: Count
    blocks: Annotated[tuple[BlockId, ...], Meta(max_length=1 << 19)]


class TicketMessage(Body, frozen=True):
    """Base of messages about one transfer between two ranks."""

    transfer_id: Name
    epoch: Count

    @property
    def key(self) -> TransferKey:
        return TransferKey(self.transfer_id, self.epoch)


class Register(TicketMessage, frozen=True):
    """Destination to source: write the KV of these `tokens` tokens into my blocks, in every layer that we share."""

    prompt_hash: Digest
    tokens: Count
    tables: Annotated[tuple[GroupTable, ...], Meta(max_length=256)]
    deadline_s: float


class Progress(TicketMessage, frozen=True):
    """Source to destination: the claim is known; so many cells, summed over layers, are written."""

    written: Count = 0


class Done(TicketMessage, frozen=True):
    """Source to destination: every WRITE completed. Sent before the prefill ended, `stats.uncovered_s` is 0."""

    stats: TransferStats


class Failed(TicketMessage, frozen=True):
    """Source to destination: no WRITE is in flight, none will come."""

    reason: Name
    message: Sentence = ""


class Cancel(TicketMessage, frozen=True):
    """Destination to source: stop."""


class Cancelled(TicketMessage, frozen=True):
    """Source to destination: no WRITE is in flight, none will come."""


class Ping(Body, frozen=True):
    """Are you there? Answered by the channel's own thread."""


class Pong(Body, frozen=True):
    """I am."""


class Goodbye(Body, frozen=True):
    """I am ending in good order: no WRITE of mine is in flight."""


Message = Hello | HelloReply | Register | Progress | Done | Failed | Cancel | Cancelled | Ping | Pong | Goodbye
FromSource = Progress | Done | Failed | Cancelled
FromDestination = Register | Cancel


class Malformed(Exception):
    """A frame that can't be read. `kind` is what to count it under."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"unreadable KV control message: {kind}")
        self.kind = kind


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    version: int
    sender: Name
    recipient: Name
    body: msgspec.Raw


def version_difference(ours: Versions, theirs: Versions) -> str:
    """Why two workers can't tell each other anything; empty if they can."""
    if ours.common(theirs) is not None:
        return ""
    older = "here" if ours.highest < theirs.lowest else "there"
    return (
        f"KV control messages are of version {ours} here and {theirs} there; upgrade the worker {older} to a release "
        "that speaks both"
    )


class Codec:
    """Turns messages into frames and back. One per thread: msgspec's encoders are not shared."""

    def __init__(self, uuid: str, spoken: Versions = SPOKEN) -> None:
        self._uuid = uuid
        self._spoken = spoken
        self._encoder = msgspec.msgpack.Encoder()
        self._envelopes = msgspec.msgpack.Decoder(_Envelope)
        self._bodies: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

    def encode(self, recipient: str, message: Message, version: int | None = None) -> bytes:
        """A frame for this worker, of the highest version unless one is said. Raises Malformed("oversized") rather than
        make one that would be refused."""
        body = msgspec.Raw(self._encoder.encode(message))
        version = self._spoken.highest if version is None else version
        frame = self._encoder.encode(_Envelope(version, self._uuid, recipient, body))
        if len(frame) > MAX_MESSAGE_BYTES:
            raise Malformed("oversized")
        return frame

    def decode(self, frame: bytes) -> tuple[str, str, Message]:
        """Sender, recipient and message. Raises Malformed."""
        if len(frame) > MAX_MESSAGE_BYTES:
            raise Malformed("oversized")
        try:
            envelope = self._envelopes.decode(frame)
            if envelope.version not in self._spoken:
                raise Malformed("version")
            return envelope.sender, envelope.recipient, self._bodies.decode(envelope.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed("malformed") from error
