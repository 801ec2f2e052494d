"""What a shell on the other side is told: the exec request, and the one line that it reads and runs.

The exec request holds a constant that reads one line from stdin and evaluates what it decodes to. The line puts the
shell back into the state that a command line may expect (no trap, option or IFS of an rc file), changes into `cwd`,
exports `env`, prints a mark with the process id on both streams, and hands over the command line. No quoting of ours
meets a shell that is no POSIX shell: that one starts `/bin/sh`, which reads the line.

A warm shell got its constant ahead of need: it has read its rc files and waits. It greets when it does, which tells
it apart from one whose rc files end it or send its output elsewhere. Each shell serves one command.

An account that has no shell to read a line (a forced command, a restricted shell) gets the command line as it is in
the exec request, as `ssh` would send it: no mark, no `cwd`, no `env`.

Through sudo (`ssh_sudo`) the shell makes way for sudo, and `/bin/sh` behind it takes these steps.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import ssh_background
from ssh_errors import ArgumentError
from ssh_sudo import Sudo
from ssh_words import quoted

if TYPE_CHECKING:
    from ssh_session import Session  # with Paramiko below it, which no list of tools needs

Dialect = Literal["posix", "foreign", "plain"]
"""Who reads the line: the login shell, which is a POSIX shell; `/bin/sh`, started by another; or nobody."""

_READ_LINE = 'IFS= read -r c && eval "$(printf %b "$c")"'
_READ_PLAIN_LINE = 'IFS= read -r c && eval "$c"'
_MOST_ARGUMENT_BYTES = 64 * 1024
_CALM = """\
set +efuvxC
trap - EXIT HUP INT QUIT TERM
[ -z "${BASH_VERSION-}" ] || { trap - DEBUG ERR RETURN; set +o pipefail; }
[ -z "${ZSH_VERSION-}" ] || { trap - DEBUG ZERR; set +o pipefail; }
[ -z "${KSH_VERSION-}" ] || { trap - DEBUG ERR; set +o pipefail; }
IFS=' \t\n'
unset c"""
"""Undoes what rc files may have set up; the shells' own names keep each from what it does not know."""

_RUN_ARGUMENT = """\
[ -z "${ssh_mcp_login-}" ] || exec "${SHELL:-/bin/sh}" -c "$1"
eval "shift
$1"
"""
"""Runs a background command where the shell itself reads it."""


def start_reader(session: "Session", dialect: Dialect) -> bytes:
    """Start a shell that reads `Task.line` whenever it comes; return the greeting it prints once it waits for it.

    The request is one line, and harmless to whatever else reads it.
    """
    greet, greeting = _greet()
    session.exec(_reader(dialect, greet))
    return greeting


def start_ahead(session: "Session", dialect: Dialect) -> bytes:
    """Do as `start_reader` does, where it is known that `dialect` reads; what it reads then is `Task.line_ahead`."""
    if dialect != "posix":
        return start_reader(session, dialect)
    greet, greeting = _greet()
    session.exec(f"{greet}{_CALM}\n{_READ_PLAIN_LINE}")
    return greeting


def _greet() -> tuple[str, bytes]:
    """Return what prints a greeting, and the greeting, which what echoes the request must not show."""
    greeting = secrets.token_hex(16)
    return f"c=; echo {greeting[:16]}${{c}}{greeting[16:]}; ", f"{greeting}\n".encode()


def _reader(dialect: Dialect, before: str = "") -> str:
    """Return the constant for an exec request."""
    constant = before + _READ_LINE
    return f"exec /bin/sh -c '{constant}'" if dialect == "foreign" else constant


@dataclass(frozen=True)
class Task:
    """What is to be run, and what it gets."""

    command: str
    cwd: str | None
    env: dict[str, str]
    stdin: bytes
    by_sh: bool = False
    job: str | None = None
    sudo: Sudo | None = None
    mark: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        for name, value in self.env.items():
            if not (name.isascii() and name.isidentifier()):
                raise ArgumentError(f"env: {name!r} is no variable name; nothing was run")
            _no_nul(f"the value of {name} in env", value)
        _no_nul("the command", self.command)
        _no_nul("cwd", self.cwd or "")

    @classmethod
    def of(
        cls,
        command: str,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        *,
        job: str | None = None,
        sudo: Sudo | None = None,
    ) -> "Task":
        """Return the task for what a caller gave. Raises ArgumentError when it cannot be sent."""
        return cls(command, cwd, dict(env or {}), _sendable("input", stdin), job=job, sudo=sudo)

    def plainly(self) -> str | None:
        """Return what of it a plain exec request cannot carry, None when it carries all."""
        if self.by_sh:
            return "programs of this server (reports, background jobs)"
        if self.job is not None:
            return "background jobs"
        if self.sudo is not None:
            return "sudo"
        return "cwd" if self.cwd is not None else "env" if self.env else None

    def request(self, dialect: Dialect) -> tuple[str, bytes]:
        """Return the exec request, and what goes to stdin.

        A login shell that is known to be a POSIX one gets the steps in the request itself, which saves a round
        trip; but no environment, which others could read in the process list, and nothing too long for it.
        """
        if dialect == "plain":
            return self.command, self.stdin
        if dialect == "posix" and (self.sudo is not None or not self.env):
            steps = _evaluating("\n".join([_CALM, *self._steps(False)]))
            if len(steps) <= _MOST_ARGUMENT_BYTES:
                return steps, self._stdin_at_once
        return _reader(dialect), self.line(dialect)

    def line(self, dialect: Dialect) -> bytes:
        """Return what goes to the stdin of a shell that reads one line."""
        return _encoded("\n".join([_CALM, *self._steps(dialect == "foreign")])) + b"\n" + self._stdin_at_once

    def line_ahead(self, dialect: Dialect) -> bytes:
        """Return what goes to the stdin of a shell that was started ahead.

        A POSIX one is calm by then and evaluates the line as it is: decoding one costs it a process, which only a
        command of several lines, or with more than printable ASCII, is given.
        """
        if dialect != "posix":
            return self.line(dialect)
        steps = ["unset c", *self._steps(False)]
        line = "; ".join(steps)
        if not (line.isascii() and line.isprintable()):
            line = _evaluating("\n".join(steps))
        return line.encode() + b"\n" + self._stdin_at_once

    @property
    def sudo_said(self) -> bytes:
        """What tells on stdout that a shell has read what was sent, and makes way for sudo."""
        return f"{self.mark} sudo".encode()

    @property
    def stdin_after_sudo(self) -> bytes:
        """What goes to stdin once sudo has started the shell: its line, if it reads one, and the caller's input."""
        if not self._sudo_reads_line:
            return self.stdin
        steps = ["unset c", *self._exports(), f"eval {quoted(self.command)}"]
        return _encoded("\n".join(steps)) + b"\n" + self.stdin

    @property
    def _stdin_at_once(self) -> bytes:
        return self.stdin if self.sudo is None else b""

    @property
    def _sudo_reads_line(self) -> bool:
        """Whether the command is nothing for an argument: too long, or with an environment, which nobody may see."""
        return bool(self.env) or len(quoted(self.command)) > _MOST_ARGUMENT_BYTES

    def _steps(self, foreign: bool) -> list[str]:
        """Return what the shell evaluates."""
        if self.sudo is not None:
            return [f"echo {self._mark} sudo", self.sudo.start("\n".join(self._steps_in_sudo()), self.mark)]
        steps = self._enter('"$HOME"')
        if self.job is None:
            steps += self._exports()
        steps.append(self._show_start)
        if self.by_sh and not foreign:
            run = f"exec /bin/sh -c {quoted(self.command)}"
        elif foreign and not self.by_sh:
            run = f'exec "${{SHELL:-/bin/sh}}" -c {quoted(self.command)}'
        else:
            run = f"eval {quoted(self.command)}"
        if self.job is not None:
            if not (foreign or self.by_sh):
                run = f"set -- {quoted(self.command)}\n{_RUN_ARGUMENT}"
            # its variables are the command's alone: HOME and PATH are needed to start it
            run = ssh_background.start(self.job, "\n".join([*self._exports(), run]), len(self.stdin))
        steps.append(run)
        return steps

    def _steps_in_sudo(self) -> list[str]:
        """Return what the shell that sudo starts evaluates."""
        run = _READ_LINE if self._sudo_reads_line else f"eval {quoted(self.command)}"
        return [*self._enter('"$1"'), "shift", self._show_start, run]

    def _enter(self, home: str) -> list[str]:
        if self.cwd is None:
            return []
        directory = _directory(self.cwd, home)
        return [f"cd -- {directory} >/dev/null 2>&1 || {{ echo {self._mark} no; exit 1; }}"]

    def _exports(self) -> list[str]:
        return [f"export {name}={quoted(value)}" for name, value in self.env.items()]

    @property
    def _mark(self) -> str:
        """The mark in two parts: what echoes the steps must not show it."""
        return f"{self.mark[:16]}''{self.mark[16:]}"

    @property
    def _show_start(self) -> str:
        return f"echo {self._mark} $$; echo {self._mark} >&2"


def _no_nul(what: str, text: str) -> None:
    if b"\0" in _sendable(what, text):
        raise ArgumentError(f"{what} holds a NUL character, which no shell can take; nothing was run")


def _sendable(what: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"{what} holds half a character (a lone surrogate); nothing was run") from None


def _directory(path: str, home: str) -> str:
    if path == "~":
        return home
    if path.startswith("/"):
        return quoted(path)
    return f"{home}/" + quoted(path.removeprefix("~/"))


def _evaluating(text: str) -> str:
    """Return words that make a POSIX shell evaluate a text, whatever it holds."""
    return f"eval \"$(printf %b '{_encoded(text).decode()}')\""


def _encoded(text: str) -> bytes:
    """Encode for `printf %b` (XCU printf): all but printable ASCII as octal, backslash and quote too."""
    return b"".join(
        bytes([byte]) if 32 <= byte < 127 and byte not in b"\\'" else b"\\0%03o" % byte
        for byte in text.encode()
    )
