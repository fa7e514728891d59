"""As much of a gRPC client as a load needs: many server-streamed calls over one HTTP/2 connection, in plain Python.

grpcio takes 70 to 100 µs of CPU for a message, as much as the router under test: it would measure itself. Here a
message takes a few, since nothing is decoded but the last of a stream. Windows are as large as they can be, so nothing
waits for this client's word. Header blocks are sent without compression; those received are not read: whether a call
went well is told by its last message. One event loop.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import cast

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_LARGEST_WINDOW = 2**31 - 1
_FIRST_WINDOW = 65535
_INITIAL_WINDOW_SIZE, _ENABLE_PUSH = 4, 2  # names of settings
_FRAME_HEAD = 9
_MESSAGE_HEAD = 5

OnMessage = Callable[[bytes], None]
OnEnd = Callable[[], None]


class _Call:
    """One stream: whole messages go on as they come, without their frame."""

    def __init__(self, on_message: OnMessage, on_end: OnEnd) -> None:
        self.on_end = on_end
        self._on_message = on_message
        self._begun = b""

    def take(self, data: bytes) -> None:
        if self._begun:
            data = self._begun + data
        at = 0
        while len(data) - at >= _MESSAGE_HEAD:
            end = at + _MESSAGE_HEAD + int.from_bytes(data[at + 1 : at + _MESSAGE_HEAD], "big")
            if end > len(data):
                break
            self._on_message(data[at + _MESSAGE_HEAD : end])
            at = end
        self._begun = data[at:]


class Connection(asyncio.Protocol):
    """`on_lost` is called if the connection ends, with what was heard of the reason."""

    def __init__(self, authority: str, on_lost: Callable[[str], None]) -> None:
        self._authority = authority
        self._on_lost = on_lost
        self._received = b""
        self._calls: dict[int, _Call] = {}
        self._next_stream = 1
        self._reason = "the connection was closed"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        settings = struct.pack(">HIHI", _ENABLE_PUSH, 0, _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW)
        window = struct.pack(">I", _LARGEST_WINDOW - _FIRST_WINDOW)
        self._transport.write(_PREFACE + frame(_SETTINGS, 0, 0, settings) + frame(_WINDOW, 0, 0, window))

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost(str(error) if error is not None else self._reason)

    def call(self, path: str, message: bytes, on_message: OnMessage, on_end: OnEnd) -> None:
        """Sends one request. `on_end` is called when the server has ended the stream, however."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._calls[stream] = _Call(on_message, on_end)
        body = struct.pack(">BI", 0, len(message)) + message
        self._transport.write(
            frame(_HEADERS, _END_HEADERS, stream, header_block(path, self._authority))
            + frame(_DATA, _END_STREAM, stream, body)
        )

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        at = 0
        while len(data) - at >= _FRAME_HEAD:
            end = at + _FRAME_HEAD + int.from_bytes(data[at : at + 3], "big")
            if end > len(data):
                break
            stream = int.from_bytes(data[at + 5 : at + _FRAME_HEAD], "big")
            self._on_frame(data[at + 3], data[at + 4], stream, data[at + _FRAME_HEAD : end])
            at = end
        self._received = data[at:]

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            self._calls[stream].take(payload)
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._transport.write(frame(kind, _ACK, 0, payload if kind == _PING else b""))
        elif kind == _GOAWAY:
            self._reason = f"the server said GOAWAY: {payload[8:].decode('latin-1')}"
        ended = kind == _RESET or (kind in (_DATA, _HEADERS) and flags & _END_STREAM)
        if ended and (call := self._calls.pop(stream, None)) is not None:
            call.on_end()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(path: str, authority: str) -> bytes:
    """HPACK (RFC 7541): `:method POST` and `:scheme http` are in its table, the rest is written out."""
    fields = ((":path", path), (":authority", authority), ("content-type", "application/grpc"), ("te", "trailers"))
    return b"\x83\x86" + b"".join(b"\x00" + _string(name) + _string(value) for name, value in fields)


def _string(text: str) -> bytes:
    encoded = text.encode()
    assert len(encoded) < 127, "longer strings take more than one byte of length"
    return bytes([len(encoded)]) + encoded
