"""KV transport over TCP, for memory that no peer can map: one-sided WRITEs between hosts without torch or NIXL.

Used by the simulated engine where `kv_transfer.host` is not loopback. Not for a model's KV: that is NIXL's.

Whoever writes opens the connection. Four messages: the listener's nonce; the writer's Hello, which proves with it that
it was told the listener's cookie (that comes over the encrypted control channel); WRITEs, which carry their bytes; and
the listener's words, of which 0 welcomes and any other number says that this WRITE is in its memory.

A connection that breaks leaves open which WRITEs have arrived, and a late one must never fall into a block that was
given to somebody else since. So they stay in flight until the peer welcomes the next connection: before it does it lets
go of the former one, of which nothing arrives any more. `disconnect` lets go likewise of what an ended peer had sent,
and its process, should it turn up after all, is not welcomed again.

Everything here runs on the transfer thread, a little at each `write`, `poll` and `progress`, and never blocks.
"""

import hmac
import secrets
import selectors
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from splitserve.kv.blocks import Blocks, Grid, check_slice
from splitserve.kv.layout import Slice
from splitserve.kv.streams import Listener, Stream
from splitserve.kv.transport import Fence, TransportError, WriteState

MOST_MESSAGE_BYTES = 256 * 1024 * 1024
REDIAL_S = 0.2  # after a connection broke or was refused; whether its peer has ended is the control channel's to say
MOST_STRANGERS = 256  # connections that have proved nothing yet
REMEMBERED_ENDED = 4096
_HELLO_BYTES = 512  # the most that one of these may send
_COOKIE_BYTES = _NONCE_BYTES = _PROOF_BYTES = 16

_SIZE = struct.Struct("!I")
_WORD = struct.Struct("!Q")
_WRITE = struct.Struct("!QI")  # number, runs
_RUN = struct.Struct("!QI")  # offset in the destination's memory, bytes
_WELCOME = 0


class _Address(msgspec.Struct, frozen=True, array_like=True):
    host: str
    port: int
    cookie: bytes
    layers: int
    blocks: int
    block_bytes: int


@dataclass(slots=True, eq=False)
class _Write:
    link: "_Link"
    number: int
    message: bytes
    state: WriteState = WriteState.IN_FLIGHT


@dataclass(slots=True, eq=False)
class _Link:
    """Towards one peer. `sent`: by this connection or one before it, and not known to have arrived; `queued`: not sent
    yet, because nobody has welcomed us."""

    address: _Address
    grid: Grid
    cut: Slice
    stream: Stream | None = None
    greeted: bool = False
    welcomed: bool = False
    redial_at: float = 0.0
    queued: deque[_Write] = field(default_factory=deque)
    sent: dict[int, _Write] = field(default_factory=dict)

    def hang_up(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream, self.greeted, self.welcomed = None, False, False


@dataclass(slots=True, eq=False)
class _Session:
    """Of one who writes here. `peer` is empty until it has proved that it may; `size`: of the message under way."""

    stream: Stream
    nonce: bytes
    peer: str = ""
    size: int | None = None


class _Broken(Exception):
    """A connection is over, or what came on it is none of our messages."""


class TcpTransport:
    """A `Transport` of these blocks, which their owner may read and write from any thread. Raises ConfigError, naming
    the host, when it can't listen there."""

    def __init__(self, uuid: str, host: str, blocks: Blocks, clock: Callable[[], float] = time.monotonic) -> None:
        self._uuid = uuid
        self._own = blocks
        self._clock = clock
        self._numbers = 0
        self._links: dict[str, _Link] = {}
        self._sessions: set[_Session] = set()
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._listener = Listener(host)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._cookie, grid = secrets.token_bytes(_COOKIE_BYTES), blocks.grid
        address = _Address(*self._listener.address, self._cookie, grid.layers, grid.blocks, grid.block_bytes)
        self._address = msgspec.msgpack.encode(address)

    @property
    def address(self) -> bytes:
        return self._address

    def connect(self, peer: str, address: bytes, cut: Slice) -> None:
        if peer in self._links:
            return
        theirs = _decode(address)
        grid = Grid(theirs.layers, theirs.blocks, theirs.block_bytes)
        check_slice(cut, self._own.grid, grid)
        link = self._links[peer] = _Link(theirs, grid, cut)
        self._advance(link)

    def disconnect(self, peer: str) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            link.hang_up()
            _fail([*link.sent.values(), *link.queued])
        for session in [session for session in self._sessions if session.peer == peer]:
            self._let_go(session)
        self._ended[peer] = None
        while len(self._ended) > REMEMBERED_ENDED:
            self._ended.popitem(last=False)

    def write(self, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        """The bytes are those of now, however long it is in flight."""
        link = self._links.get(peer)
        if link is None:
            raise TransportError(f"worker {peer} is not connected")
        self._numbers += 1
        write = _Write(link, self._numbers, self._message(link, layer, source, destination))
        link.queued.append(write)
        self._advance(link)
        return write

    def poll(self, handle: object) -> WriteState:
        assert isinstance(handle, _Write)
        if handle.state is WriteState.IN_FLIGHT:
            self._advance(handle.link)
        return handle.state

    def progress(self) -> None:
        """Takes what peers write, and helps our own connections come about."""
        for key, _ in self._selector.select(0):
            if key.data is None:
                self._accept()
            else:
                self._serve(key.data)
        for session in [session for session in self._sessions if not session.stream.flushed]:
            self._serve(session)
        for link in self._links.values():
            if not link.welcomed:
                self._advance(link)

    def land(self, blocks: Sequence[Sequence[int]]) -> Fence | None:
        """What has arrived is where the owner reads."""
        return None

    def close(self) -> None:
        for peer in list(self._links):
            self.disconnect(peer)
        for session in list(self._sessions):
            self._let_go(session)
        self._selector.close()
        self._listener.close()

    # Writing ---------------------------------------------------------------------------------------------------------
    def _message(self, link: _Link, layer: int, source: Sequence[int], destination: Sequence[int]) -> bytes:
        cut, here, there = link.cut, self._own.grid, link.grid
        content = [self._own.at(run) for cell in source for run in here.runs(cut, cut.source, layer, cell)]
        runs = [_RUN.pack(*run) for cell in destination for run in there.runs(cut, cut.destination, layer, cell)]
        size = _WRITE.size + len(runs) * _RUN.size + sum(map(len, content))
        if size > MOST_MESSAGE_BYTES:
            raise TransportError(f"a WRITE of {size} bytes is too long for TCP; lower kv_transfer.write_mib")
        return b"".join([_SIZE.pack(size), _WRITE.pack(self._numbers, len(runs)), *runs, *content])

    def _advance(self, link: _Link) -> None:
        """As far as it goes without waiting."""
        try:
            if link.stream is None:
                if self._clock() < link.redial_at:
                    return
                link.stream = Stream.dialled(link.address.host, link.address.port)
            ended = link.stream.read()
            self._hear(link, link.stream)
            if ended:
                raise _Broken("the peer hung up")
            while link.welcomed and link.queued:
                write = link.queued.popleft()
                link.sent[write.number] = write
                link.stream.put(write.message)
            link.stream.flush()
        except (OSError, _Broken):
            link.hang_up()
            link.redial_at = self._clock() + REDIAL_S

    def _hear(self, link: _Link, stream: Stream) -> None:
        if not link.greeted and (nonce := stream.take(_NONCE_BYTES)) is not None:
            link.greeted = True
            hello = _proof(link.address.cookie, nonce, self._uuid) + self._uuid.encode()
            stream.put(_SIZE.pack(len(hello)) + hello)
        while link.greeted and (word := stream.take(_WORD.size)) is not None:
            (number,) = _WORD.unpack(word)
            if number == _WELCOME:
                link.welcomed = True
                _fail(link.sent.values())  # by a former connection, of which nothing arrives any more
                link.sent.clear()
            elif (write := link.sent.pop(number, None)) is not None:
                write.state, write.message = WriteState.DONE, b""

    # Being written to ------------------------------------------------------------------------------------------------
    def _accept(self) -> None:
        while (stream := self._listener.accept()) is not None:
            if sum(not session.peer for session in self._sessions) >= MOST_STRANGERS:
                stream.close()
                continue
            session = _Session(stream, secrets.token_bytes(_NONCE_BYTES))
            self._sessions.add(session)
            self._selector.register(stream, selectors.EVENT_READ, session)
            stream.put(session.nonce)
            self._serve(session)

    def _serve(self, session: _Session) -> None:
        if session not in self._sessions:  # let go of a moment ago, for its peer's next connection
            return
        try:
            ended = session.stream.read()
            while (message := _next_message(session)) is not None:
                said = self._place(message) if session.peer else self._welcome(session, message)
                session.stream.put(_WORD.pack(said))
            if ended:
                raise _Broken("the peer hung up")
            session.stream.flush()
        except (OSError, _Broken):
            self._let_go(session)

    def _welcome(self, session: _Session, hello: bytes) -> int:
        """Its peer's former connection is over before anything of this one is read."""
        peer = hello[_PROOF_BYTES:].decode(errors="replace")
        if not peer or not hmac.compare_digest(hello[:_PROOF_BYTES], _proof(self._cookie, session.nonce, peer)):
            raise _Broken("it does not know the cookie")
        if peer in self._ended:
            raise _Broken("its process has ended, as far as anybody here knows")
        for former in [each for each in self._sessions if each.peer == peer]:
            self._let_go(former)
        session.peer = peer
        return _WELCOME

    def _place(self, message: bytes) -> int:
        """Copies a WRITE to where it belongs; returns its number. Nothing is written of one that is not whole, or that
        names memory which is not there."""
        try:
            number, count = _WRITE.unpack_from(message)
            begin = _WRITE.size + count * _RUN.size
            runs = list(_RUN.iter_unpack(message[_WRITE.size : begin]))
        except struct.error as error:
            raise _Broken("not a WRITE") from error
        total = self._own.grid.total_bytes
        fits = len(runs) == count and all(offset + size <= total for offset, size in runs)
        if number == _WELCOME or not fits or sum(size for _, size in runs) != len(message) - begin:
            raise _Broken("a WRITE that does not fit this memory")
        content = memoryview(message)
        for run in runs:
            self._own.at(run)[:] = content[begin : begin + run[1]]
            begin += run[1]
        return int(number)

    def _let_go(self, session: _Session) -> None:
        self._sessions.discard(session)
        self._selector.unregister(session.stream)
        session.stream.close()


def _next_message(session: _Session) -> bytes | None:
    """None until one is whole."""
    if session.size is None and (head := session.stream.take(_SIZE.size)) is not None:
        (session.size,) = _SIZE.unpack(head)
        if session.size > (MOST_MESSAGE_BYTES if session.peer else _HELLO_BYTES):
            raise _Broken("longer than any message")
    message = session.stream.take(session.size) if session.size is not None else None
    if message is not None:
        session.size = None
    return message


def _fail(writes: Iterable[_Write]) -> None:
    for write in writes:
        write.state, write.message = WriteState.FAILED, b""


def _proof(cookie: bytes, nonce: bytes, uuid: str) -> bytes:
    return blake2b(nonce + uuid.encode(), key=cookie, digest_size=_PROOF_BYTES).digest()


def _decode(address: bytes) -> _Address:
    try:
        theirs = msgspec.msgpack.decode(address, type=_Address)
    except msgspec.DecodeError as error:
        raise TransportError("the peer's address is not of a TCP transport") from error
    if len(theirs.cookie) != _COOKIE_BYTES or not 0 < theirs.port < 65536:
        raise TransportError("the peer's address is not of a TCP transport")
    return theirs
