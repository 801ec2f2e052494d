"""`ssh-mcp-server check`: what spoils the settings, or the way to a target, is named with what mends it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checking import CANARY, Case, World, assert_named
from cli import check_ssh
from conftest import Server, free_port, keygen
from tls import certificates, https_server


def misspelt_in_the_file(world: World) -> None:
    world.lines.append("ALLOWED_EMAILS=me@example.com")


def stranger_in_the_file(world: World) -> None:
    world.lines.append(f"FAVOURITE_COLOUR={CANARY}")


def secret_on_a_line_of_its_own(world: World) -> None:
    world.lines += ["JWT_SECRET=", f"{CANARY}=="]


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


def name_that_nobody_tells(world: World) -> None:
    def keep_silent(*_: object) -> None:
        raise TimeoutError

    world.set(SSH_DEFAULT_HOST="web1.invalid")
    world.monkeypatch.setattr(check_ssh, "look_up", keep_silent)


def port_where_nothing_listens(world: World) -> None:
    world.set(SSH_DEFAULT_PORT=free_port())


def port_of_another_protocol(world: World) -> None:
    certificates(world.folder)
    url = world.opened.enter_context(https_server(world.folder, {}))
    world.set(SSH_DEFAULT_PORT=url.rpartition(":")[2], SSH_CONNECT_TIMEOUT=8)


def jump_host_that_refuses(world: World) -> None:
    key = keygen(world.folder / "key")
    jump = f"tester@localhost:{world.server.port}"
    world.write("config", f"Host 127.0.0.1\n  ProxyJump {jump}\nHost localhost\n  IdentityFile {key}\n")
    known = world.server.known_hosts.read_text()
    known_hosts = world.write("known_hosts", known + known.replace("127.0.0.1", "localhost"))
    world.set(SSH_KNOWN_HOSTS=known_hosts)


def proxy_command_that_fails(world: World) -> None:
    world.write("config", "Host 127.0.0.1\n  ProxyCommand echo no way there >&2; exit 1\n")


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
    Case(secret_on_a_line_of_its_own, "names", "begins with 'can'", "remove the line", "warning", 0),
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
    Case(name_that_nobody_tells, "name", "the address of web1.invalid in time", "check the DNS"),
    Case(port_where_nothing_listens, "TCP", "nothing listens on port", "is sshd running there?"),
    Case(port_of_another_protocol, "host key", "hangs up before", "is this an SSH server"),
    Case(jump_host_that_refuses, "host key", "on the way to tester@127.0.0.1", "authorized_keys of tester"),
    Case(proxy_command_that_fails, "host key", "no way there", "SSH server answers"),
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
    assert_named(world, case)


def test_there_are_twenty_and_more() -> None:
    assert len({case.spoil.__name__ for case in CASES}) == len(CASES) >= 20


def test_no_file_is_made_beside_a_trail(world: World) -> None:
    trail = world.write("audit.jsonl", "", 0o600)
    world.set(AUDIT_LOG=trail)
    _, results = world.results()
    (told,) = (result for result in results if result["name"] == "audit log")
    assert (told["status"], told["message"]) == (
        "ok",
        f"what is missing of {trail} will be made at the first start",
    )
    assert list(world.folder.glob(".audit*")) == []


def test_all_that_is_wrong_with_the_settings_is_said_at_once(world: World) -> None:
    world.lines += ["half a line", f"SSH_SUDO_PASSWORD={CANARY}", "LOG_LEVEL=loud"]
    world.mode = 0o644
    world.set(SSH_DEFAULT_PORT="0", HTTP_PORT="ten")
    status, results = world.results()
    wrong = [result["message"] for result in results if result["name"] == "values"]
    assert status == 2
    for part in (
        "line 1",
        "others may read it",
        "LOG_LEVEL is ",
        "SSH_DEFAULT_PORT is '0'",
        "HTTP_PORT",
    ):
        assert [message for message in wrong if part in message], part


def test_settings_file_that_is_missing_is_named(world: World) -> None:
    with pytest.raises(SystemExit) as ended:
        world.run("--env-file", str(world.folder / "nowhere"), "check", "--json")
    assert ended.value.code == 2
    (result, *others) = json.loads(world.capture.readouterr().out)["results"]
    assert "does not exist" in result["message"]
    assert {other["status"] for other in others} == {"skipped"}


def _snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file below a folder: when it changed, and what it holds."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_healthy_configuration_is_well_and_nothing_is_changed(world: World) -> None:
    for patience in ("_SLOW_SHELL_SECONDS", "_WARM_SECONDS"):  # the machine may be busy
        world.monkeypatch.setattr(check_ssh, patience, 60)
    server = world.use(world.make_sshd())
    known_hosts, home = server.known_hosts.read_bytes(), _snapshot(server.home)
    status, results = world.results()
    assert status == 0
    assert {result["status"] for result in results} == {"ok", "skipped"}
    assert server.known_hosts.read_bytes() == known_hosts
    assert _snapshot(server.home) == home


def test_host_key_is_not_recorded(world: World) -> None:
    host_that_would_be_recorded(world)
    status, results = world.results()
    assert status == 0
    assert [result for result in results if result["name"] == "clock" and result["status"] == "ok"]
    assert not (world.folder / "nowhere").exists()


def test_further_targets_are_checked_and_a_failure_ends_only_its_own_chain(world: World) -> None:
    world.set(SSH_ALLOWED_HOSTS="*@127.0.0.1:*,web1.invalid")
    other = world.make_sshd()
    with world.server.known_hosts.open("a") as known_hosts:
        known_hosts.write(other.known_hosts.read_text())
    named = f"dash@127.0.0.1:{other.port}"
    status, out = world.check("web1.invalid", named, "--json")
    results = json.loads(out)["results"]
    by_target = {
        about: {result["name"]: result["status"] for result in results if result["about"] == about}
        for about in ("127.0.0.1", "web1.invalid", named)
    }
    assert status == 1
    assert by_target["127.0.0.1"]["clock"] == "ok"
    assert by_target["web1.invalid"]["name"] == "error"
    assert by_target["web1.invalid"]["login"] == "skipped"
    assert by_target[named]["login"] == "error"  # its sshd knows another key


def test_way_over_a_jump_host_is_named(world: World) -> None:
    port = world.server.port
    world.write(
        "config",
        f"Host inner\n  HostName 127.0.0.1\n  Port {port}\n  User tester\n  ProxyJump tester@127.0.0.1:{port}\n",
    )
    world.set(SSH_DEFAULT_HOST="inner")
    status, results = world.results()
    (config,) = (result for result in results if result["name"] == "SSH config")
    assert status == 0
    assert "over 127.0.0.1" in config["message"]


def test_lines_for_people_say_what_json_says(world: World) -> None:
    key_that_others_may_read(world)  # so that the login is not tried, nor what needs it
    _, results = world.results()
    status, out = world.check()
    assert status == 1
    assert "\x1b" not in out
    for line in out.splitlines():
        long_words = [word for word in line.split() if len(word) > 50]
        assert len(line) <= 80 or "→" in line or long_words, line
    words = out.split()
    for result in results:
        assert result["name"] in out
        if result["name"] in ("TCP", "login", "round trip", "warm shell"):
            continue  # which tell times
        assert set(result["message"].split()) <= set(words)
        assert result["fix"] is None or result["fix"] in out


@pytest.mark.parametrize("no_color", [False, True])
def test_terminal_gets_colours_unless_it_wants_none(sshd: Server, tmp_path: Path, no_color: bool) -> None:
    program = [str(Path(sys.executable).parent / "ssh-mcp-server"), "check"]
    environment = sshd.environment(tmp_path) | {
        "TERM": "xterm-256color",
        "SSH_CONFIG": "none",
        "COLUMNS": "80",
    }
    if no_color:
        environment["NO_COLOR"] = "1"
    ours, theirs = os.openpty()
    process = subprocess.Popen(program, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = _read_to_the_end(ours)
    assert process.wait(30) == 0
    assert (b"\x1b[32m" in shown) is not no_color
    assert b"127.0.0.1: login" in shown  # while it is tried


def _read_to_the_end(terminal: int) -> bytes:
    shown = b""
    try:
        while data := os.read(terminal, 65_536):
            shown += data
    except OSError:  # what Linux says at the end of a pseudo-terminal
        pass
    os.close(terminal)
    return shown


def test_settings_are_checked_without_importing_fastmcp() -> None:
    code = "import sys, cli.check, cli.check_ssh; assert 'fastmcp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
