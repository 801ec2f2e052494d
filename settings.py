"""Every environment variable of the server: its type, its default, and one clear sentence when it is wrong.

Values come from the environment; then from one file: the one that `--env-file` or `SSH_MCP_ENV_FILE` names,
else the `.env` beside `app.py` in a checkout, else `ssh-mcp-server/.env` in the user's configuration directory.
Never from the working directory: desktop clients start servers inside whatever folder was opened.
"""

import getpass
import ipaddress
import os
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import urlsplit

from dotenv import dotenv_values
from platformdirs import user_config_path, user_state_path
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

__version__ = "0.1.0"

_HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")
_USER_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-@+")


class SettingsError(Exception):
    """A variable cannot be used; `str()` is one line that names it, what it holds, and what would do."""


@dataclass(frozen=True)
class Target:
    """One account on one machine: whom to log in as, where."""

    user: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}:{self.port}"


@dataclass(frozen=True)
class Login:
    """A complete OAuth configuration. Of several keys for one purpose the first signs and all verify."""

    base_url: str
    google_client_id: str
    google_client_secret: SecretStr
    discovery_url: str
    allowed_emails: frozenset[str]
    jwt_keys: tuple[bytes, ...] = field(repr=False)
    session_keys: tuple[bytes, ...] = field(repr=False)
    code_keys: tuple[bytes, ...] = field(repr=False)
    state_url: str = field(repr=False)


def host_token(text: str) -> str:
    """Return `text` in lower case if it is a host name, an alias or an IP address, else raise ValueError."""
    host = text.strip().removeprefix("[").removesuffix("]").lower()
    address, _, zone = host.partition("%")
    if _HOST_CHARACTERS.issuperset(zone) and not zone.startswith("-"):
        try:
            return str(ipaddress.ip_address(address + (f"%{zone}" if zone else "")))
        except ValueError:
            pass
    if not host or len(host) > 253 or host.startswith(("-", ".")) or not _HOST_CHARACTERS.issuperset(host):
        raise ValueError("a host name or an IP address")
    return host


def user_token(text: str) -> str:
    """Return `text` if it is an account's name, else raise ValueError."""
    user = text.strip()
    if not user or len(user) > 64 or user.startswith("-") or not _USER_CHARACTERS.issuperset(user):
        raise ValueError("an account name: letters, digits and . _ - @ +")
    return user


def _os_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""  # no account name: the operator is asked for one


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("there is no such home directory") from None


def _not_built(*off: str) -> BeforeValidator:
    """Refuse a restriction that this version would not enforce: silence would be taken for protection."""

    def refuse(value: object) -> None:
        if value is not None and str(value).strip().lower() not in ("", *off):
            raise ValueError("this version does not enforce it yet; unset it")

    return BeforeValidator(refuse)


def _base_url(text: str) -> str:
    """Return the URL without a slash at its end: https, or plain http on loopback, and nothing but an origin."""
    url = text.strip().removesuffix("/")
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in ("https", "http") or url != f"{parts.scheme}://{parts.netloc}" or not host:
        raise ValueError("an origin")
    if "@" in parts.netloc or url != url.lower() or parts.port == 0:
        raise ValueError("an origin")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError("https")
    host_token(host)
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _discovery_url(text: str) -> str:
    parts = urlsplit(text.strip())
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        raise ValueError("https")
    return text.strip()


def _emails(text: str) -> str:
    addresses = [address.strip() for address in text.split(",")]
    for address in addresses:
        name, at, domain = address.rpartition("@")
        if not (name and at and domain) or not address.isascii() or any(c.isspace() for c in address):
            raise ValueError("addresses")
    return ",".join(addresses)


def _state_url(text: str) -> str:
    if urlsplit(text).scheme not in ("sqlite", "redis", "rediss"):
        raise ValueError("a store")
    return text


def _proxies(text: str) -> str:
    for proxy in text.split(","):
        ipaddress.ip_network(proxy.strip(), strict=False)
    return text


ExpandedPath = Annotated[Path, AfterValidator(_expanded)]
NotBuilt = Annotated[None, _not_built()]
NotBuiltSwitch = Annotated[None, _not_built("false", "0", "no", "off", "never")]
Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseSettings):
    """The variables of the SSH side. Each field's description says what would do."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    ssh_default_host: Annotated[str, AfterValidator(host_token)] | None = Field(
        None, description="a host name or an IP address"
    )
    ssh_default_port: Port = Field(22, description="a port from 1 to 65535")
    ssh_default_user: Annotated[str, AfterValidator(user_token)] = Field(
        default_factory=_os_user, description="an account name: letters, digits and . _ - @ +"
    )
    ssh_key_path: ExpandedPath | None = Field(None, description="the path of a private key")
    ssh_key_passphrase: SecretStr | None = Field(None, description="the key's passphrase")
    ssh_known_hosts: ExpandedPath = Field(
        Path("~/.ssh/known_hosts").expanduser(), description="the path of a known_hosts file"
    )
    ssh_host_key_policy: Literal["strict", "accept-new"] = Field("strict", description="strict or accept-new")
    ssh_allowed_hosts: str | None = Field(
        None,
        description="comma-separated patterns [user@]host[:port], such as web1,deploy@*.example.com:2222",
    )
    ssh_max_connections: int = Field(10, ge=1, le=100, description="a whole number from 1 to 100")
    ssh_max_total_connections: int = Field(
        500, ge=1, le=100_000, description="a whole number from 1 to 100000"
    )
    ssh_idle_seconds: float = Field(600, ge=1, le=86_400, description="seconds, from 1 to 86400")
    ssh_connect_timeout: float = Field(10, ge=0.1, le=600, description="seconds, from 0.1 to 600")
    ssh_max_output_bytes: int = Field(
        30_000, ge=1_000, le=10_000_000, description="bytes, from 1000 to 10000000"
    )
    ssh_max_read_bytes: int = Field(
        65_536, ge=1_000, le=10_000_000, description="bytes, from 1000 to 10000000"
    )
    http_host: Annotated[str, AfterValidator(host_token)] = Field(
        "127.0.0.1", description="a host name or an IP address to listen on"
    )
    http_port: Port = Field(3003, description="a port from 1 to 65535")
    public_base_url: Annotated[str, AfterValidator(_base_url)] | None = Field(
        None,
        description="the origin that clients see, in lower case and without a path, such as https://mcp.example.com"
        " (plain http on loopback only)",
    )
    google_client_id: str | None = Field(None, description="the OAuth client's id at Google")
    google_client_secret: SecretStr | None = Field(None, description="the OAuth client's secret at Google")
    google_discovery_url: Annotated[str, AfterValidator(_discovery_url)] = Field(
        "https://accounts.google.com/.well-known/openid-configuration",
        description="the https URL of an OpenID provider's discovery document",
    )
    allowed_email: Annotated[str, AfterValidator(_emails)] | None = Field(
        None, description="one e-mail address, or several with commas"
    )
    jwt_secret: SecretStr | None = Field(None, description="a secret")
    session_secret: SecretStr | None = Field(None, description="a secret")
    oauth_code_secret: SecretStr | None = Field(None, description="a secret")
    state_url: Annotated[str, AfterValidator(_state_url)] | None = Field(
        None, description="sqlite:///path or redis://host:port/db"
    )
    forwarded_allow_ips: Annotated[str, AfterValidator(_proxies)] = Field(
        "127.0.0.1", description="comma-separated IP addresses or networks of proxies"
    )
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        BeforeValidator(lambda v: v.upper() if isinstance(v, str) else v),
    ] = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")

    ssh_config: NotBuilt = None
    ssh_sudo: NotBuiltSwitch = None
    allowed_commands: NotBuilt = None
    allowed_paths: NotBuilt = None
    read_only: NotBuiltSwitch = None
    rate_limit: NotBuilt = None
    confirm: NotBuiltSwitch = None
    audit_log: NotBuilt = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over the file, whose values come in as arguments."""
        return env_settings, init_settings


def env_file(named: Path | None = None) -> Path | None:
    """Return the file that settings come from besides the environment, or None.

    Raises SettingsError when a file was named that is not there.
    """
    if named is None and (text := os.environ.get("SSH_MCP_ENV_FILE")):
        named = Path(text)
    if named is not None:
        try:
            path = _expanded(named)
        except ValueError:
            path = named
        if not path.is_file():
            raise SettingsError(f"the settings file {path} does not exist; create it or name another one")
        return path
    here = Path(__file__).resolve().parent
    beside = [here / ".env"] if (here / "pyproject.toml").exists() else []
    candidates = [*beside, user_config_path("ssh-mcp-server", appauthor=False) / ".env"]
    return next((path for path in candidates if path.is_file()), None)


def load(named_file: Path | None = None) -> Settings:
    """Read and check all settings. Raises SettingsError, whose text is one line for the operator."""
    values = _file_values(env_file(named_file))
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from None


def login(current: Settings, base_url: str | None = None) -> Login:
    """Return what logging in over HTTP needs; `base_url` is what the server listens on, for want of a public URL.

    Raises SettingsError when something is missing or too weak to be trusted.
    """
    listening = base_url or f"http://{_bracketed(current.http_host)}:{current.http_port}"
    if current.public_base_url is None and not _is_loopback(urlsplit(listening).hostname or ""):
        raise SettingsError(
            f"PUBLIC_BASE_URL is not set, and listening on {listening} needs it;"
            f" give {Settings.model_fields['public_base_url'].description}"
        )
    return Login(
        base_url=current.public_base_url or listening,
        google_client_id=_needed(current, "google_client_id"),
        google_client_secret=SecretStr(_needed(current, "google_client_secret")),
        discovery_url=current.google_discovery_url,
        allowed_emails=frozenset(
            address.strip().lower() for address in _needed(current, "allowed_email").split(",")
        ),
        state_url=current.state_url or _default_state_url(),
        **_keys(current),
    )


def _default_state_url() -> str:
    return f"sqlite://{user_state_path('ssh-mcp-server', appauthor=False) / 'oauth' / 'state.db'}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _needed(current: Settings, name: str) -> str:
    value = getattr(current, name)
    if value is None:
        raise SettingsError(
            f"{name.upper()} is not set, and serving over HTTP needs it; give {Settings.model_fields[name].description}"
        )
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


_SIGNING = {"jwt_secret": "jwt_keys", "session_secret": "session_keys", "oauth_code_secret": "code_keys"}
_LEAST_SECRET_BYTES = 32
_LEAST_DIFFERENT_BYTES = 10


def _keys(current: Settings) -> dict[str, tuple[bytes, ...]]:
    keys = {
        name: tuple(key.strip().encode() for key in _secret(current, name).split(",")) for name in _SIGNING
    }
    seen: dict[bytes, str] = {}
    for name, values in keys.items():
        for key in values:
            if len(key) < _LEAST_SECRET_BYTES or len(set(key)) < _LEAST_DIFFERENT_BYTES:
                raise SettingsError(f"{name.upper()} is too weak: 32 random bytes at least; {_fresh(name)}")
            if key in seen:
                raise SettingsError(f"{name.upper()} holds the value of {seen[key].upper()}; {_fresh(name)}")
            seen[key] = name
    return {_SIGNING[name]: values for name, values in keys.items()}


def _secret(current: Settings, name: str) -> str:
    if getattr(current, name) is None:
        raise SettingsError(f"{name.upper()} is not set, and serving over HTTP needs it; {_fresh(name)}")
    return _needed(current, name)


def _fresh(name: str) -> str:
    return f"make one for {name.upper()} with: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


def _file_values(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = {
            name.lower(): value for name, value in dotenv_values(path, interpolate=False).items() if value
        }
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"the settings file {path} cannot be read: {getattr(error, 'strerror', 'not UTF-8')}"
        ) from None
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO) and _SECRETS & values.keys():
        raise SettingsError(f"{path} holds a secret and others may read it; run: chmod 600 {path}")
    return values


_SECRETS = frozenset(
    {
        "google_client_secret",
        "jwt_secret",
        "session_secret",
        "oauth_code_secret",
        "ssh_key_passphrase",
        "ssh_sudo_password",
    }
)


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    field = str(first["loc"][0])
    if first["msg"].endswith("unset it"):
        return f"{field.upper()} is set, and {first['msg'].removeprefix('Value error, ')}"
    held = (
        "a value that cannot be used"
        if field in (*_SECRETS, "state_url")
        else repr(str(first["input"])[:100])
    )
    return f"{field.upper()} is {held}; give {Settings.model_fields[field].description}"


def exit_for(error: SettingsError) -> NoReturn:
    """End the process with the operator's line and exit status 2."""
    print(f"ssh-mcp-server: {error}", file=sys.stderr)
    raise SystemExit(2)
