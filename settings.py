"""Every environment variable of the server: its type, its default, and one clear sentence when it is wrong.

Values come from the environment; then from one file: the one that `--env-file` or `SSH_MCP_ENV_FILE` names,
else the `.env` beside `app.py` in a checkout, else `ssh-mcp-server/.env` in the user's configuration directory.
Never from the working directory: desktop clients start servers inside whatever folder was opened.
"""

import getpass
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from dotenv.parser import Binding, parse_stream
from platformdirs import user_config_path
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

import settings_values
from version import __version__ as __version__

GOOGLE = "https://accounts.google.com/.well-known/openid-configuration"


class SettingsError(Exception):
    """A variable cannot be used; `str()` is one line that names it, what it holds, and what would do.

    `problems` are such lines on everything that was found together, that one first.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(problems[0])
        self.problems = problems


@dataclass(frozen=True)
class Target:
    """One account on one machine: whom to log in as, where."""

    user: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}:{self.port}"


def os_user() -> str:
    """Return the name of the account that this process runs as, an empty one if it has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # the last on Windows, before Python 3.13
        return ""  # no account name: the operator is asked for one


ExpandedPath = Annotated[Path, AfterValidator(settings_values.expanded)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseSettings):
    """Every variable. A field's description says what would do; the string below it says what it is for."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    ssh_default_host: Annotated[str, AfterValidator(settings_values.host_token)] | None = Field(
        None, description="a host name or an IP address"
    )
    """The host of a call that names none; it may be an alias of the SSH config."""
    ssh_default_port: Port = Field(22, description="a port from 1 to 65535")
    """Its port; when it is not set, that of the SSH config wins."""
    ssh_default_user: Annotated[str, AfterValidator(settings_values.user_token)] = Field(
        default_factory=os_user, description="an account name: letters, digits and . _ - @ +"
    )
    """The account there; when it is not set, that of the SSH config wins."""
    ssh_key_path: ExpandedPath | None = Field(None, description="the path of a private key")
    """Ed25519, ECDSA or RSA, OpenSSH or PEM; for the default target, and for hosts without IdentityFile in the SSH
    config. Without it the SSH agent's keys, then IdentityFile or else `~/.ssh/id_ed25519`, `id_ecdsa`, `id_rsa`."""
    ssh_key_passphrase: SecretStr | None = Field(None, description="the key's passphrase")
    """Needed where the key has one and no agent holds it."""
    ssh_known_hosts: ExpandedPath = Field(
        Path("~/.ssh/known_hosts").expanduser(), description="the path of a known_hosts file"
    )
    """Host keys as OpenSSH keeps them: hashed names, wildcards, `@cert-authority` and `@revoked` included. Set, it
    wins over the SSH config."""
    ssh_config: ExpandedPath = Field(
        Path("~/.ssh/config").expanduser(), description="the path of an SSH client configuration, or none"
    )
    """The SSH config, read as `ssh -F` reads it; `none` for no one."""
    ssh_host_key_policy: Literal["strict", "accept-new"] = Field("strict", description="strict or accept-new")
    """`strict` refuses unknown hosts; `accept-new` records them at the first visit. A changed key is always refused.
    Set, it wins over the SSH config."""
    ssh_allowed_hosts: str | None = Field(
        None,
        description="comma-separated patterns [user@]host[:port], such as web1,deploy@*.example.com:2222",
    )
    """What calls may name; when it is not set, the default host. Without user or port: those that the settings or the
    SSH config give that host. `*` and `?` are wildcards, `*@*:*` is anything, and `10.0.*` also a name like
    `10.0.example.com`. Calls name hosts in the usual spelling (`10.0.0.5`, not `10.0.5`; no dot at the end)."""
    allowed_paths: Annotated[str, AfterValidator(settings_values.directories)] | None = Field(
        None,
        description="colon-separated directories without wildcards, such as /srv/app:~/notes",
    )
    """What the file tools may touch; when it is not set, anything. Absolute, or in the login directory (`~/notes`,
    `notes`)."""
    allowed_commands: str | None = Field(
        None, description="the first words of commands, with commas between them, such as ls,systemctl status"
    )
    """What commands may begin with; when it is not set, any command line may be run."""
    read_only: bool = Field(False, description="true or false")
    """`true` hides and refuses what writes files, and `ssh_execute` unless `ALLOWED_COMMANDS` is set."""
    ssh_sudo: bool = Field(False, description="true or false")
    """`true` gives `ssh_execute` the parameter `sudo`."""
    ssh_sudo_password: Annotated[SecretStr, AfterValidator(settings_values.one_line)] | None = Field(
        None, description="the password that sudo asks for: one line of 255 bytes at most"
    )
    """It goes to sudo alone, if it asks, on every host that calls may name. Without one sudo must ask for none
    (`NOPASSWD`)."""
    ssh_max_connections: int = Field(10, ge=1, le=100, description="a whole number from 1 to 100")
    """Connections kept for one target."""
    ssh_max_total_connections: int = Field(
        500, ge=1, le=100_000, description="a whole number from 1 to 100000"
    )
    """Connections kept in all."""
    ssh_idle_seconds: float = Field(600, ge=1, le=86_400, description="seconds, from 1 to 86400")
    """An idle connection is closed after this."""
    ssh_connect_timeout: float = Field(10, ge=0.1, le=600, description="seconds, from 0.1 to 600")
    """From name look-up to login. Set, it wins over the SSH config."""
    ssh_max_output_bytes: int = Field(
        30_000, ge=1_000, le=10_000_000, description="bytes, from 1000 to 10000000"
    )
    """Of a command's output in one answer, both streams together."""
    ssh_max_read_bytes: int = Field(
        65_536, ge=1_000, le=10_000_000, description="bytes, from 1000 to 10000000"
    )
    """Text of a file in one answer."""
    rate_limit: int | None = Field(
        None, ge=1, le=100_000, description="tool calls a minute, a whole number from 1 to 100000"
    )
    """What one identity may make in any minute; one over it is refused, and told when to try again."""
    confirm: Literal["never", "destructive"] = Field("never", description="never or destructive")
    """`destructive`: commands, writes, edits and signals ask the person first, through the client; one that cannot ask
    is refused."""
    http_host: Annotated[str, AfterValidator(settings_values.host_token)] = Field(
        "127.0.0.1", description="an address or a name of this machine to listen on"
    )
    """HTTP: where it listens; `--host` wins."""
    http_port: Port = Field(3003, description="a port from 1 to 65535")
    """HTTP: on which port; `--port` wins."""
    public_base_url: Annotated[str, AfterValidator(settings_values.origin)] | None = Field(
        None,
        description="an https URL without a path, such as https://mcp.example.com; plain http only on loopback",
    )
    """HTTP: the URL that clients and Google see; on loopback it may be left out, and is where it listens."""
    google_client_id: str | None = Field(None, description="the OAuth client ID from Google's console")
    """HTTP: it is shown by https://console.cloud.google.com/apis/credentials; must be given."""
    google_client_secret: SecretStr | None = Field(
        None, description="the OAuth client secret from Google's console"
    )
    """HTTP: it is shown there, too; must be given."""
    google_discovery_url: Annotated[str, AfterValidator(settings_values.trusted_url)] = Field(
        GOOGLE, description="the https URL of an OpenID provider's discovery document"
    )
    """HTTP: another OpenID provider instead of Google."""
    allowed_email: Annotated[str, AfterValidator(settings_values.emails)] | None = Field(
        None, description="who may log in: e-mail addresses in ASCII, with commas between them"
    )
    """HTTP: compared without case, and asked at every use of a token; must be given."""
    jwt_secret: SecretStr | None = Field(None, description="the key that signs access tokens")
    """HTTP: 32 bytes or more, made with `openssl rand -hex 32`; must be given. `NEW,OLD` changes it: the first signs,
    all verify."""
    session_secret: SecretStr | None = Field(
        None, description="the key that signs sessions, client ids and job ids"
    )
    """HTTP: likewise, and another one; it also signs the browser's consent."""
    oauth_code_secret: SecretStr | None = Field(None, description="the key that signs authorization codes")
    """HTTP: likewise, and a third one."""
    state_url: Annotated[str, AfterValidator(settings_values.state_url)] | None = Field(
        None, repr=False, description="sqlite:///path or redis://host:port/db"
    )
    """HTTP: what must outlive a restart; when it is not set, a SQLite file in your state directory. The file belongs
    to the account that runs the server. `redis://` is for several replicas."""
    tasks_url: Annotated[str, AfterValidator(settings_values.redis_url)] | None = Field(
        None, repr=False, description="redis://host:port/db, or rediss:// for TLS"
    )
    """Commands may run as MCP tasks, in any replica or worker (docs/replicas.md)."""
    forwarded_allow_ips: Annotated[str, AfterValidator(settings_values.networks)] = Field(
        "127.0.0.1", description="addresses or networks of proxies, with commas between them"
    )
    """HTTP: proxies whose `X-Forwarded-For` is believed."""
    audit_log: Annotated[str, AfterValidator(settings_values.audit_log)] | None = Field(
        None, description="the absolute path of a file, syslog:, or fd: and the number of an open descriptor"
    )
    """The audit trail. Without it there is none."""
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        BeforeValidator(lambda v: v.upper() if isinstance(v, str) else v),
    ] = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")
    """What goes to stderr; stdout belongs to MCP."""

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
        return named and settings_values.expanded(named)
    except ValueError:
        return named


def _usual_env_files() -> list[Path]:
    here = Path(__file__).resolve().parent
    beside = [here / ".env"] if (here / "pyproject.toml").exists() else []
    return [*beside, user_config_path("ssh-mcp-server", appauthor=False) / ".env"]


def load(named_file: Path | None = None) -> Settings:
    """Read and check all settings. Raises SettingsError, whose text is one line for the operator."""
    values, problems = _file_values(env_file(named_file))
    try:
        loaded = Settings(**values)
    except ValidationError as error:
        problems += [_sentence(fault) for fault in error.errors(include_url=False, include_context=False)]
    if problems:
        raise SettingsError(*problems)
    return loaded


def assigned_names(path: Path) -> list[str]:
    """Return the names that a settings file assigns to, as they stand there. Raises SettingsError as `load` does."""
    return [binding.key for binding in _bindings(path)[0] if binding.key and binding.value is not None]


def _file_values(path: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Return what a file assigns, and a sentence on each thing that is wrong with it."""
    if path is None:
        return {}, []
    bindings, mode = _bindings(path)
    wrong = [binding for binding in bindings if _is_wrong(binding)]
    problems = [_not_understood(binding, path) for binding in wrong]
    values = {binding.key.lower(): binding.value for binding in bindings if binding.key and binding.value}
    holds_secret = _SECRETS & values.keys() or "@" in f"{values.get('state_url')}{values.get('tasks_url')}"
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO) and holds_secret:
        problems.append(f"{path} holds a secret and others may read it; run: chmod 600 {path}")
    return values, problems


def _bindings(path: Path) -> tuple[list[Binding], int]:
    """Return the lines of a file, and its mode."""
    try:
        with path.open(encoding="utf-8") as file:
            return list(parse_stream(file)), os.fstat(file.fileno()).st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"the settings file {path} cannot be read: {getattr(error, 'strerror', 'not UTF-8')}"
        ) from None


def _is_wrong(binding: Binding) -> bool:
    """Whether a line assigns nothing, and is no comment: what it was meant for may be a restriction."""
    return binding.error or (binding.key is not None and binding.value is None)


def _not_understood(binding: Binding, path: Path) -> str:
    text = binding.original.string
    blank_lines = text[: len(text) - len(text.lstrip())].count("\n")
    return (
        f"the settings file {path} cannot be understood in line {binding.original.line + blank_lines}; write "
        "NAME=value, with every quote closed"
    )


SIGNING_KEYS = ("jwt_secret", "session_secret", "oauth_code_secret")
_SECRETS = frozenset(
    {
        *SIGNING_KEYS,
        "google_client_secret",
        "ssh_key_passphrase",
        "ssh_sudo_password",
    }
)


def environment_without_secrets() -> dict[str, str]:
    """Return the environment for a command of the operator's, which needs none of the server's secrets."""
    return {name: value for name, value in os.environ.items() if name.lower() not in _SECRETS}


def _sentence(fault: ErrorDetails) -> str:
    name = str(fault["loc"][0])
    shown = str(fault["input"])
    held = "a value that cannot be used" if is_secret(name, shown) else repr(shown[:100])
    return f"{name.upper()} is {held}; give {Settings.model_fields[name].description}"


def is_secret(name: str, value: str) -> bool:
    """Tell whether a variable's value is to be kept out of what people see; a URL may hold a password."""
    return name.lower() in _SECRETS or ("://" in value and "@" in value)


def exit_for(error: SettingsError) -> NoReturn:
    """End the process with the operator's line and exit status 2."""
    print(f"ssh-mcp-server: {error}", file=sys.stderr)
    raise SystemExit(2)
