"""How long a connection may keep the server waiting: for a request, and for its taking an answer.

uvicorn closes connections that idle after a response; this closes also those that never say what they want, that say
it byte by byte, that go on sending what was refused already, or that do not take what is sent to them. A body that is
waited for has a deadline of its own (http_limits).
"""

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

WAIT_SECONDS = 15
TAKE_SECONDS = 60


class PunctualProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a deadline: from the connection, or the first byte after a response, to a request."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        _limit_patience(transport)
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_request()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_request(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(WAIT_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def _limit_patience(transport: asyncio.Transport) -> None:
    """Let the system end the connection when what was sent stays unread for that long (tcp(7), TCP_USER_TIMEOUT)."""
    connection = transport.get_extra_info("socket")
    if not hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux alone has it; Windows lacks AF_UNIX, too
        return
    if connection is not None and connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TAKE_SECONDS * 1000)
