"""A server in the place of ours, for a moment: it tells whether requests to PUBLIC_BASE_URL arrive, and how.

It answers who knows its token, and nobody else: `/health` with the token, `/sse` with a stream of events each of which
waits until the one before was seen. Its headers are those of the streams that the server sends.
"""

import secrets
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import NamedTuple

_EVENTS = 3  # the first may go along with the headers, whatever is held back
_PAUSE_SECONDS = 3.0
_REQUEST_SECONDS = 10.0


class Arrival(NamedTuple):
    """A request as it arrived: from which address, and with which headers."""

    peer: str
    headers: dict[str, str]


class Listener:
    """Listens until the end of its context. `seen` is to be released for each event that has come through."""

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError when the place is taken, or none of this machine's."""
        self.token = secrets.token_urlsafe(32)
        self.seen = threading.Semaphore(0)
        self.held_back = False
        """Whether an event was not seen while the stream paused."""
        self.arrivals: list[Arrival] = []
        self._server = _Server(self, host, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: Listener, host: str, port: int) -> None:
        self.listener = listener
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        listener = self.server.listener
        path, _, query = self.path.partition("?")
        known = secrets.compare_digest(query.encode(), listener.token.encode())
        if known and path == "/health":
            headers = {name.lower(): value for name, value in self.headers.items()}
            listener.arrivals.append(Arrival(str(self.client_address[0]), headers))
            self._answer(200, listener.token.encode())
        elif known and path == "/sse":
            self._stream(listener)
        else:
            self._answer(404, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, listener: Listener) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Accel-Buffering", "no")
        self.send_header(
            "Connection", "close"
        )  # which ends the stream, also for a proxy that speaks HTTP/1.0
        self.end_headers()
        for _ in range(_EVENTS):
            self.wfile.write(b"data: here\n\n")
            if not listener.held_back:
                listener.held_back = not listener.seen.acquire(timeout=_PAUSE_SECONDS)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""
