"""What `check` says of the settings: the file they stand in, their names, their values, and what they add up to."""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import settings
from audit_log import try_log
from cli.findings import Step, Verdict, error, of_sentence, ok, skipped, warning
from settings import Settings
from ssh_policy import AllowedCommands, Reach, no_running, warnings

_NAMES = frozenset(name.upper() for name in Settings.model_fields)
_OF_OTHERS = ("OTEL_", "FASTMCP_")
_SURE = 0.88
"""How alike two names are when one is the other misspelt, where strangers' names stand as well (the environment)."""

_NAME = re.compile(r"[A-Z][A-Z0-9_]*|[a-z][a-z0-9_]*")
"""What looks like a variable's name. Another may be a secret that went to a line of its own, whose padding is a `=`."""

_DIFFERENT_CHARACTERS = 10
_MEND = "correct it in the settings file or the environment"


def steps(named_file: Path | None, loaded: list[Settings]) -> list[Step]:
    """Return the steps for the settings; the last of them puts the settings into `loaded`."""
    return [
        Step("settings file", lambda: _file(named_file), _MEND),
        Step("permissions", lambda: _permissions(named_file), _MEND, ("settings file",)),
        Step("names", lambda: _names(named_file), _MEND, ("settings file",)),
        Step("values", lambda: _values(named_file, loaded), _MEND, ("settings file",)),
    ]


def steps_of_loaded(current: Settings) -> list[Step]:
    """Return the steps for what the settings, each of which can be used, say together."""
    return [
        Step("secrets", lambda: _secrets(current), _MEND),
        Step("targets", lambda: _targets(current), _MEND),
        Step("policy", lambda: _policy(current), _MEND),
        Step("audit log", lambda: _audit_log(current), "name a file that the server's account can write"),
    ]


def _file(named_file: Path | None) -> Iterator[Verdict]:
    path = settings.env_file(named_file)
    yield ok("none: all settings come from the environment" if path is None else f"{path}")


def _permissions(named_file: Path | None) -> Iterator[Verdict]:
    """Say who may write to the file; that nobody else may read a secret in it is asked when it is loaded."""
    path = settings.env_file(named_file)
    if path is None or os.name != "posix":
        yield skipped("there is no settings file" if path is None else "Windows keeps them otherwise")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield error(
            f"others may write to {path}, and so decide what the server runs and reaches",
            f"run: chmod go-w {path}",
        )
    else:
        yield ok(f"{mode:04o}")


def _names(named_file: Path | None) -> Iterator[Verdict]:
    path = settings.env_file(named_file)
    in_file = settings.assigned_names(path) if path else []
    wrong = [*_unknown(in_file, str(path)), *_misspelt(os.environ)]
    yield from wrong
    if not wrong:
        used = _NAMES & {name.upper() for name in (*in_file, *os.environ)}
        yield ok(f"{len(used)} of {len(_NAMES)} settings are set")


def _unknown(names: Sequence[str], place: str) -> Iterator[Verdict]:
    for name in names:
        if name.upper() in _NAMES or name.upper().startswith(_OF_OTHERS):
            continue
        if meant := get_close_matches(name.upper(), _NAMES, 1):
            yield error(f"{name} in {place} is no setting, so it does nothing", f"did you mean {meant[0]}?")
        else:
            shown = name if _NAME.fullmatch(name) else f"a name that begins with {name[:3]!r}"
            yield warning(f"{shown} in {place} is no setting, so it does nothing", "remove the line")


def _misspelt(names: Iterable[str]) -> Iterator[Verdict]:
    for name in names:
        if name.upper() not in _NAMES and (meant := get_close_matches(name, _NAMES, 1, _SURE)):
            yield error(
                f"{name} in the environment is no setting, so it does nothing", f"did you mean {meant[0]}?"
            )


def _values(named_file: Path | None, loaded: list[Settings]) -> Iterator[Verdict]:
    loaded.append(settings.load(named_file))
    yield ok("every setting can be read")


def _secrets(current: Settings) -> Iterator[Verdict]:
    """Say which signing keys look made up; whether they are long enough and different is asked for HTTP."""
    held = {name.upper(): getattr(current, name) for name in settings.SIGNING_KEYS}
    set_ones = {name: secret.get_secret_value() for name, secret in held.items() if secret}
    weak = [name for name, text in set_ones.items() if len(set(text)) < _DIFFERENT_CHARACTERS]
    for name in weak:
        yield warning(
            f"{name} has few different characters, so it can be guessed", "run: openssl rand -hex 32"
        )
    if current.ssh_sudo_password and not current.ssh_sudo:
        yield warning(
            "SSH_SUDO_PASSWORD is set and does nothing while SSH_SUDO is not true",
            "set SSH_SUDO=true, or remove the password",
        )
    if not set_ones:
        yield skipped("no signing keys are set; only HTTP needs them")
    elif not weak:
        yield ok(f"{', '.join(set_ones)} look random")


def _targets(current: Settings) -> Iterator[Verdict]:
    Reach(current)
    allowed, default = current.ssh_allowed_hosts, current.ssh_default_host
    if allowed:
        yield ok(f"SSH_ALLOWED_HOSTS allows {allowed}")
    elif default:
        yield ok(f"only the default host, {default}, may be named")
    else:
        yield error("no host may be reached", "set SSH_DEFAULT_HOST, or SSH_ALLOWED_HOSTS")
    if allowed and not default:
        yield warning("SSH_DEFAULT_HOST is not set, so every call must name a host", "set SSH_DEFAULT_HOST")


def _policy(current: Settings) -> Iterator[Verdict]:
    AllowedCommands(current)
    said = warnings(current)
    for sentence in said:
        yield of_sentence(sentence, "see SECURITY.md", "warning")
    if runs_nothing := no_running(current) is not None:
        yield warning(
            "READ_ONLY is set and ALLOWED_COMMANDS is not, so ssh_execute runs nothing",
            "set ALLOWED_COMMANDS to commands that only read",
        )
    if not (said or runs_nothing):
        yield ok(f"commands: {current.allowed_commands or 'any'}; paths: {current.allowed_paths or 'any'}")


def _audit_log(current: Settings) -> Iterator[Verdict]:
    """Open the trail as the server would; files that are not there are not made."""
    where = current.audit_log
    if where is None:
        yield skipped("AUDIT_LOG is not set, so no trail is kept")
    elif where.startswith("fd:"):
        yield skipped(f"{where} is open in the server alone")
    elif try_log(where):
        yield ok(f"{where} can be written")
    elif os.access(Path(where).parent, os.W_OK | os.X_OK):
        yield ok(f"what is missing of {where} will be made at the first start")
    else:
        yield error(
            f"AUDIT_LOG is {where}, and files cannot be made in its folder",
            f"run: mkdir -m 700 -p {Path(where).parent}",
        )
