"""A server process and its surroundings: what ends it, where its log goes, what FastMCP is told of it."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import fastmcp

import telemetry


@contextmanager
def ended_by_signals(close: Callable[[], None]) -> Iterator[None]:
    """On SIGTERM and SIGINT call `close`, stop what is measured, and exit.

    The process cannot end the ordinary way: a thread of the MCP SDK is waiting for a line on stdin.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=finish, args=(0 if number == signal.SIGTERM else 128 + number,)).start()

    def finish(exit_status: int) -> None:
        close()
        telemetry.stop()
        logging.shutdown()
        os._exit(exit_status)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def quiet_fastmcp() -> None:
    """Have FastMCP neither look for news nor draw a banner, nor read a `.env` that nobody named."""
    if "FASTMCP_ENV_FILE" not in os.environ:
        _forget_env_file()
    fastmcp.settings.check_for_updates = "off"
    fastmcp.settings.show_server_banner = False


def _forget_env_file() -> None:
    """Set FastMCP's settings anew without the `.env` of the working directory, which anybody may have put there."""
    for name, value in type(fastmcp.settings)(_env_file=None):
        setattr(fastmcp.settings, name, value)


class _OneLine(logging.Formatter):
    """Writes each message on one line of its own: libraries repeat what callers sent."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging calls
        line = super().formatMessage(record)
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def log_to_stderr(level: str) -> None:
    """Log to stderr: over stdio, stdout belongs to MCP."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("ssh_mcp_server")
    log.handlers = [handler]
    log.setLevel(level)
    log.propagate = False
    # below that they tell what calls hold, and what strangers call themselves
    for library in ("fastmcp.server", "mcp"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("fastmcp").handlers = [handler]
    logging.getLogger().addHandler(handler)  # else the first library that logs there sets up one of its own
