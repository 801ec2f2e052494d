"""A TCP relay that delays, freezes or cuts the wire between a client and a server on loopback."""

import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from conftest import Server
from settings import Settings, Target


class Relay:
    """Passes bytes between its port and a server's; what it does to them may be changed at any time."""

    def __init__(self, server_port: int, delay_seconds: float = 0.0) -> None:
        self.delay_seconds = delay_seconds
        self.accepted = 0
        self._server_port = server_port
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: list[socket.socket] = []
        self._forgetting = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pumps: list[_Pump] = []
        self._allowed: dict[str, int | None] = {"up": None, "down": None}
        self.passed = {"up": 0, "down": 0}
        self._books = threading.Lock()
        self._closing = False
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def files(self) -> int:
        """How many sockets it holds for connections, some of which may have ended."""
        return len(self._sockets)

    def has_accepted(self, connections: int) -> bool:
        return self.accepted == connections

    def freeze(self) -> None:
        """Pass nothing on, and acknowledge everything, as a NAT box that lost its table would."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def forget(self, *, new: bool = False) -> None:
        """Let everything vanish, for good, that is sent on what is open now; on `new` connections too if so asked."""
        self._forgetting = new
        for pump in list(self._pumps):
            pump.forgotten = True

    def cut(self) -> None:
        """End every connection."""
        for end in list(self._sockets):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def cut_after(self, way: str, size: int) -> None:
        """End every connection once so many more bytes have passed one way, `up` to the server or `down`."""
        with self._books:
            self._allowed[way] = size

    def admit(self, way: str, data: bytes) -> bytes:
        """Return what of this may pass; less than all means that the wire is to be cut behind it."""
        with self._books:
            allowed = self._allowed[way]
            if allowed is not None:
                data = data[:allowed]
                self._allowed[way] = allowed - len(data) or None
            self.passed[way] += len(data)
        return data

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        socket.create_connection(("127.0.0.1", self.port)).close()  # wakes the accepting thread
        self._accepting.join()
        self._listener.close()
        self.thaw()
        self.cut()
        for pump in self._pumps:
            pump.join()
        for end in self._sockets:
            end.close()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._closing:
                client.close()
                return
            self.accepted += 1
            try:
                server = socket.create_connection(("127.0.0.1", self._server_port))
            except ConnectionRefusedError:
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._forget_ended()
            self._sockets += [client, server]
            for way, source, sink in (("up", client, server), ("down", server, client)):
                self._pumps.append(_Pump(self, way, source, sink, forgotten=self._forgetting))

    def _forget_ended(self) -> None:
        """Keep nothing of connections that have ended, so that a long run does not grow by them."""
        running = [pump for pump in self._pumps if not pump.ended]
        used = {end for pump in running for end in pump.ends}
        for end in self._sockets:
            if end not in used:
                end.close()
        self._pumps = running
        self._sockets = [end for end in self._sockets if end in used]

    def wait_for_flow(self) -> None:
        self._flowing.wait()


class _Pump:
    """One direction of one connection: a thread that reads, and one that passes on after the delay."""

    def __init__(
        self, relay: Relay, way: str, source: socket.socket, sink: socket.socket, *, forgotten: bool
    ) -> None:
        self.forgotten = forgotten
        self._relay = relay
        self._way = way
        self._source = source
        self._sink = sink
        self._queue: deque[tuple[float, bytes]] = deque()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._take, self._pass_on)]
        for thread in self._threads:
            thread.start()

    @property
    def ends(self) -> tuple[socket.socket, socket.socket]:
        return self._source, self._sink

    @property
    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _take(self) -> None:
        while True:
            try:
                data = self._source.recv(1 << 18)
            except OSError:
                data = b""
            with self._changed:
                self._queue.append((time.monotonic() + self._relay.delay_seconds, data))
                self._changed.notify()
            if not data:
                return

    def _pass_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                due, data = self._queue.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            self._relay.wait_for_flow()
            if self.forgotten:
                if not data:
                    return
                continue
            try:
                if not data:
                    self._sink.shutdown(socket.SHUT_RDWR)
                    return
                admitted = self._relay.admit(self._way, data)
                self._sink.sendall(admitted)
                if len(admitted) < len(data):
                    self._relay.cut()
            except OSError:
                return


@dataclass
class Way:
    """What reaches a server through a relay."""

    server: Server
    relay: Relay

    @property
    def target(self) -> Target:
        return Target("tester", "127.0.0.1", self.relay.port)

    @property
    def settings(self) -> Settings:
        return self.server.settings(ssh_default_port=self.relay.port)


@contextmanager
def way_to(server: Server) -> Iterator[Way]:
    relay = Relay(server.port)
    with server.known_hosts.open("a") as known:
        public = (server.folder / "host_key.pub").read_text().split()
        known.write(f"[127.0.0.1]:{relay.port} {public[0]} {public[1]}\n")
    try:
        yield Way(server, relay)
    finally:
        relay.close()
