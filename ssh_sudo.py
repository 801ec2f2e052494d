"""Running a command through sudo: what starts it, and who reads stdin when.

`exec sudo … /bin/sh -c PROGRAM` takes the place of the shell that reads the line. The program prints the start mark,
so whatever comes before it (a lecture, a warning, a refusal) is sudo's and not the command's. sudo is looked for in
the system's directories alone: one that the account put into its own PATH would be given the password.

Invariants:

- The password is sent once, and only after the prompt of this one call has come on stderr and before the start mark:
  a sudo that does not ask (NOPASSWD, a cached ticket) never gets one that its command could read.
- The caller's stdin is sent only after the start mark: a sudo that asks never takes it for a password.
- A second prompt means that the password was wrong. It gets the end of stdin, which ends sudo.

Pure: text in, text out; no thread, no connection.
"""

from dataclasses import dataclass

from pydantic import SecretStr

from ssh_words import quoted

# those that only root writes to come first: /usr/local/bin may belong to a group, or to the account (Homebrew)
_DIRECTORIES = "/run/wrappers/bin /usr/bin /bin /usr/pkg/bin /usr/local/bin"
_CHARACTERS = 200


@dataclass(frozen=True)
class Sudo:
    """How commands are run through sudo: with this password if it asks, without one only where it does not ask."""

    password: SecretStr | None

    def start(self, program: str, mark: str) -> str:
        """Return what a POSIX shell evaluates to become sudo, and through it `/bin/sh` that runs the program.

        The program's `$1` is the login directory. The process list and sudo's own log show the program: what others
        must not read has to go to its stdin.
        """
        asking = "-n" if self.password is None else f"-S -p {mark[:16]}%%{mark[16:]}"
        return (
            f'for ssh_mcp in {_DIRECTORIES}; do [ ! -x "$ssh_mcp/sudo" ] || break; done; '
            f'exec "$ssh_mcp/sudo" {asking} -- /bin/sh -c {quoted(program)} sh "$HOME"'
        )


class Dialogue:
    """What goes to stdin while sudo starts one command. For one thread."""

    def __init__(self, sudo: Sudo, mark: str, stdin: bytes) -> None:
        self.over = False
        self._password = sudo.password
        # sudo makes one % of two: what merely echoes its arguments shows no prompt
        self._prompt = f"{mark[:16]}%{mark[16:]}"
        self._stdin = stdin
        self._told = False
        self._wrong = False

    def due(self, said: bytes, *, started: bool) -> bytes:
        """Return what goes to stdin now, when this was said on stderr; once it is `over`, the end comes after it."""
        if self.over:
            return b""
        if started:
            self.over = True
            return self._stdin
        asked = said.count(self._prompt.encode())
        if asked and not self._told and self._password is not None:
            self._told = True
            return self._password.get_secret_value().encode() + b"\n"
        self.over = self._wrong = asked > 1
        return b""

    def end(self) -> None:
        """Give nothing more, to whoever asks."""
        self.over = True

    def failure(self, said: str) -> str:
        """Return why sudo did not start the command, of which it said this on stderr."""
        if self._wrong:
            return "sudo does not take SSH_SUDO_PASSWORD for this account's password"
        why = "sudo did not start it; sudoers must let this account run /bin/sh"
        if self._password is None:
            why += " without a password (NOPASSWD), or SSH_SUDO_PASSWORD be set"
        words = " ".join((said.rpartition(self._prompt)[2].strip() or said).split())
        if len(words) > 2 * _CHARACTERS:  # a lecture before its reason, or a long command after it
            words = f"{words[:_CHARACTERS]} ... {words[-_CHARACTERS:]}"
        return f"{why}: {words}" if words else why
