"""`ssh-mcp-server completion SHELL`, and what a shell is told that asks what may stand at the cursor.

The script that a shell keeps starts this program again at each press of the key, with `_ARGCOMPLETE` set: commands and
options are those of the parser, and what an argument may be is looked up at that moment. Nothing is run or reached
for it. A start that no shell asked for imports nothing of this.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping

SHELLS = ("bash", "zsh", "fish")
_PROGRAM = "ssh-mcp-server"
_HOST_VARIABLE = "SSH_DEFAULT_HOST="

Completer = Callable[..., Iterable[str]]


def show(shell: str) -> None:
    """Print the script that makes a shell complete our command line."""
    from argcomplete.shell_integration import shellcode

    print(shellcode([_PROGRAM], shell=shell))


def answer(parser: argparse.ArgumentParser) -> None:
    """Tell a shell what may stand at the cursor, and end the process; return at once when none asks."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def offer(argument: argparse.Action, completer: Completer) -> None:
    """Let what `completer` returns be offered where an argument may stand."""
    argument.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks for it


def clients(**_: object) -> Mapping[str, str]:
    """Return the clients that `config` knows, each with the name that is shown beside it."""
    from cli.clients import CLIENTS

    return {name: client.title for name, client in CLIENTS.items()}


def variables(prefix: str, **_: object) -> Iterable[str]:
    """Return the settings that `config --env` takes, as NAME=, and behind the one for the host the hosts."""
    if prefix.startswith(_HOST_VARIABLE):
        return [f"{_HOST_VARIABLE}{host}" for host in hosts()]
    from cli.config import VARIABLES
    from settings import is_secret

    return [f"{name}=" for name in sorted(VARIABLES) if not is_secret(name, "")]


def hosts(prefix: str = "", **_: object) -> Iterable[str]:
    """Return the hosts that are known by name: the default one, and the aliases of the SSH config.

    A user that was typed stays before each. None when settings or SSH config cannot be read: the command itself will
    say why.
    """
    import settings
    from ssh_errors import ConfigError
    from ssh_hosts import Hosts

    try:
        current = settings.load()
        default = current.ssh_default_host
        known = {*([default] if default else []), *Hosts(current).aliases()}
    except (settings.SettingsError, ConfigError):
        return ()
    user, at, _host = prefix.rpartition("@")
    return [f"{user}{at}{host}" for host in sorted(known)]
