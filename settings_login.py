"""What serving over HTTP takes beside the settings: a complete OAuth configuration, or none is served."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

from platformdirs import user_state_path
from pydantic import SecretStr

from settings import GOOGLE, SIGNING_KEYS, Settings, SettingsError
from settings_values import is_loopback, origin

_SECRET_BYTES = 32
_MAKE_SECRET = "make a good one with: openssl rand -hex 32"  # noqa: S105 - a command, not a secret
_PLACEHOLDERS = (
    "change-me",
    "change_me",
    "changeme",
    "replace-me",
    "replace_me",
    "example",
    "your-",
    "your_",
)


@dataclass(frozen=True)
class Members:
    """Who may have commands run over HTTP, and what tells that a server said so. Its repr shows no secret."""

    allowed_emails: frozenset[str]
    session_keys: tuple[bytes, ...] = field(repr=False)
    state_url: str = field(repr=False)


@dataclass(frozen=True)
class Login:
    """A complete OAuth configuration. Of several keys the first signs and all verify. Its repr shows no secret."""

    base_url: str
    google_client_id: str
    google_client_secret: SecretStr
    discovery_url: str
    allowed_emails: frozenset[str]
    jwt_keys: tuple[bytes, ...] = field(repr=False)
    session_keys: tuple[bytes, ...] = field(repr=False)
    code_keys: tuple[bytes, ...] = field(repr=False)
    state_url: str = field(repr=False)

    @property
    def members(self) -> Members:
        """What a process must know of the login that only runs tasks."""
        return Members(self.allowed_emails, self.session_keys, self.state_url)

    @property
    def provider(self) -> str:
        """Where people log in, by the name that they know it by."""
        return "Google" if self.discovery_url == GOOGLE else str(urlsplit(self.discovery_url).hostname)


def login(current: Settings, base_url: str | None = None) -> Login:
    """Return the OAuth configuration, without which HTTP is not served.

    `base_url` is what the server really listens on, if not what the settings say; without PUBLIC_BASE_URL it is the
    URL that clients see, as long as only this machine can reach it. Raises SettingsError for the variables that are
    missing or cannot be used.
    """
    if problems := _missing(current, base_url):
        raise SettingsError(*problems)
    keys = {name: _signing_keys(current, name) for name in SIGNING_KEYS}
    every = [key for name in SIGNING_KEYS for key in set(keys[name])]
    if len(set(every)) != len(every):
        raise SettingsError(f"JWT_SECRET, SESSION_SECRET and OAUTH_CODE_SECRET share a value; {_MAKE_SECRET}")
    return Login(
        base_url=_public_url(current, base_url),
        google_client_id=_needed(current, "google_client_id"),
        google_client_secret=SecretStr(_needed(current, "google_client_secret")),
        discovery_url=current.google_discovery_url,
        allowed_emails=_allowed_emails(current),
        jwt_keys=keys["jwt_secret"],
        session_keys=keys["session_secret"],
        code_keys=keys["oauth_code_secret"],
        state_url=current.state_url or _default_state_url(),
    )


def members(current: Settings) -> Members | None:
    """Return whose tasks a worker runs: those of servers over HTTP if SESSION_SECRET is set, else the user's own.

    Raises SettingsError for the first variable that is missing or cannot be used.
    """
    if current.session_secret is None:
        return None
    if current.state_url is None:
        description = Settings.model_fields["state_url"].description
        raise SettingsError(
            "STATE_URL is not set, and a worker asks there whether a login still counts; give what the servers have, "
            f"{description}"
        )
    keys = _signing_keys(current, "session_secret")
    return Members(_allowed_emails(current), keys, current.state_url)


def _allowed_emails(current: Settings) -> frozenset[str]:
    return frozenset(part.strip().casefold() for part in _needed(current, "allowed_email").split(","))


def http_url(host: str, port: int) -> str:
    """Return the plain http URL of an address and a port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _missing(current: Settings, base_url: str | None) -> list[str]:
    """Return a sentence on each variable that a login needs and cannot use as it is."""
    others = ("google_client_id", "google_client_secret", "allowed_email")
    demands: list[Callable[[], object]] = [
        *(partial(_signing_keys, current, name) for name in SIGNING_KEYS),
        partial(_public_url, current, base_url),
        *(partial(_needed, current, name) for name in others),
    ]
    problems = []
    for demand in demands:
        try:
            demand()
        except SettingsError as error:
            problems.append(str(error))
    return problems


def _needed(current: Settings, name: str) -> str:
    value = getattr(current, name)
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if text and text.strip():
        return str(text).strip()
    description = Settings.model_fields[name].description
    remedy = f"{description}; {_MAKE_SECRET}" if name in SIGNING_KEYS else f"give {description}"
    raise SettingsError(f"{name.upper()} is not set, and HTTP is not served without a login; {remedy}")


def _signing_keys(current: Settings, name: str) -> tuple[bytes, ...]:
    text = _needed(current, name)
    keys = tuple(part.strip().encode() for part in text.split(","))
    if any(len(key) < _SECRET_BYTES for key in keys):
        raise SettingsError(f"{name.upper()} has fewer than {_SECRET_BYTES} bytes; {_MAKE_SECRET}")
    if any(mark in text.casefold() for mark in _PLACEHOLDERS):
        raise SettingsError(f"{name.upper()} is the value of an example, which anybody knows; {_MAKE_SECRET}")
    return keys


def _public_url(current: Settings, listens_on: str | None) -> str:
    if current.public_base_url is not None:
        return current.public_base_url
    url = listens_on or http_url(current.http_host, current.http_port)
    if is_loopback(urlsplit(url).hostname):
        return origin(url)
    description = Settings.model_fields["public_base_url"].description
    raise SettingsError(
        f"PUBLIC_BASE_URL is not set, and other machines can reach this server; give {description}"
    )


def _default_state_url() -> str:
    path = user_state_path("ssh-mcp-server", appauthor=False) / "oauth" / "state.db"
    return f"sqlite:///{path.as_posix().removeprefix('/')}"
