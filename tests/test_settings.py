"""Where settings come from, and what is said when one is wrong."""

import os
from pathlib import Path

import pytest

from settings import Settings, SettingsError, env_file, exit_for, load
from settings_login import Login, login


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.lower() in Settings.model_fields or name == "SSH_MCP_ENV_FILE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_defaults_are_those_of_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "somebody")
    values = load()
    assert (values.ssh_default_host, values.ssh_default_port, values.ssh_default_user) == (
        None,
        22,
        "somebody",
    )
    assert (values.ssh_key_path, values.ssh_key_passphrase, values.ssh_allowed_hosts) == (None, None, None)
    assert values.ssh_known_hosts == Path("~/.ssh/known_hosts").expanduser()
    assert values.ssh_config == Path("~/.ssh/config").expanduser()
    assert values.ssh_host_key_policy == "strict"
    assert (values.ssh_max_connections, values.ssh_max_total_connections) == (10, 500)
    assert (values.ssh_idle_seconds, values.ssh_connect_timeout) == (600, 10)
    assert (values.ssh_max_output_bytes, values.ssh_max_read_bytes) == (30_000, 65_536)
    assert values.log_level == "INFO"


def test_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write(tmp_path / "env", "SSH_DEFAULT_HOST=from-file\nSSH_DEFAULT_PORT=23\n")
    monkeypatch.setenv("SSH_DEFAULT_HOST", "from-environment")
    values = load(file)
    assert (values.ssh_default_host, values.ssh_default_port) == ("from-environment", 23)


def test_file_may_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSH_MCP_ENV_FILE", str(write(tmp_path / "env", "SSH_DEFAULT_HOST=named")))
    assert load().ssh_default_host == "named"


def test_file_of_the_configuration_directory_is_read(tmp_path: Path) -> None:
    write(tmp_path / "config" / "ssh-mcp-server" / ".env", "SSH_DEFAULT_HOST=configured")
    assert load().ssh_default_host == "configured"


def test_file_of_the_working_directory_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / ".env", "SSH_DEFAULT_HOST=stranger")
    monkeypatch.chdir(tmp_path)
    assert env_file() is None
    assert load().ssh_default_host is None


def test_empty_value_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSH_DEFAULT_HOST", "")
    monkeypatch.setenv("SSH_MAX_CONNECTIONS", "")
    assert load(write(tmp_path / "env", "SSH_DEFAULT_PORT=\n")).ssh_default_port == 22


def test_paths_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_KEY_PATH", "~/key")
    assert load().ssh_key_path == Path.home() / "key"


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("SSH_DEFAULT_HOST", "-oProxyCommand=x", "host name"),
        ("SSH_DEFAULT_HOST", "a b", "host name"),
        ("SSH_DEFAULT_PORT", "0", "65535"),
        ("SSH_DEFAULT_PORT", "ssh", "65535"),
        ("SSH_DEFAULT_USER", "-l", "account"),
        ("SSH_HOST_KEY_POLICY", "no", "accept-new"),
        ("SSH_MAX_CONNECTIONS", "0", "1 to 100"),
        ("SSH_MAX_TOTAL_CONNECTIONS", "x", "whole number"),
        ("SSH_IDLE_SECONDS", "-1", "seconds"),
        ("SSH_CONNECT_TIMEOUT", "soon", "seconds"),
        ("SSH_MAX_OUTPUT_BYTES", "1", "1000"),
        ("SSH_MAX_READ_BYTES", "1", "1000"),
        ("AUDIT_LOG", "audit.jsonl", "absolute path"),
        ("AUDIT_LOG", "fd:1", "descriptor"),
        ("AUDIT_LOG", "fd:x", "descriptor"),
        ("AUDIT_LOG", "syslog:here", "syslog"),
        ("LOG_LEVEL", "loud", "DEBUG"),
        ("SSH_SUDO", "perhaps", "true or false"),
        ("RATE_LIMIT", "0", "1 to 100000"),
        ("RATE_LIMIT", "10/s", "whole number"),
        ("ALLOWED_PATHS", ":", "directories"),
        ("ALLOWED_PATHS", "/srv:/home/*", "without wildcards"),
        ("ALLOWED_PATHS", "~root", "directories"),
        ("ALLOWED_PATHS", "/srv:~root/x", "directories"),
    ],
)
def test_bad_value_is_one_line_that_says_what_would_do(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as raised:
        load()
    text = str(raised.value)
    assert text.startswith(variable)
    assert value in text or value.upper() in text
    assert remedy in text
    assert "\n" not in text


def test_secret_is_taken_as_it_stands(tmp_path: Path) -> None:
    secret = load(write(tmp_path / "env", "SSH_KEY_PASSPHRASE='a${HOME}b'")).ssh_key_passphrase
    assert secret is not None
    assert secret.get_secret_value() == "a${HOME}b"


def test_secret_that_others_may_read_stops_the_start(tmp_path: Path) -> None:
    file = write(tmp_path / "env", "SSH_KEY_PASSPHRASE=hunter2", 0o640)
    with pytest.raises(SettingsError, match="chmod 600") as raised:
        load(file)
    assert "hunter2" not in str(raised.value)
    file.chmod(0o600)
    assert load(file).ssh_key_passphrase is not None


@pytest.mark.parametrize("variable", ["SSH_KEY_PASSPHRASE", "SSH_SUDO_PASSWORD"])
def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "hunter2")
    assert "hunter2" not in repr(load())


@pytest.mark.parametrize("password", ["hunter2\nls", "hunter2\r", "hunter2" * 40])
def test_sudo_password_that_sudo_would_not_read_whole_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    monkeypatch.setenv("SSH_SUDO_PASSWORD", password)
    with pytest.raises(SettingsError, match=r"SSH_SUDO_PASSWORD is .* one line of 255 bytes") as raised:
        load()
    assert "hunter2" not in str(raised.value)


def test_sudo_is_off_until_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().ssh_sudo is False
    monkeypatch.setenv("SSH_SUDO", "true")
    assert load().ssh_sudo is True


def test_file_that_is_named_and_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        load(tmp_path / "none")


def test_unknown_variables_are_left_alone(tmp_path: Path) -> None:
    load(write(tmp_path / "env", "GOOGLE_CLIENT_ID=x\nOTHER=y"))


def test_exit_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        exit_for(SettingsError("X is wrong"))
    assert raised.value.code == 2
    assert capsys.readouterr().err == "ssh-mcp-server: X is wrong\n"


def test_example_file_names_every_setting_and_loads() -> None:
    example = Path(__file__).parents[1] / ".env.example"
    load(example)
    names = {line.partition("=")[0].lower() for line in example.read_text().splitlines() if "=" in line[:40]}
    built = {name for name, field in Settings.model_fields.items() if field.description}
    assert built <= names


def test_example_file_leaves_to_the_ssh_config_what_that_may_decide() -> None:
    set_there = load(Path(__file__).parents[1] / ".env.example").model_fields_set
    assert set_there.isdisjoint(
        {
            "ssh_config",
            "ssh_connect_timeout",
            "ssh_default_port",
            "ssh_default_user",
            "ssh_host_key_policy",
            "ssh_known_hosts",
        }
    )


def test_file_named_by_argument_is_the_only_one_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "config" / "ssh-mcp-server" / ".env", "SSH_DEFAULT_USER=configured")
    monkeypatch.setenv("SSH_MCP_ENV_FILE", str(write(tmp_path / "named", "SSH_DEFAULT_PORT=23")))
    values = load(write(tmp_path / "argument", "SSH_DEFAULT_HOST=web1"))
    assert values.ssh_default_host == "web1"
    assert values.ssh_default_port == 22
    assert values.ssh_default_user != "configured"


def test_empty_value_in_the_environment_leaves_the_file_its_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSH_DEFAULT_HOST", "")
    assert load(write(tmp_path / "env", "SSH_DEFAULT_HOST=web1")).ssh_default_host == "web1"


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620])
def test_secret_is_refused_whoever_else_may_use_the_file(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SettingsError, match="chmod 600"):
        load(write(tmp_path / "env", "SSH_KEY_PASSPHRASE=hunter2", mode))


def test_file_without_secrets_may_be_read_by_all(tmp_path: Path) -> None:
    assert load(write(tmp_path / "env", "SSH_DEFAULT_HOST=web1", 0o644)).ssh_default_host == "web1"


@pytest.mark.parametrize("variable", ["SSH_CONFIG", "SSH_KEY_PATH", "SSH_KNOWN_HOSTS"])
def test_home_of_an_account_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "~no-such-account/file")
    with pytest.raises(SettingsError, match=f"^{variable} .*~no-such-account/file"):
        load()


def test_settings_file_in_a_home_that_is_not_there_is_told() -> None:
    with pytest.raises(SettingsError, match="~no-such-account/env"):
        load(Path("~no-such-account/env"))


def test_value_of_several_lines_is_told_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_DEFAULT_HOST", "web1\nweb2")
    with pytest.raises(SettingsError, match=r"^SSH_DEFAULT_HOST is [^\n]*host name[^\n]*\Z"):
        load()


@pytest.mark.parametrize(
    "line",
    [
        'ALLOWED_COMMANDS="ls,cat',
        "ALLOWED_COMMANDS='ls",
        'ALLOWED_COMMANDS="ls",cat',
        "ALLOWED_COMMANDS ls",
        "ALLOWED_COMMANDS: ls",
        "set READ_ONLY=true",
        "READ_ONLY",
        "export READ_ONLY",
    ],
)
def test_line_that_cannot_be_understood_stops_the_start(tmp_path: Path, line: str) -> None:
    file = write(tmp_path / "env", f"# limits\n\nSSH_DEFAULT_HOST=web1\n\n{line}\nRATE_LIMIT=5\n")
    with pytest.raises(SettingsError) as caught:
        load(file)
    assert f"{file} cannot be understood in line 5; write NAME=value" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert line not in str(caught.value)


def test_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load(write(tmp_path / "env", "\ufeffALLOWED_COMMANDS=ls\n")).allowed_commands == "ls"


def test_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "env").write_bytes(b"SSH_DEFAULT_HOST=\xff\xfe\n")
    with pytest.raises(SettingsError, match="UTF-8"):
        load(tmp_path / "env")


# HTTP and its login


KEYS = {"JWT_SECRET": "j1" * 16, "SESSION_SECRET": "s2" * 16, "OAUTH_CODE_SECRET": "c3" * 16}


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that an HTTP transport demands."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GOOGLE_CLIENT_ID", "our-id")
    monkeypatch.setenv("GOOGLE_CLIENT_SECRET", "our-secret")
    monkeypatch.setenv("ALLOWED_EMAIL", "Me@Example.com, you@example.com")


def made(base_url: str | None = None) -> Login:
    return login(load(), base_url)


def test_http_defaults_are_those_of_the_contract() -> None:
    values = load()
    assert (values.http_host, values.http_port) == ("127.0.0.1", 3003)
    assert (values.public_base_url, values.state_url) == (None, None)
    assert values.google_discovery_url == "https://accounts.google.com/.well-known/openid-configuration"
    assert values.forwarded_allow_ips == "127.0.0.1"


def test_complete_login_is_what_was_configured(complete: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBLIC_BASE_URL", "https://mcp.example.com")
    monkeypatch.setenv("STATE_URL", "redis://:pass-word@127.0.0.1:6379/1")
    current = made("http://127.0.0.1:4000")
    assert current.base_url == "https://mcp.example.com"
    assert current.allowed_emails == {"me@example.com", "you@example.com"}
    assert (current.google_client_id, current.google_client_secret.get_secret_value()) == (
        "our-id",
        "our-secret",
    )
    assert current.jwt_keys == (b"j1" * 16,)
    assert current.session_keys == (b"s2" * 16,)
    assert current.code_keys == (b"c3" * 16,)
    assert current.state_url == "redis://:pass-word@127.0.0.1:6379/1"


def test_login_and_settings_show_no_secret(complete: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_URL", "redis://:pass-word@127.0.0.1:6379/1")
    shown = repr(made()) + str(made()) + repr(load())
    for secret in (*KEYS.values(), "our-secret", "pass-word"):
        assert secret not in shown


def test_keys_may_be_several_and_keep_their_order(complete: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWT_SECRET", f"{'n4' * 16}, {'j1' * 16}")
    assert made().jwt_keys == (b"n4" * 16, b"j1" * 16)


@pytest.mark.parametrize("missing", [*KEYS, "GOOGLE_CLIENT_ID", "GOOGLE_CLIENT_SECRET", "ALLOWED_EMAIL"])
@pytest.mark.parametrize("how", ["not set", "empty", "blank"])
def test_what_is_missing_is_named_with_a_remedy(
    complete: None, monkeypatch: pytest.MonkeyPatch, missing: str, how: str
) -> None:
    if how == "not set":
        monkeypatch.delenv(missing)
    else:
        monkeypatch.setenv(missing, "" if how == "empty" else "  ")
    if (missing, how) == ("ALLOWED_EMAIL", "blank"):
        with pytest.raises(SettingsError, match=r"^ALLOWED_EMAIL is "):
            load()
        return
    load()  # stdio needs none of it
    with pytest.raises(SettingsError, match=f"^{missing} is not set") as raised:
        made()
    assert ("openssl rand" in str(raised.value)) is (missing in KEYS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("variable", KEYS)
@pytest.mark.parametrize(
    "value",
    [
        "k" * 31,
        f"{'n4' * 16},short",
        f"{'n4' * 16},",
        "change-me-change-me-change-me-change-me",
        "REPLACE-ME-with-the-output-of-openssl-rand",
        "this-is-only-an-example-of-a-long-secret",
        "your-secret-your-secret-your-secret-your",
    ],
)
def test_weak_key_is_refused_with_the_command_that_makes_a_good_one(
    complete: None, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"^{variable} .*openssl rand -hex 32") as raised:
        made()
    assert value not in str(raised.value)


@pytest.mark.parametrize("first", KEYS)
@pytest.mark.parametrize("second", KEYS)
def test_keys_of_two_purposes_differ_old_ones_too(
    complete: None, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    monkeypatch.setenv(first, f"{'n4' * 16},{KEYS[second]}")
    if first == second:
        made()
        return
    with pytest.raises(SettingsError, match=r"JWT_SECRET.*share a value") as raised:
        made()
    assert KEYS[second] not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "issuer"),
    [
        ("https://mcp.example.com", "https://mcp.example.com"),
        ("https://mcp.example.com/", "https://mcp.example.com"),
        ("HTTPS://MCP.Example.com:443", "https://mcp.example.com"),
        ("https://mcp.example.com:8443", "https://mcp.example.com:8443"),
        ("http://localhost:3003", "http://localhost:3003"),
        ("http://127.0.0.1:3003/", "http://127.0.0.1:3003"),
        ("http://[::1]:3003", "http://[::1]:3003"),
    ],
)
def test_issuer_is_the_public_url_without_a_slash(
    complete: None, monkeypatch: pytest.MonkeyPatch, given: str, issuer: str
) -> None:
    monkeypatch.setenv("PUBLIC_BASE_URL", given)
    assert made().base_url == issuer


@pytest.mark.parametrize(
    "value",
    [
        "http://mcp.example.com",
        "http://127.0.0.1.example.com",
        "http://0.0.0.0:3003",
        "ftp://mcp.example.com",
        "mcp.example.com",
        "https://mcp.example.com/base",
        "https://mcp.example.com?x=1",
        "https://mcp.example.com/#x",
        "https://",
        "https://mcp.example.com:99999",
    ],
)
def test_public_url_is_an_https_origin_or_loopback(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PUBLIC_BASE_URL", value)
    with pytest.raises(SettingsError, match=r"^PUBLIC_BASE_URL is .*https") as raised:
        load()
    assert value in str(raised.value)


@pytest.mark.parametrize("variable", ["PUBLIC_BASE_URL", "GOOGLE_DISCOVERY_URL", "STATE_URL", "TASKS_URL"])
def test_password_in_a_url_is_not_shown(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "ftp://me:pass-word@example.com")
    with pytest.raises(SettingsError, match=f"^{variable} is a value that cannot be used") as raised:
        load()
    assert "pass-word" not in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTP_HOST", "a b"),
        ("HTTP_PORT", "0"),
        ("HTTP_PORT", "65536"),
        ("GOOGLE_DISCOVERY_URL", "http://accounts.example.com/x"),
        ("ALLOWED_EMAIL", "me"),
        ("ALLOWED_EMAIL", "*@example.com"),
        ("ALLOWED_EMAIL", "me@example.com,,you@example.com"),
        ("ALLOWED_EMAIL", "\N{KELVIN SIGN}iss@example.com"),
        ("FORWARDED_ALLOW_IPS", "proxy.example.com"),
        ("FORWARDED_ALLOW_IPS", "*"),
    ],
)
def test_bad_http_setting_is_one_line(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"^{variable} is .*; give ") as raised:
        load()
    assert value in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "value",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite://host/path",
        "redis:///0",
        "postgres://127.0.0.1/x",
        "/var/state.db",
    ],
)
def test_store_is_sqlite_or_redis(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("STATE_URL", value)
    with pytest.raises(SettingsError, match=r"^STATE_URL is .*give sqlite:///path or redis://host:port/db"):
        load()


@pytest.mark.parametrize(
    "value", ["sqlite:///x", "redis:///0", "http://127.0.0.1", "memory://", "redis://h:0"]
)
def test_tasks_are_kept_in_redis(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TASKS_URL", value)
    with pytest.raises(SettingsError, match=r"^TASKS_URL is .*give redis://host:port/db, or rediss://"):
        load()


def test_default_store_is_in_the_users_state_directory(
    complete: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert made().state_url == f"sqlite://{tmp_path}/state/ssh-mcp-server/oauth/state.db"


def test_url_that_is_listened_on_stands_in_for_a_public_one_on_loopback_only(
    complete: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made().base_url == "http://127.0.0.1:3003"
    assert made("http://[::1]:4000").base_url == "http://[::1]:4000"
    with pytest.raises(SettingsError, match=r"^PUBLIC_BASE_URL is not set"):
        made("http://192.0.2.1:3003")
    monkeypatch.setenv("HTTP_HOST", "0.0.0.0")
    with pytest.raises(SettingsError, match=r"^PUBLIC_BASE_URL is not set"):
        made()


def test_password_of_the_store_makes_the_file_a_secret(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="chmod 600"):
        load(write(tmp_path / "env", "STATE_URL=redis://:pass-word@127.0.0.1/0", 0o644))
    load(write(tmp_path / "env2", "STATE_URL=redis://127.0.0.1/0", 0o644))
    with pytest.raises(SettingsError, match="chmod 600"):
        load(write(tmp_path / "env3", "TASKS_URL=rediss://:pass-word@127.0.0.1/0", 0o644))
