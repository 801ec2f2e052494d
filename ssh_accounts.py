"""Who reads a command line in which account: the login shell, `/bin/sh` beside it, or nobody but a plain exec request.

A POSIX login shell reads the line itself. Another one (fish, tcsh) cannot, and ends; then `/bin/sh` reads the line and
starts `$SHELL -c COMMAND`. Where neither is run (a forced command, a restricted shell) the command line goes as it is
in a plain exec request. Which of these a target needs is found out once: at first contact the line waits for the
greeting of a shell that can read it, so that none that cannot has got it. Only a target of which that is known gets
warm shells.

Where `ALLOWED_COMMANDS` is set `/bin/sh` reads every line, also beside a POSIX login shell: that one gets a constant,
and no option or alias of its rc files has a say in what the line means. An account without `/bin/sh` is refused.

Invariants:

- What is found out rests on a session that ended by itself and got nothing; silence, or a wire that is cut, is an
  error and no conclusion.
"""

import logging
import time
from collections.abc import Callable
from functools import partial

from settings import Target
from ssh_errors import ArgumentError, ConnectionLostError, RefusedError, SSHError
from ssh_exchange import Exchange, Outcome
from ssh_pool import Cancelled, Pool
from ssh_shells import Dialect, Task, start_ahead, start_reader
from ssh_warm import Prepare

_log = logging.getLogger("ssh_mcp_server.commands")

_PATIENCE_SECONDS = 3.0
_PLAIN_SECONDS = 3600.0
_SFTP_INIT = b"\0\0\0\5\1\0\0\0\3"
_SFTP_ALONE = b"This service allows sftp connections only."  # OpenSSH, for a forced internal-sftp

AHEAD: dict[Dialect, Prepare] = {
    "posix": partial(start_ahead, dialect="posix"),
    "foreign": partial(start_ahead, dialect="foreign"),
}
"""How a shell is started ahead of need, where there is one that reads a line."""


class Accounts:
    """What is known of the accounts that commands were run in. Thread-safe."""

    def __init__(self, pool: Pool, *, by_sh_alone: bool = False) -> None:
        self._pool = pool
        self.by_sh_alone = by_sh_alone
        self._dialects: dict[Target, tuple[Dialect, float]] = {}

    def dialect(self, target: Target) -> Dialect | None:
        """Return what was found out; that no shell reads a line is believed for an hour, for it may be mended."""
        dialect, learned_at = self._dialects.get(target, (None, 0.0))
        if dialect == "plain" and time.monotonic() - learned_at > _PLAIN_SECONDS:
            return None
        return dialect

    def learn(self, target: Target, dialect: Dialect, outcome: Outcome, *, met: bool, ahead: bool) -> None:
        """Remember who read a line, forget it when nobody did.

        With `ahead` see that a shell is started for each caller that `met` the account, and so could not have one.
        """
        if not outcome.answered:
            self._dialects.pop(target, None)
        elif met or self.dialect(target) is None:
            self._dialects[target] = dialect, time.monotonic()
            if ahead and dialect in AHEAD:
                self._pool.expect(target, AHEAD[dialect])

    def meet(
        self,
        target: Target,
        task: Task,
        attempt: Callable[..., Exchange],
        deadline: float,
        cancelled: Cancelled,
    ) -> tuple[Dialect, Exchange]:
        """Run a task where it is not known who reads it: by whoever greets, and else in a plain exec request.

        A session that ended without a greeting got nothing. A forced command is started up to two times by this,
        without input, and what waits for the end of its input gets that after `_PATIENCE_SECONDS`.
        """
        patience, silent = _PATIENCE_SECONDS, True
        dialects: tuple[Dialect, ...] = ("foreign",) if self.by_sh_alone else ("posix", "foreign")
        for dialect in dialects:
            exchange = attempt(dialect, patience=patience)
            outcome = exchange.outcome
            if outcome.greeted:
                return dialect, exchange
            if outcome.lost:
                raise ConnectionLostError(
                    f"{target}: the connection went away, or the server runs no commands; nothing was run"
                )
            if exchange.hurried:
                patience = 0.0
            silent = silent and exchange.hurried and not (outcome.exit_status or outcome.out.total)
        closed = _SFTP_ALONE in outcome.out.whole()
        if closed or (silent and self._speaks_sftp(target, deadline, cancelled)):
            raise SSHError(
                f"{target} is an account for SFTP alone (ForceCommand internal-sftp or the like in its sshd_config); "
                "no command can be run there, the file tools work"
            )
        self.refuse_unless_carried(target, task, "plain")
        _log.info("%s: no shell reads a line there; commands go as plain exec requests", target)
        return "plain", attempt("plain")

    def refuse_unless_carried(self, target: Target, task: Task, dialect: Dialect) -> None:
        """Raise ArgumentError when a task needs more than a plain exec request can carry.

        Raises RefusedError when no plain exec request may be sent.
        """
        if dialect != "plain":
            return
        if self.by_sh_alone:
            raise RefusedError(
                f"{target} takes only plain commands (a forced command, or a restricted shell); what ALLOWED_COMMANDS "
                "approves is run by /bin/sh alone, which cannot be had there, so nothing was run"
            )
        if more := task.plainly():
            raise ArgumentError(
                f"{target} takes only plain commands (a forced command, or a restricted shell); {more} cannot be had "
                "there, so nothing was run"
            )

    def _speaks_sftp(self, target: Target, deadline: float, cancelled: Cancelled) -> bool:
        """Whether an exec request, whatever it asks for, is answered by an SFTP server.

        Asked only of what reads its input to the end and says nothing.
        """
        with self._pool.session(target, deadline, cancelled) as session:
            start_reader(session, "posix")
            session.send(_SFTP_INIT, _PATIENCE_SECONDS)
            said = b""
            until = min(deadline, time.monotonic() + _PATIENCE_SECONDS)
            while len(said) < 5 and not session.exited and time.monotonic() < until:
                session.wait(0.1)
                said += session.read()[0]
            said += session.read()[0]
        return said[:2] == b"\0\0" and said[4:5] == b"\2"
