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

from dotenv.parser import Binding, parse_stream
from platformdirs import user_config_path, user_state_path
from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

__version__ = "0.1.0"

_HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")
_USER_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-@+")

_GOOGLE = "https://accounts.google.com/.well-known/openid-configuration"
_SECRET_BYTES = 32
_PASSWORD_BYTES = 255
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

_url = TypeAdapter(AnyHttpUrl, config=ConfigDict(url_preserve_empty_path=True))


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


def is_loopback(host: str | None) -> bool:
    """Tell whether a host is the machine that asks, by name or by address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _trusted_url(text: str) -> str:
    """Return an https URL, or an http one of this machine, in its canonical form; else raise ValueError."""
    url = str(_url.validate_python(text.strip()))
    parts = urlsplit(url)
    if parts.scheme != "https" and not is_loopback(parts.hostname):
        raise ValueError("plain http leaves this machine")
    if parts.username is not None or parts.password is not None or "#" in url:
        raise ValueError("a URL without user name, password and fragment")
    return url


def _origin(text: str) -> str:
    """Return the canonical origin, without a slash at its end; raise ValueError when there is more to the URL."""
    url = _trusted_url(text).removesuffix("/")
    if urlsplit(url).path or "?" in url:
        raise ValueError("an origin without path and query")
    return url


def _redis_url(text: str) -> str:
    url = text.strip()
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or parts.port == 0:
        raise ValueError("no Redis server")
    return url


def _state_url(text: str) -> str:
    url = text.strip()
    parts = urlsplit(url)
    names_file = parts.scheme == "sqlite" and not parts.netloc and len(parts.path) > 1
    return url if names_file else _redis_url(url)


def _networks(text: str) -> str:
    """Return comma-separated addresses and networks as they stand if all can be read, else raise ValueError."""
    for part in text.split(","):
        ipaddress.ip_network(part.strip(), strict=False)
    return text


def _emails(text: str) -> str:
    """Return comma-separated addresses as they stand if all can be used, else raise ValueError.

    Only ASCII: letters of other alphabets that fold to the same one would let a stranger pass for somebody.
    """
    for part in text.split(","):
        name, _, domain = part.strip().rpartition("@")
        if not part.isascii() or not name or not domain or len(part.split()) != 1 or "*" in part:
            raise ValueError("e-mail addresses")
    return text


def _audit_log(text: str) -> str:
    kind, colon, rest = text.partition(":")
    if colon and kind == "fd" and rest.isascii() and rest.isdecimal() and int(rest[:9]) >= 2:
        return text  # 0 and 1 belong to MCP
    if colon and kind == "syslog" and (not rest or rest.startswith("/")):
        return text
    path = _expanded(Path(text))
    if not path.is_absolute():
        raise ValueError("an absolute path")
    return str(path)


def _directories(text: str) -> str:
    """Return colon-separated directories as they stand if all can be meant, else raise ValueError."""
    entries = [entry for part in text.split(":") if (entry := part.strip())]
    if not entries:
        raise ValueError("directories")
    for entry in entries:
        if not entry.isprintable() or "*" in entry or (entry.startswith("~") and entry[1:2] not in ("", "/")):
            raise ValueError("directories without wildcards, in the login directory of the account alone")
    return text


def _one_line(secret: SecretStr) -> SecretStr:
    """Return a password that sudo reads whole, else raise ValueError: what it left would be the command's stdin."""
    text = secret.get_secret_value()
    if len(text.encode()) > _PASSWORD_BYTES or not {*"\r\n\0"}.isdisjoint(text):
        raise ValueError("a password of one line")
    return secret


def os_user() -> str:
    """Return the name of the account that this process runs as, an empty one if it has none."""
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


ExpandedPath = Annotated[Path, AfterValidator(_expanded)]
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
        default_factory=os_user, description="an account name: letters, digits and . _ - @ +"
    )
    ssh_key_path: ExpandedPath | None = Field(None, description="the path of a private key")
    ssh_key_passphrase: SecretStr | None = Field(None, description="the key's passphrase")
    ssh_known_hosts: ExpandedPath = Field(
        Path("~/.ssh/known_hosts").expanduser(), description="the path of a known_hosts file"
    )
    ssh_config: ExpandedPath = Field(
        Path("~/.ssh/config").expanduser(), description="the path of an SSH client configuration, or none"
    )
    ssh_host_key_policy: Literal["strict", "accept-new"] = Field("strict", description="strict or accept-new")
    ssh_allowed_hosts: str | None = Field(
        None,
        description="comma-separated patterns [user@]host[:port], such as web1,deploy@*.example.com:2222",
    )
    allowed_paths: Annotated[str, AfterValidator(_directories)] | None = Field(
        None,
        description="colon-separated directories without wildcards, such as /srv/app:~/notes",
    )
    allowed_commands: str | None = Field(
        None, description="the first words of commands, with commas between them, such as ls,systemctl status"
    )
    read_only: bool = Field(False, description="true or false")
    ssh_sudo: bool = Field(False, description="true or false")
    ssh_sudo_password: Annotated[SecretStr, AfterValidator(_one_line)] | None = Field(
        None, description="the password that sudo asks for: one line of 255 bytes at most"
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
    rate_limit: int | None = Field(
        None, ge=1, le=100_000, description="tool calls a minute, a whole number from 1 to 100000"
    )
    http_host: Annotated[str, AfterValidator(host_token)] = Field(
        "127.0.0.1", description="an address or a name of this machine to listen on"
    )
    http_port: Port = Field(3003, description="a port from 1 to 65535")
    public_base_url: Annotated[str, AfterValidator(_origin)] | None = Field(
        None,
        description="an https URL without a path, such as https://mcp.example.com; plain http only on loopback",
    )
    google_client_id: str | None = Field(None, description="the OAuth client ID from Google's console")
    google_client_secret: SecretStr | None = Field(
        None, description="the OAuth client secret from Google's console"
    )
    google_discovery_url: Annotated[str, AfterValidator(_trusted_url)] = Field(
        _GOOGLE, description="the https URL of an OpenID provider's discovery document"
    )
    allowed_email: Annotated[str, AfterValidator(_emails)] | None = Field(
        None, description="who may log in: e-mail addresses in ASCII, with commas between them"
    )
    jwt_secret: SecretStr | None = Field(None, description="the key that signs access tokens")
    session_secret: SecretStr | None = Field(
        None, description="the key that signs sessions, client ids and job ids"
    )
    oauth_code_secret: SecretStr | None = Field(None, description="the key that signs authorization codes")
    state_url: Annotated[str, AfterValidator(_state_url)] | None = Field(
        None, repr=False, description="sqlite:///path or redis://host:port/db"
    )
    tasks_url: Annotated[str, AfterValidator(_redis_url)] | None = Field(
        None, repr=False, description="redis://host:port/db, or rediss:// for TLS"
    )
    forwarded_allow_ips: Annotated[str, AfterValidator(_networks)] = Field(
        "127.0.0.1", description="addresses or networks of proxies, with commas between them"
    )
    audit_log: Annotated[str, AfterValidator(_audit_log)] | None = Field(
        None, description="the absolute path of a file, syslog:, or fd: and the number of an open descriptor"
    )
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        BeforeValidator(lambda v: v.upper() if isinstance(v, str) else v),
    ] = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")

    confirm: NotBuiltSwitch = None

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
        return "Google" if self.discovery_url == _GOOGLE else str(urlsplit(self.discovery_url).hostname)


def login(current: Settings, base_url: str | None = None) -> Login:
    """Return the OAuth configuration, without which HTTP is not served.

    `base_url` is what the server really listens on, if not what the settings say; without PUBLIC_BASE_URL it is the
    URL that clients see, as long as only this machine can reach it. Raises SettingsError for the first variable that
    is missing or cannot be used.
    """
    names = ("jwt_secret", "session_secret", "oauth_code_secret")
    keys = {name: _signing_keys(name, _needed(current, name)) for name in names}
    every = [key for name in names for key in set(keys[name])]
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
    keys = _signing_keys("session_secret", _needed(current, "session_secret"))
    return Members(_allowed_emails(current), keys, current.state_url)


def _allowed_emails(current: Settings) -> frozenset[str]:
    return frozenset(part.strip().casefold() for part in _needed(current, "allowed_email").split(","))


def http_url(host: str, port: int) -> str:
    """Return the plain http URL of an address and a port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _needed(current: Settings, name: str) -> str:
    value = getattr(current, name)
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if text and text.strip():
        return str(text).strip()
    description = Settings.model_fields[name].description
    remedy = f"{description}; {_MAKE_SECRET}" if name in _SIGNING else f"give {description}"
    raise SettingsError(f"{name.upper()} is not set, and HTTP is not served without a login; {remedy}")


def _signing_keys(name: str, text: str) -> tuple[bytes, ...]:
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
        return _origin(url)
    description = Settings.model_fields["public_base_url"].description
    raise SettingsError(
        f"PUBLIC_BASE_URL is not set, and other machines can reach this server; give {description}"
    )


def _default_state_url() -> str:
    path = user_state_path("ssh-mcp-server", appauthor=False) / "oauth" / "state.db"
    return f"sqlite:///{path.as_posix().removeprefix('/')}"


def env_file(named: Path | None = None) -> Path | None:
    """Return the file that settings come from besides the environment, or None.

    Raises SettingsError when a file was named that is not there.
    """
    path = _named_env_file(named)
    if path is None:
        return next((path for path in _usual_env_files() if path.is_file()), None)
    if not path.is_file():
        raise SettingsError(f"the settings file {path} does not exist; create it or name another one")
    return path


def new_env_file(named: Path | None = None) -> Path:
    """Return where a settings file is to be made: where it was named, or where it is looked for first.

    Raises SettingsError when one is there that would be hidden by the new one.
    """
    if (path := _named_env_file(named)) is not None:
        return path
    usual = _usual_env_files()
    for path in usual:
        if path.exists():
            raise SettingsError(f"{path} is there already; nothing was written")
    return usual[0]


def _named_env_file(named: Path | None) -> Path | None:
    if named is None and (text := os.environ.get("SSH_MCP_ENV_FILE")):
        named = Path(text)
    try:
        return named and _expanded(named)
    except ValueError:
        return named


def _usual_env_files() -> list[Path]:
    here = Path(__file__).resolve().parent
    beside = [here / ".env"] if (here / "pyproject.toml").exists() else []
    return [*beside, user_config_path("ssh-mcp-server", appauthor=False) / ".env"]


def load(named_file: Path | None = None) -> Settings:
    """Read and check all settings. Raises SettingsError, whose text is one line for the operator."""
    values = _file_values(env_file(named_file))
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from None


def _file_values(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            bindings = list(parse_stream(file))
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"the settings file {path} cannot be read: {getattr(error, 'strerror', 'not UTF-8')}"
        ) from None
    values = dict(_assigned(binding, path) for binding in bindings if binding.key or binding.error)
    values = {name: value for name, value in values.items() if value}
    holds_secret = _SECRETS & values.keys() or "@" in f"{values.get('state_url')}{values.get('tasks_url')}"
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO) and holds_secret:
        raise SettingsError(f"{path} holds a secret and others may read it; run: chmod 600 {path}")
    return values


def _assigned(binding: Binding, path: Path) -> tuple[str, str]:
    """Return what a line assigns to which name. Raises SettingsError for any other: it may hold a restriction."""
    if binding.error or binding.key is None or binding.value is None:
        text = binding.original.string
        blank_lines = text[: len(text) - len(text.lstrip())].count("\n")
        raise SettingsError(
            f"the settings file {path} cannot be understood in line {binding.original.line + blank_lines}; write "
            "NAME=value, with every quote closed"
        )
    return binding.key.lower(), binding.value


_SIGNING = frozenset({"jwt_secret", "session_secret", "oauth_code_secret"})
_SECRETS = _SIGNING | frozenset(
    {
        "google_client_secret",
        "ssh_key_passphrase",
        "ssh_sudo_password",
    }
)


def environment_without_secrets() -> dict[str, str]:
    """Return the environment for a command of the operator's, which needs none of the server's secrets."""
    return {name: value for name, value in os.environ.items() if name.lower() not in _SECRETS}


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    if first["msg"].endswith("unset it"):
        return f"{name.upper()} is set, and {first['msg'].removeprefix('Value error, ')}"
    shown = str(first["input"])
    held = "a value that cannot be used" if is_secret(name, shown) else repr(shown[:100])
    return f"{name.upper()} is {held}; give {Settings.model_fields[name].description}"


def is_secret(name: str, value: str) -> bool:
    """Tell whether a variable's value is to be kept out of what people see; a URL may hold a password."""
    return name.lower() in _SECRETS or ("://" in value and "@" in value)


def exit_for(error: SettingsError) -> NoReturn:
    """End the process with the operator's line and exit status 2."""
    print(f"ssh-mcp-server: {error}", file=sys.stderr)
    raise SystemExit(2)
