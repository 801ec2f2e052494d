"""`ssh-mcp-server check`: each misconfiguration is found and named with what mends it, and nothing is changed."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import cli
from conftest import Server, free_port, keygen

CANARY = "canary-7f3a9c"
GOOD = ["ok", "skipped"]


@dataclass
class World:
    """A configuration that is well, to be spoilt, and what `check` says of it."""

    server: Server
    folder: Path
    make_sshd: Callable[..., Server]
    capture: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    lines: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    mode: int = 0o600

    def __post_init__(self) -> None:
        self.use(self.server)
        self.set(
            SSH_KNOWN_HOSTS=self.server.known_hosts,
            SSH_CONFIG=self.write("config", ""),
            SSH_DEFAULT_HOST="127.0.0.1",
            SSH_DEFAULT_USER="tester",
        )

    def set(self, **variables: object) -> None:
        for name, value in variables.items():
            self.monkeypatch.setenv(name, str(value))

    def unset(self, *names: str) -> None:
        for name in names:
            self.monkeypatch.delenv(name)

    def use(self, server: Server) -> Server:
        self.set(SSH_DEFAULT_PORT=server.port, SSH_KEY_PATH=server.key, SSH_KNOWN_HOSTS=server.known_hosts)
        return server

    def write(self, name: str, text: str, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        return path

    @property
    def env_file(self) -> Path:
        return self.folder / "env"

    def check(self, *arguments: str) -> tuple[int, str]:
        """Return the exit status and what was printed."""
        self.write("env", "".join(f"{line}\n" for line in self.lines), self.mode)
        with pytest.raises(SystemExit) as ended:
            cli.main(["--env-file", str(self.env_file), "check", *self.arguments, *arguments])
        out, err = self.capture.readouterr()
        assert CANARY not in out + err
        assert err == ""
        return int(str(ended.value.code)), out

    def results(self) -> tuple[int, list[dict[str, Any]]]:
        status, out = self.check("--json")
        return status, json.loads(out)["results"]


@pytest.fixture
def world(
    sshd: Server,
    tmp_path: Path,
    own_sshd: Callable[..., Server],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    path = os.environ["PATH"]
    for name in os.environ:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield World(sshd, tmp_path, own_sshd, capsys, monkeypatch)
    logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Case:
    """A way to spoil a configuration, and the result that must name it."""

    spoil: Callable[[World], object]
    name: str
    message: str
    fix: str
    status: str = "error"
    exit_status: int = 1


def misspelt_in_the_file(world: World) -> None:
    world.lines.append("ALLOWED_EMAILS=me@example.com")


def stranger_in_the_file(world: World) -> None:
    world.lines.append(f"FAVOURITE_COLOUR={CANARY}")


def misspelt_in_the_environment(world: World) -> None:
    world.set(SSH_KEY_PASSPHRASES=CANARY)


def secret_that_others_may_read(world: World) -> None:
    world.lines.append(f"SSH_KEY_PASSPHRASE={CANARY}")
    world.mode = 0o644


def file_that_others_may_write(world: World) -> None:
    world.lines.append("LOG_LEVEL=INFO")
    world.mode = 0o622


def half_a_line(world: World) -> None:
    world.lines.append(f"SSH_SUDO_PASSWORD='{CANARY}")


def port_that_is_none(world: World) -> None:
    world.set(SSH_DEFAULT_PORT="70000")


def address_that_is_none(world: World) -> None:
    world.set(ALLOWED_EMAIL="*@example.com")


def folder_of_the_trail_is_missing(world: World) -> None:
    world.set(AUDIT_LOG=world.folder / "none" / "audit.jsonl")


def trail_that_others_may_write(world: World) -> None:
    world.set(AUDIT_LOG=world.write("audit.jsonl", "", 0o666))


def command_that_runs_anything(world: World) -> None:
    world.set(ALLOWED_COMMANDS="ls,find")


def prefix_that_is_no_command(world: World) -> None:
    world.set(ALLOWED_COMMANDS="ls > x")


def nothing_may_run(world: World) -> None:
    world.set(READ_ONLY="true")


def password_for_any_host(world: World) -> None:
    world.set(SSH_ALLOWED_HOSTS="127.0.0.1,*.example.com", SSH_SUDO="true", SSH_SUDO_PASSWORD=CANARY)


def password_for_nothing(world: World) -> None:
    world.set(SSH_SUDO_PASSWORD=CANARY)


def key_of_one_letter(world: World) -> None:
    world.set(JWT_SECRET="a" * 40)


def no_host(world: World) -> None:
    world.unset("SSH_DEFAULT_HOST")


def host_that_is_not_allowed(world: World) -> None:
    world.set(SSH_ALLOWED_HOSTS="web1,web2")


def config_that_is_missing(world: World) -> None:
    world.set(SSH_CONFIG=world.folder / "nowhere")


def config_that_cannot_be_read(world: World) -> None:
    world.write("config", "Host *\n  Port twenty-two\n")
    world.unset("SSH_DEFAULT_PORT")


def key_that_is_missing(world: World) -> None:
    world.set(SSH_KEY_PATH=world.folder / "nowhere")


def key_that_others_may_read(world: World) -> None:
    world.set(SSH_KEY_PATH=world.write("key", world.server.key.read_text(), 0o644))


def key_that_is_locked(world: World) -> None:
    world.set(SSH_KEY_PATH=keygen(world.folder / "key", "-t", "ed25519", "-N", CANARY))


def key_that_the_passphrase_does_not_open(world: World) -> None:
    key_that_is_locked(world)
    world.set(SSH_KEY_PASSPHRASE=f"{CANARY}-wrong")


def key_that_is_public(world: World) -> None:
    world.set(SSH_KEY_PATH=f"{world.server.key}.pub")


def key_that_is_short(world: World) -> None:
    key = keygen(world.folder / "key", "-t", "rsa", "-b", "1024")
    world.set(SSH_KEY_PATH=key)


def agent_that_is_gone(world: World) -> None:
    world.set(SSH_AUTH_SOCK=world.folder / "nowhere")


def no_key_at_all(world: World) -> None:
    world.unset("SSH_KEY_PATH")


def name_that_nobody_has(world: World) -> None:
    world.set(SSH_DEFAULT_HOST="web1.invalid")


def port_where_nothing_listens(world: World) -> None:
    world.set(SSH_DEFAULT_PORT=free_port())


def host_that_is_unknown(world: World) -> None:
    world.set(SSH_KNOWN_HOSTS=world.folder / "nowhere")


def host_that_would_be_recorded(world: World) -> None:
    host_that_is_unknown(world)
    world.set(SSH_HOST_KEY_POLICY="accept-new")


def host_key_that_has_changed(world: World) -> None:
    fields = keygen(world.folder / "other").with_suffix(".pub").read_text().split()
    known_hosts = world.write("known_hosts", f"[127.0.0.1]:{world.server.port} {fields[0]} {fields[1]}\n")
    world.set(SSH_KNOWN_HOSTS=known_hosts)


def key_that_is_not_accepted(world: World) -> None:
    world.set(SSH_KEY_PATH=keygen(world.folder / "key"))


def one_session(world: World) -> None:
    world.use(world.make_sshd("MaxSessions 1"))


def no_session(world: World) -> None:
    world.use(world.make_sshd("MaxSessions 0"))


def no_sftp(world: World) -> None:
    world.use(world.make_sshd("Subsystem none /bin/false"))


def forced_command(world: World) -> None:
    world.use(world.make_sshd("ForceCommand /bin/echo welcome"))


def slow_rc_file(world: World) -> None:
    server = world.use(world.make_sshd())
    (server.home / ".bashrc").write_text("sleep 2\n")


def clock_that_is_wrong(world: World) -> None:
    server = world.use(world.make_sshd())
    (server.home / "date").write_text("#!/bin/sh\necho 1000000000\n")
    (server.home / "date").chmod(0o755)
    (server.home / ".bashrc").write_text("PATH=$HOME:$PATH\n")


def directory_that_is_not_there(world: World) -> None:
    world.set(ALLOWED_PATHS="/tmp:/nowhere/at/all")


CASES = [
    Case(misspelt_in_the_file, "names", "ALLOWED_EMAILS", "did you mean ALLOWED_EMAIL?"),
    Case(stranger_in_the_file, "names", "FAVOURITE_COLOUR", "remove the line", "warning", 0),
    Case(misspelt_in_the_environment, "names", "SSH_KEY_PASSPHRASES", "did you mean SSH_KEY_PASSPHRASE?"),
    Case(secret_that_others_may_read, "values", "others may read it", "chmod 600 ", exit_status=2),
    Case(file_that_others_may_write, "permissions", "others may write", "chmod go-w "),
    Case(half_a_line, "values", "in line 1", "write NAME=value", exit_status=2),
    Case(port_that_is_none, "values", "SSH_DEFAULT_PORT is '70000'", "from 1 to 65535", exit_status=2),
    Case(address_that_is_none, "values", "ALLOWED_EMAIL is ", "e-mail addresses", exit_status=2),
    Case(folder_of_the_trail_is_missing, "audit log", "AUDIT_LOG", "mkdir"),
    Case(trail_that_others_may_write, "audit log", "others may write", "chmod go-w "),
    Case(command_that_runs_anything, "policy", "'find'", "leave it out", "warning", 0),
    Case(prefix_that_is_no_command, "policy", "ALLOWED_COMMANDS holds 'ls > x'", ""),
    Case(nothing_may_run, "policy", "READ_ONLY is set", "ALLOWED_COMMANDS", "warning", 0),
    Case(password_for_any_host, "policy", "'*.example.com'", "name the hosts", "warning", 0),
    Case(password_for_nothing, "secrets", "SSH_SUDO_PASSWORD", "SSH_SUDO=true", "warning", 0),
    Case(key_of_one_letter, "secrets", "JWT_SECRET", "openssl rand", "warning", 0),
    Case(no_host, "targets", "no host", "SSH_DEFAULT_HOST"),
    Case(host_that_is_not_allowed, "target", "SSH_ALLOWED_HOSTS", "add it"),
    Case(config_that_is_missing, "targets", "SSH_CONFIG", "create it"),
    Case(config_that_cannot_be_read, "target", "line 2", ""),
    Case(key_that_is_missing, "key", "No such file", "SSH_KEY_PATH"),
    Case(key_that_others_may_read, "key", "may be read by others", "chmod 600 "),
    Case(key_that_is_locked, "key", "encrypted", "set SSH_KEY_PASSPHRASE"),
    Case(key_that_the_passphrase_does_not_open, "key", "SSH_KEY_PASSPHRASE does not open", "SSH_KEY_PATH"),
    Case(key_that_is_public, "key", "public one", "ssh-add"),
    Case(key_that_is_short, "key", "1024 bits", "ssh-keygen -t ed25519", "warning"),
    Case(agent_that_is_gone, "agent", "does not answer", "ssh-add", "warning", 0),
    Case(no_key_at_all, "key", "no key to log in", "SSH_KEY_PATH"),
    Case(name_that_nobody_has, "name", "web1.invalid", "spelling"),
    Case(port_where_nothing_listens, "TCP", "nothing listens on port", "is sshd running there?"),
    Case(host_that_is_unknown, "host key", "is not in ", "ssh-keyscan -p "),
    Case(host_that_would_be_recorded, "host key", "accept-new", "ssh-keyscan -p ", "warning", 0),
    Case(host_key_that_has_changed, "host key", "has changed", "ssh-keygen -R "),
    Case(key_that_is_not_accepted, "login", "does not accept", "authorized_keys"),
    Case(one_session, "sessions", "1 at once", "MaxSessions 10", "warning", 0),
    Case(no_session, "sessions", "opens no session", "MaxSessions 10"),
    Case(no_sftp, "SFTP", "no file transfer", "Subsystem sftp"),
    Case(forced_command, "shell", "only plain commands", "ordinary shell"),
    Case(slow_rc_file, "shell", "to start", "rc files", "warning", 0),
    Case(clock_that_is_wrong, "clock", "behind", "NTP", "warning", 0),
    Case(directory_that_is_not_there, "paths", "/nowhere/at/all", "ALLOWED_PATHS", "warning", 0),
]


@pytest.mark.parametrize("case", CASES, ids=[case.spoil.__name__ for case in CASES])
def test_each_misconfiguration_is_found_and_named_with_what_mends_it(world: World, case: Case) -> None:
    case.spoil(world)
    status, results = world.results()
    found = [result for result in results if result["name"] == case.name]
    named = [
        result for result in found if result["status"] == case.status and case.message in result["message"]
    ]
    assert named, found
    assert named[0]["fix"] is not None
    assert case.fix in named[0]["fix"]
    assert status == case.exit_status, results


def test_there_are_twenty_and_more() -> None:
    assert len({case.spoil.__name__ for case in CASES}) == len(CASES) >= 20
