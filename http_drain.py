"""How a server that serves HTTP stops, so that a proxy in front of several loses no call.

Told to stop, it first takes no new connections; those that were made get half a second for what they are about to ask.
Then it stops listening, answers what was asked, and is gone when that is done: streams end after 2 s, and calls that
wait for longer than 10 s are cut.

A listening socket that is closed resets the connections that the system had accepted and nobody had read yet. Their
requests are sent and lost, and no proxy may send a call again. Therefore Linux drops whoever asks for a connection
before the socket is closed: it gets no answer, asks again a second later (RFC 6298, 2), is refused, and goes elsewhere
with nothing sent. Other systems accept until the socket is closed.
"""

import asyncio
import ctypes
import socket
import struct
import sys
from contextlib import suppress

import uvicorn

GRACE_SECONDS = 10
"""How long calls may go on that were begun before the stop."""

STREAM_SECONDS = 2.0
"""How long streams may go on, over which calls of /sse are answered."""

_ASK_SECONDS = 0.5

# linux/filter.h and asm-generic/socket.h; Python names none of it
_SO_ATTACH_FILTER = 26
_LOAD_BYTE, _AND, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x54, 0x15, 0x06
_TCP_FLAGS, _SYN, _SYN_ACK, _WHOLE = 13, 0x02, 0x12, 0xFFFFFFFF
_NO_SYN = (
    (_LOAD_BYTE, 0, 0, _TCP_FLAGS),
    (_AND, 0, 0, _SYN_ACK),
    (_JUMP_IF_EQUAL, 0, 1, _SYN),
    (_RETURN, 0, 0, 0),
    (_RETURN, 0, 0, _WHOLE),
)


class DrainingServer(uvicorn.Server):
    """uvicorn's server, with an end that loses nothing. `stopping` is set when streams are to end."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop in order, as the module says."""
        for server in self.servers:
            for listening in server.sockets:
                _drop_who_asks(listening)
        await asyncio.sleep(_ASK_SECONDS)
        asyncio.get_running_loop().call_later(STREAM_SECONDS, self._stopping.set)
        await super().shutdown(sockets)


def _drop_who_asks(listening: socket.socket) -> None:
    """Let the system drop requests for a connection, and nothing else (socket(7), SO_ATTACH_FILTER)."""
    if sys.platform != "linux":
        return
    steps = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _NO_SYN))
    program = struct.pack("HP", len(_NO_SYN), ctypes.addressof(steps))
    with suppress(OSError):  # sandboxes such as gVisor have no filters
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
