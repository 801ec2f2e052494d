"""Every failure a person may read: one tree of exceptions.

The message is the sentence the user sees: what failed, on which target, what to do. It never holds a secret,
a traceback or a library's own words for things. `app` turns these into MCP tool errors; nothing else does.
"""


class SSHError(Exception):
    """Something asked for could not be done; `str()` is one or two sentences for the person who asked."""


class RefusedError(SSHError):
    """A setting does not allow it; the message names the setting. Nothing was sent."""


class UnconfirmedError(SSHError):
    """A person has to agree first, and was not asked yet; `question` is what to ask. Nothing was sent."""

    def __init__(self, question: str) -> None:
        super().__init__("CONFIRM wants a person to be asked first; nothing was done")
        self.question = question


class ArgumentError(SSHError):
    """An argument makes no sense; nothing was sent."""


class ConfigError(SSHError):
    """The SSH config cannot be used; the message names file and line. Nothing was sent."""


class AuditError(SSHError):
    """The audit trail could not be written; the message says whether anything was done."""


class UnreachableError(SSHError):
    """No connection could be made: name look-up, TCP, key exchange or a time-out. Nothing was run."""


class NoAnswerError(UnreachableError):
    """No connection could be made in time, and nobody refused one. Nothing was run."""


class HostKeyError(UnreachableError):
    """The server's host key is unknown, changed or revoked. Nothing but the key exchange was sent."""


class LoginError(UnreachableError):
    """The server was reached and is the right one, but no key was accepted. Nothing was run."""


class BusyError(SSHError):
    """No free session within the caller's deadline. Nothing was run."""


class PoolClosedError(SSHError):
    """The server is stopping: the pool was closed while, or before, the caller waited."""


class ConnectionLostError(SSHError):
    """The connection went away during a call."""


class BegunError(SSHError):
    """A job of that name was begun before, here or elsewhere. Nothing was run now."""


class QueueError(SSHError):
    """The Redis server of TASKS_URL does not answer; the message says whether a command may run all the same."""


class FileError(SSHError):
    """A file could not be read, written, edited or listed."""


class EditError(FileError):
    """An edit does not fit the file. Nothing was changed."""
