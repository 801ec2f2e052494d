"""What may be reached: what a call names goes in, a target or a refusal comes out.

A pattern of `SSH_ALLOWED_HOSTS` is `[user@]host[:port]`. Without `user@` or `:port` it allows only the user and the
port that the settings or the SSH config give that host; `*` and `?` are wildcards in every part. What the SSH config
makes of a name, and over which jump hosts it leads, is the operator's and not looked at.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from settings import Settings, SettingsError, Target, host_token, user_token
from ssh_errors import ArgumentError, RefusedError
from ssh_hosts import Hosts


@dataclass(frozen=True)
class _Pattern:
    user: str | None
    host: str
    port: str | None

    def allows(self, target: Target, own: Target) -> bool:
        """Whether a target on this host is allowed; `own` is what is meant without a user and without a port."""
        user = target.user == own.user if self.user is None else _glob(self.user, target.user)
        port = target.port == own.port if self.port is None else _glob(self.port, str(target.port))
        return user and port


class Reach:
    """Which targets calls may name. Immutable, so thread-safe."""

    def __init__(self, settings: Settings) -> None:
        """Read the patterns. Raises SettingsError when one, or the SSH config, cannot be read."""
        self._settings = settings
        self._hosts = Hosts(settings)
        self._hosts.check()
        texts = (settings.ssh_allowed_hosts or "").split(",")
        self._patterns = tuple(_pattern(text.strip()) for text in texts if text.strip())
        if not self._patterns and settings.ssh_default_host:
            self._patterns = (_Pattern(None, settings.ssh_default_host, None),)

    def target(self, host: str | None, user: str | None, port: int | None) -> Target:
        """Return the target that a call means.

        Raises ArgumentError for what is no host, user or port, RefusedError for what `SSH_ALLOWED_HOSTS` does
        not allow, ConfigError for what the SSH config makes impossible. Nothing is reached.
        """
        named = host or self._settings.ssh_default_host
        if named is None:
            raise ArgumentError(
                "no host was named and SSH_DEFAULT_HOST is not set; pass `host` or set the variable"
            )
        try:
            checked_host = host_token(named)
            checked_user = user_token(user) if user else None
            checked_port = _port_token(port) if port is not None else None
        except ValueError as error:
            raise ArgumentError(
                f"{named[:100]!r}, user {(user or '')[:100]!r}, port {port} is no target: give {error}"
            ) from None
        patterns = [pattern for pattern in self._patterns if _glob(pattern.host, checked_host)]
        if not patterns:  # said before commands of Match exec run for a host that is not allowed
            raise _refused(checked_host)
        target = self._hosts.target(checked_host, checked_user, checked_port)
        own = self._own(target, checked_user, checked_port)
        if not any(pattern.allows(target, own) for pattern in patterns):
            raise _refused(str(target))
        return target

    def _own(self, target: Target, user: str | None, port: int | None) -> Target:
        """Return the target that is meant when a call leaves the user out, and the port."""
        return Target(
            self._hosts.target(target.host, None, port).user if user else target.user,
            target.host,
            self._hosts.target(target.host, user, None).port if port else target.port,
        )


def _refused(named: str) -> RefusedError:
    return RefusedError(
        f"{named} is not among the targets that SSH_ALLOWED_HOSTS allows; the operator can add it there"
    )


def _port_token(port: int) -> int:
    if not 1 <= port <= 65535:
        raise ValueError("a port from 1 to 65535")
    return port


def _glob(pattern: str, text: str) -> bool:
    return fnmatchcase(text, pattern.replace("[", "[[]"))


def _pattern(text: str) -> _Pattern:
    user, at, rest = text.rpartition("@")
    try:
        host, port = _split_port(rest)
        literal = _literal(host)
        host = host.lower() if literal != host else host_token(host)
        host_token(literal)
        if at:
            user_token(_literal(user))
        if port is not None:
            _check_port(port)
    except ValueError:
        raise SettingsError(
            f"SSH_ALLOWED_HOSTS holds {text!r}; give comma-separated patterns [user@]host[:port]"
        ) from None
    return _Pattern(user if at else None, host, port)


def _literal(pattern: str) -> str:
    """Return a text that the pattern matches, to be checked in its place."""
    return pattern.replace("*", "1").replace("?", "1")


def _check_port(port: str) -> None:
    digits = _literal(port)
    if not (digits.isascii() and digits.isdecimal()) or (digits == port and not 1 <= int(port) <= 65535):
        raise ValueError("a port")


def _split_port(text: str) -> tuple[str, str | None]:
    """Split `host`, `host:port`, `[address]`, `[address]:port` or a bare IPv6 address."""
    if text.startswith("["):
        host, closing, rest = text[1:].partition("]")
        if not closing or (rest and not rest.startswith(":")):
            raise ValueError("an address in brackets")
        return host, rest[1:] if rest else None
    if "]" in text:
        raise ValueError("a host")
    if text.count(":") == 1:
        host, _, port = text.partition(":")
        return host, port
    return text, None
