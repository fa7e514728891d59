"""TCP connections that never block: what has come, what is to go, and nothing of what it means. One thread's."""

import contextlib
import socket
from collections import deque

from splitserve.core.errors import ConfigError
from splitserve.kv.host import numeric_host

_BACKLOG = 1024
_READ_BYTES = 1 << 20
_READS_PER_TURN = 64
_SILENT_MS = 10_000  # a host that acknowledges nothing for so long: the connection is broken
_KEEPALIVE_S = 5


class Stream:
    """`heard` is what has come and nobody has taken yet."""

    def __init__(self, connection: socket.socket) -> None:
        """Raises OSError if it is broken already."""
        self._socket = connection
        self._outbox: deque[memoryview] = deque()
        self.heard = bytearray()
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_MS)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
        except OSError:
            connection.close()
            raise

    @classmethod
    def dialled(cls, host: str, port: int) -> "Stream":
        """Under way; a connection that does not come about is broken when it is read."""
        stream = cls(socket.socket(_family(host), socket.SOCK_STREAM))
        stream._socket.connect_ex((host, port))
        return stream

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> bool:
        """Takes in what is there; returns whether the other side has hung up. Raises OSError for a broken one."""
        for _ in range(_READS_PER_TURN):
            try:
                content = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return False
            if not content:
                return True
            self.heard += content
        return False

    def take(self, size: int) -> bytes | None:
        """So many bytes of what was heard; None until they are there."""
        if len(self.heard) < size:
            return None
        taken = bytes(self.heard[:size])
        del self.heard[:size]
        return taken

    def put(self, content: bytes) -> None:
        """Goes with the next `flush`."""
        self._outbox.append(memoryview(content))

    def flush(self) -> None:
        """Sends as much as the connection takes now. Raises OSError for a broken one."""
        with contextlib.suppress(BlockingIOError):
            while self._outbox:
                sent = self._socket.send(self._outbox[0])
                if sent == len(self._outbox[0]):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = self._outbox[0][sent:]

    @property
    def flushed(self) -> bool:
        return not self._outbox

    def close(self) -> None:
        self._socket.close()


class Listener:
    """On a port that is free. Raises ConfigError, naming the host, when it can't listen there."""

    def __init__(self, host: str) -> None:
        bare = numeric_host(host).strip("[]")
        self._socket = socket.socket(_family(bare), socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            self._socket.bind((bare, 0))
            self._socket.listen(_BACKLOG)
        except OSError as error:
            self._socket.close()
            raise ConfigError("kv_transfer.host", f"can't listen on {host!r}: {error.strerror}") from error

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._socket.getsockname()[:2]
        return host, port

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> Stream | None:
        """The next that waits. None if there is none, or no more can be had; whoever called calls again."""
        try:
            return Stream(self._socket.accept()[0])
        except OSError:
            return None

    def close(self) -> None:
        self._socket.close()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
