"""A server in the place of ours, for a moment: it tells whether requests to PUBLIC_BASE_URL arrive, and how.

It answers who knows its token, and nobody else: `/health` with the token, `/sse` with a stream whose second event waits
until the first was seen. Its headers are those of the streams that the server sends.
"""

import secrets
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import NamedTuple

_PAUSE_SECONDS = 3.0
_REQUEST_SECONDS = 10.0


class Arrival(NamedTuple):
    """A request as it arrived: from which address, and with which headers."""

    peer: str
    headers: dict[str, str]


class Listener:
    """Listens until the end of its context. `seen` is to be set when the first event has come through."""

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError when the place is taken, or none of this machine's."""
        self.token = secrets.token_urlsafe(32)
        self.seen = threading.Event()
        self.held_back = False
        """Whether the first event was not seen while the stream paused."""
        self.arrivals: list[Arrival] = []
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]

        class Server(ThreadingHTTPServer):
            address_family = family
            daemon_threads = True

        self._server = Server(place[:2], _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seen.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(listener: Listener) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = _REQUEST_SECONDS

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            known = secrets.compare_digest(query.encode(), listener.token.encode())
            if known and path == "/health":
                listener.arrivals.append(Arrival(str(self.client_address[0]), self._headers()))
                self._answer(200, listener.token.encode())
            elif known and path == "/sse":
                self._stream()
            else:
                self._answer(404, b"")

        def _headers(self) -> dict[str, str]:
            return {name.lower(): value for name, value in self.headers.items()}

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def _stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Accel-Buffering", "no")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._chunk(b"data: first\n\n")
            listener.held_back = not listener.seen.wait(_PAUSE_SECONDS)
            self._chunk(b"data: second\n\n")
            self._chunk(b"")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    return Handler
