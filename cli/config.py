"""`ssh-mcp-server config CLIENT`: the server in the configuration of an application, shown or written.

What is to be copied goes to stdout, what is said about it to stderr. A file is replaced in one step, and what it held
stays beside it; whatever cannot be done without touching more than the one entry is left to its owner. An entry holds
what it was told on the command line and nothing of the environment, so that no secret gets into it.
"""

import itertools
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import settings
from cli import entries, launch
from cli.clients import CLIENTS, Client, Entry, Website
from cli.entries import EntryError
from settings import Settings, SettingsError

_EXAMPLE = "https://mcp.example.com"
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
VARIABLES = frozenset(name.upper() for name in Settings.model_fields) | {
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "SSH_AUTH_SOCK",  # where the agent listens: desktop applications often lack it
}
"""What `--env` knows; a secret among them is refused all the same."""


@dataclass(frozen=True)
class Wanted:
    """What the entry is to say: its name, the server's variables as NAME=VALUE, its settings file, or its URL."""

    name: str
    variables: tuple[str, ...]
    env_file: Path | None
    http: bool


def config(client: str | None, wanted: Wanted, *, write: bool, force: bool) -> int:
    """Show the configuration for a client, or write it, and return the exit status: 1 when a file was left alone.

    Without a client all are listed. Raises SettingsError for what cannot be put into an entry.
    """
    if client is None:
        for name, known in CLIENTS.items():
            print(f"{name:15} {known.title}")
        return 0
    chosen = CLIENTS.get(client)
    if chosen is None:
        raise SettingsError(f"{client!r} is no client that is known here; these are: {', '.join(CLIENTS)}")
    if isinstance(chosen, Website):
        if write:
            raise SettingsError(f"{chosen.title} keeps no file here; without --write the steps are shown")
        _show_steps(chosen, wanted.env_file)
        return 0
    entry = _entry(chosen, wanted)
    if write:
        return _write(chosen, wanted.name, entry, force=force)
    _show(chosen, wanted.name, entry)
    return 0


def _show_steps(site: Website, env_file: Path | None) -> None:
    base = settings.load(env_file).public_base_url
    if base is None:
        _say(f"PUBLIC_BASE_URL is not set: put your server's URL in the place of {_EXAMPLE}.")
    for number, step in enumerate(site.steps, 1):
        print(f"{number}. {step.format(base=base or _EXAMPLE)}")


def _show(client: Client, name: str, entry: Entry) -> None:
    _say(f"For {client.title}, in {client.file()} (--write puts it there):")
    print(_snippet(client, name, entry), end="")
    if client.adds:
        _say(f"Or: {shlex.join([*client.adds, name, entries.compact(entry)])}")
    _say(f"Then {client.then}.")


def _write(client: Client, name: str, entry: Entry, *, force: bool) -> int:
    path = client.file()
    try:
        backup = _install(path, client, name, entry, replace=force)
    except (EntryError, OSError) as error:
        why = f"cannot be changed: {error.strerror}" if isinstance(error, OSError) else str(error)
        _say(f"{path} {why}. Nothing was written; this is what belongs into it:")
        print(_snippet(client, name, entry), end="")
        return 1
    kept = f"; what it held before is in {backup}" if backup else ""
    _say(f"{path} has the server {name} now{kept}. Then {client.then}.")
    return 0


def _snippet(client: Client, name: str, entry: Entry) -> str:
    shown = entries.snippet_json if client.form == "json" else entries.snippet_toml
    return shown(client.section, name, entry)


def _entry(client: Client, wanted: Wanted) -> Entry:
    if not wanted.name or len(wanted.name) > 64 or not _NAME_CHARACTERS.issuperset(wanted.name):
        raise SettingsError(f"--name is {wanted.name[:100]!r}; give letters, digits, - and _, 64 at most")
    if wanted.http:
        return _remote_entry(client, wanted)
    command = launch.command()
    if wanted.env_file is not None:
        command += ["--env-file", str(wanted.env_file.expanduser().absolute())]
    variables = _variables(wanted.variables)
    if settings.env_file(wanted.env_file) is None and "SSH_DEFAULT_HOST" not in variables:
        _say("No machine is named yet: add --env SSH_DEFAULT_HOST=... and --env SSH_DEFAULT_USER=...")
    return client.started(command, variables)


def _remote_entry(client: Client, wanted: Wanted) -> Entry:
    if wanted.variables:
        raise SettingsError(
            "--env does not reach a server that --http connects to; it has settings of its own"
        )
    base = settings.load(wanted.env_file).public_base_url
    if base is None:
        raise SettingsError("PUBLIC_BASE_URL is not set, and --http connects to it; give the server's URL")
    entry = client.connected(f"{base}/mcp")
    if entry is None:
        raise SettingsError(
            f"{client.title} takes remote servers in its own settings only: ssh-mcp-server config claude.ai"
        )
    return entry


def _variables(told: tuple[str, ...]) -> Mapping[str, str]:
    """Return the variables by name; a misspelt one would be ignored by the server, a secret lie open in the file."""
    variables = {}
    for text in told:
        name, equals, value = text.partition("=")
        if not equals or name not in VARIABLES:
            raise SettingsError(
                f"--env {name[:100]} is no setting; give NAME=VALUE with a name from the README"
            )
        if settings.is_secret(name, value):
            raise SettingsError(f"{name} is a secret; put it into the settings file, which only you may read")
        variables[name] = value
    return variables


def _install(path: Path, client: Client, name: str, entry: Entry, *, replace: bool) -> Path | None:
    """Put the entry into the file and return where its former content is, None when there is none or no change."""
    before = path.read_bytes() if path.exists() else b""
    put = entries.in_json if client.form == "json" else entries.in_toml
    try:
        text = before.decode()
    except UnicodeDecodeError:
        raise EntryError("is not UTF-8") from None
    after = put(text, client.section, name, entry, replace=replace).encode()
    if after == before:
        return None
    backup = _back_up(path, before) if before else None
    _replace(path.resolve(), after)
    return backup


def _back_up(path: Path, content: bytes) -> Path:
    names = (path.with_name(f"{path.name}.bak{number or ''}") for number in itertools.count())
    backup = next(name for name in names if not os.path.lexists(name))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(backup, flags, 0o600), "wb") as file:
        file.write(content)
    return backup


def _replace(target: Path, content: bytes) -> None:
    """Replace a file at once, keeping its mode and owner; a new one is its owner's alone."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            _take_after(Path(name), target)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def _take_after(new: Path, old: Path) -> None:
    if os.name == "posix":
        status = old.stat()
        os.chown(new, status.st_uid, status.st_gid)
    shutil.copymode(old, new)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)
