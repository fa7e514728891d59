"""Does an endpoint still take connections? A refusal proves that the process which listened there has ended; anything
else proves nothing (the kernel answers for a stopped process). Never blocks; owned by the control thread.
"""

import errno
import select
import socket


class Probe:
    """One attempt to connect. Read `finished`, then `refused`, then `close`."""

    def __init__(self, connection: socket.socket, code: int) -> None:
        self._connection = connection
        self._code = code

    @classmethod
    def start(cls, endpoint: str) -> "Probe":
        """`endpoint` is tcp://host:port with a numeric host."""
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.setblocking(False)
        return cls(connection, connection.connect_ex((host, int(port))))

    @property
    def finished(self) -> bool:
        if self._code == errno.EINPROGRESS:
            poller = select.poll()
            poller.register(self._connection, select.POLLOUT)
            if poller.poll(0):
                self._code = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return self._code != errno.EINPROGRESS

    @property
    def refused(self) -> bool:
        return self._code == errno.ECONNREFUSED

    def close(self) -> None:
        self._connection.close()
