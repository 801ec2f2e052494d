"""What the SSH config makes of a host: a reader of ssh_config(5) that answers what `ssh -G` answers.

- The first value of a keyword wins; IdentityFile and CertificateFile add up; of ProxyJump and ProxyCommand, whichever
  comes first counts.
- What is not understood and matters is a ConfigError that names file and line (`ssh_config_keywords` has the list).
- Only the file of SSH_CONFIG is read, and what it includes: as under `ssh -F`, not /etc/ssh/ssh_config.
- Files are read anew at every question. `Match exec` runs only where OpenSSH would need its answer.

What differs from OpenSSH on purpose stands in `tests/test_ssh_config_as_ssh.py`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from settings_values import user_token
from ssh_config_match import Asked, Local, Matched
from ssh_config_syntax import Line
from ssh_config_values import (
    FAMILIES,
    FLAGS,
    STRICTNESS,
    Hop,
    expanded,
    hops,
    last_hop,
    one_word,
    proxy_command,
)
from ssh_errors import ConfigError


@dataclass(frozen=True)
class HostConfig:
    """What the config makes of one host, user and port. None is what it does not say; tokens are expanded.

    An empty tuple of files, and an agent or a file named `none`, mean none at all. Times are in seconds. `ciphers` and
    its like are lists as they stand in the config; `assembled` applies them.
    """

    named: str
    hostname: str
    user: str
    port: int
    address_family: str
    identity_files: tuple[str, ...] | None
    certificate_files: tuple[str, ...]
    identities_only: bool
    identity_agent: str | None
    proxy_jump: tuple[Hop, ...]
    proxy_command: str | None
    connect_timeout: int | None
    server_alive_interval: int | None
    host_key_alias: str | None
    strict_host_key_checking: str | None
    hash_known_hosts: bool
    user_known_hosts: tuple[str, ...] | None
    global_known_hosts: tuple[str, ...] | None
    ciphers: str | None
    macs: str | None
    kex_algorithms: str | None
    host_key_algorithms: str | None


class SshConfig:
    """One SSH config. Immutable and thread-safe; its files are read at every question."""

    def __init__(
        self,
        path: Path | None,
        *,
        may_be_missing: bool = False,
        exec_seconds: float = 10,
        local: Callable[[], Local] = Local.now,
    ) -> None:
        """`path` None is an empty config. A command of Match may take `exec_seconds`."""
        self._path = path
        self._may_be_missing = may_be_missing
        self._exec_seconds = exec_seconds
        self._local = local

    def check(self) -> None:
        """Read all that is included, whatever the host. Runs nothing. Raises ConfigError."""
        local = self._local()
        self._read(Matched(Asked("", None, None, local.user, 22), local, self._exec_seconds), active=False)

    def aliases(self) -> list[str]:
        """Return the names in Host lines that are no patterns, in their order. Runs nothing. Raises ConfigError."""
        local = self._local()
        matched = Matched(Asked("", None, None, local.user, 22), local, self._exec_seconds)
        self._read(matched, active=False)
        return [name for name in dict.fromkeys(matched.host_patterns) if not {*"*?!"} & {*name}]

    def lookup(
        self,
        host: str,
        user: str | None = None,
        port: int | None = None,
        *,
        default_user: str | None = None,
        default_port: int = 22,
    ) -> HostConfig:
        """Return what the config makes of a host; `user` and `port` win over it when they are given.

        The defaults are for what it does not say; `default_user` is the local user unless given. Raises ConfigError.
        """
        local = self._local()
        asked = Asked(host, user, port, default_user or local.user, default_port)
        matched = Matched(asked, local, self._exec_seconds)
        self._read(matched)
        matched.settle_host()
        if matched.wants_final:
            matched.final = True
            self._read(matched)
        matched.refuse_what_is_not_built()
        return _answer(matched)

    def _read(self, matched: Matched, *, active: bool = True) -> None:
        if self._path is None:
            return
        try:
            matched.read(self._path, active)
        except FileNotFoundError:
            if not self._may_be_missing:
                raise ConfigError(
                    f"SSH_CONFIG: there is no file {self._path}; create it, or unset it"
                ) from None


def _answer(matched: Matched) -> HostConfig:
    jump, command = matched.line("proxyjump"), matched.line("proxycommand")
    alias = matched.text("hostkeyalias")
    alias = alias and alias.lower()
    tokens = matched.tokens(matched.host, alias or matched.named, last_hop(jump) if jump else "")
    return HostConfig(
        named=matched.named,
        hostname=matched.host,
        user=_checked_user(matched),
        port=matched.port,
        address_family=matched.choice("addressfamily", FAMILIES) or "any",
        identity_files=_files(matched, "identityfile", tokens) if matched.listed["identityfile"] else None,
        certificate_files=_files(matched, "certificatefile", tokens),
        identities_only=matched.choice("identitiesonly", FLAGS) == "yes",
        identity_agent=_agent(matched, tokens),
        proxy_jump=hops(jump, tokens) if jump else (),
        proxy_command=proxy_command(command, tokens) if command else None,
        connect_timeout=matched.seconds("connecttimeout"),
        server_alive_interval=matched.seconds("serveraliveinterval"),
        host_key_alias=alias,
        strict_host_key_checking=matched.choice("stricthostkeychecking", STRICTNESS),
        hash_known_hosts=matched.choice("hashknownhosts", FLAGS) == "yes",
        user_known_hosts=_known_hosts(matched, "userknownhostsfile", tokens),
        global_known_hosts=_known_hosts(matched, "globalknownhostsfile", None),
        ciphers=matched.text("ciphers"),
        macs=matched.text("macs"),
        kex_algorithms=matched.text("kexalgorithms"),
        host_key_algorithms=matched.text("hostkeyalgorithms"),
    )


def _checked_user(matched: Matched) -> str:
    try:
        return user_token(matched.user)
    except ValueError as error:
        line = matched.line("user")
        if line is None:
            raise ConfigError(
                f"there is no account name to log in to {matched.named} with; set SSH_DEFAULT_USER"
            ) from None
        raise line.error(f"User {matched.user!r} cannot be used: give {error}") from None


def _files(matched: Matched, keyword: str, tokens: Mapping[str, str]) -> tuple[str, ...]:
    named = [(line, one_word(line)) for line in matched.listed[keyword]]
    return tuple(_path(matched, line, word, tokens) for line, word in named if word.lower() != "none")


def _path(matched: Matched, line: Line, text: str, tokens: Mapping[str, str]) -> str:
    return expanded(line, matched.at_home(line, text), tokens, variables=True)


def _agent(matched: Matched, tokens: Mapping[str, str]) -> str | None:
    """Return the agent's socket, `none`, or None for the one of the environment."""
    line = matched.line("identityagent")
    if line is None:
        return None
    path = _path(matched, line, one_word(line), tokens)
    if path == "SSH_AUTH_SOCK":
        return None
    return os.environ.get(path[1:], "none") if path.startswith("$") else path


def _known_hosts(matched: Matched, keyword: str, tokens: Mapping[str, str] | None) -> tuple[str, ...] | None:
    line = matched.line(keyword)
    if line is None:
        return None
    if line.words[0].lower() == "none":
        return ()
    return line.words if tokens is None else tuple(_path(matched, line, word, tokens) for word in line.words)
