"""The way to a host as the SSH config describes it, over real servers: jump hosts, proxy commands, keys, host keys."""

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client

import app
from conftest import (
    Server,
    keygen,
    make_server,
    marker,
    nobody_cancels,
    open_folder,
    program,
    running,
    wait_for,
)
from settings import Settings, SettingsError
from ssh_commands import Commands
from ssh_errors import (
    ConfigError,
    HostKeyError,
    LoginError,
    NoAnswerError,
    RefusedError,
    UnreachableError,
)
from ssh_hosts import Host, Hosts
from ssh_keys import Keys
from ssh_local import Proxy
from ssh_login import HungUpError
from ssh_policy import Reach
from ssh_pool import Pool
from ssh_route import connect
from ssh_transport import Connection, SocketWire


@pytest.fixture(scope="module")
def inner() -> Iterator[Server]:
    """A second server, with keys of its own."""
    with open_folder() as folder:
        server = make_server(folder)
        yield server
        server.stop()


@dataclass
class Config:
    """An SSH config under test, and the settings that name it alone."""

    path: Path

    def write(self, *lines: str) -> None:
        self.path.write_text("\n".join(lines) + "\n")
        self.path.chmod(0o600)

    def settings(self, **values: Any) -> Settings:
        base: dict[str, Any] = {"ssh_config": self.path, "ssh_allowed_hosts": "*"}
        return Settings(**(base | values))

    def connect(self, host: str, **values: Any) -> Connection:
        settings = self.settings(**values)
        return connect(Reach(settings).target(host, None, None), Hosts(settings), Keys(settings))

    def run(self, host: str, command: str = "echo $SSH_CONNECTION", **values: Any) -> str:
        settings = self.settings(**values)
        with closing(Pool(settings)) as pool:
            target = Reach(settings).target(host, None, None)
            return Commands(pool, settings).run(target, command, cancelled=nobody_cancels).stdout


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/sh")
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return Config(tmp_path / "config")


def entry(name: str, server: Server, *lines: str) -> str:
    return "\n ".join(
        [
            f"Host {name}",
            *lines,
            "HostName 127.0.0.1",
            f"Port {server.port}",
            "User tester",
            f"IdentityFile {server.key}",
            f"UserKnownHostsFile {server.known_hosts}",
        ]
    )


def port_seen(answer: str) -> int:
    """Return the port of the server that a command ran on, from its SSH_CONNECTION."""
    return int(answer.split()[3])


def test_alias_leads_to_its_host_user_and_port(config: Config, sshd: Server) -> None:
    config.write(entry("web", sshd))
    assert port_seen(config.run("web")) == sshd.port


def test_jump_host_is_verified_and_logged_in_to_with_its_own_entry(
    config: Config, sshd: Server, inner: Server
) -> None:
    config.write(entry("jump", sshd), entry("inner", inner, "ProxyJump jump"))
    before = logins(sshd)
    assert port_seen(config.run("inner")) == inner.port
    assert logins(sshd) == before + 1


def logins(server: Server) -> int:
    return (server.folder / "log").read_text().count("Accepted publickey")


def test_several_hops_are_passed_in_their_order(config: Config, sshd: Server, inner: Server) -> None:
    config.write(
        entry("one", sshd),
        entry("two", inner, "ProxyJump nowhere.invalid"),
        entry("last", sshd, "ProxyJump one,tester@two"),
    )
    before = logins(sshd), logins(inner)
    assert port_seen(config.run("last")) == sshd.port
    assert (logins(sshd), logins(inner)) == (before[0] + 2, before[1] + 1)


def test_jump_host_of_a_jump_host_is_passed_first(config: Config, sshd: Server, inner: Server) -> None:
    config.write(
        entry("one", sshd), entry("two", inner, "ProxyJump one"), entry("last", inner, "ProxyJump two")
    )
    before = logins(sshd)
    assert port_seen(config.run("last")) == inner.port
    assert logins(sshd) == before + 1


@pytest.mark.parametrize("changed", ["jump", "inner"])
def test_changed_key_on_the_way_is_refused(
    config: Config, sshd: Server, inner: Server, tmp_path: Path, changed: str
) -> None:
    wrong = tmp_path / "known_hosts"
    server = sshd if changed == "jump" else inner
    other = (keygen(tmp_path / "other").with_suffix(".pub")).read_text()
    wrong.write_text(f"[127.0.0.1]:{server.port} {other}")
    entries = {"jump": entry("jump", sshd), "inner": entry("inner", inner, "ProxyJump jump")}
    entries[changed] = entries[changed].replace(str(server.known_hosts), str(wrong))
    config.write(*entries.values())
    before = logins(server)
    with pytest.raises(HostKeyError, match="changed") as raised:
        config.connect("inner")
    assert str(raised.value).startswith("on the way to tester@inner") == (changed == "jump")
    assert logins(server) == before


def test_jump_host_that_is_unknown_is_never_recorded_by_another_hosts_leave(
    config: Config, sshd: Server, inner: Server, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    jump = entry("jump", sshd).replace(str(sshd.known_hosts), str(empty))
    config.write(jump, entry("inner", inner, "ProxyJump jump", "StrictHostKeyChecking accept-new"))
    with pytest.raises(HostKeyError, match="is not in"):
        config.connect("inner")
    assert not empty.exists()


def test_connections_to_jump_hosts_end_with_the_connection(
    config: Config, own_sshd: Callable[..., Server], inner: Server
) -> None:
    jump = own_sshd()
    config.write(entry("jump", jump), entry("inner", inner, "ProxyJump jump"))
    connection = config.connect("inner")
    assert jump.session_pids()
    connection.close()
    wait_for(lambda: not jump.session_pids())


def test_connection_ends_with_that_of_its_jump_host(
    config: Config, own_sshd: Callable[..., Server], inner: Server
) -> None:
    jump = own_sshd()
    config.write(entry("jump", jump), entry("inner", inner, "ProxyJump jump"))
    connection = config.connect("inner")
    jump.cut()
    wait_for(lambda: not connection.alive)
    connection.close()


def test_failed_login_behind_a_jump_host_leaves_nothing_open(
    config: Config, own_sshd: Callable[..., Server], inner: Server, tmp_path: Path
) -> None:
    jump = own_sshd()
    wrong = keygen(tmp_path / "wrong")
    config.write(
        entry("jump", jump), entry("inner", inner, "ProxyJump jump").replace(str(inner.key), str(wrong))
    )
    with pytest.raises(LoginError, match=r"tester@inner.*does not accept"):
        config.connect("inner")
    wait_for(lambda: not jump.session_pids())


def test_jump_host_that_forbids_or_does_not_reach_says_so(
    config: Config, own_sshd: Callable[..., Server], sshd: Server
) -> None:
    strict = own_sshd("AllowTcpForwarding no")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        config.write(
            entry("strict", strict),
            entry("jump", sshd),
            entry("one", sshd, "ProxyJump strict"),
            entry("two", sshd, f"Port {port}", "ProxyJump jump"),
        )
        with pytest.raises(UnreachableError, match=r"tester@strict.*AllowTcpForwarding"):
            config.connect("one")
        with pytest.raises(UnreachableError, match=rf"tester@jump.*127\.0\.0\.1:{port}: it finds nothing"):
            config.connect("two")


def test_jump_hosts_in_a_circle_are_an_error(config: Config, sshd: Server) -> None:
    config.write("Host *", " ProxyJump jump", entry("jump", sshd))
    with pytest.raises(ConfigError, match="in a circle: jump"):
        config.connect("web")


def test_deadline_covers_the_whole_way(config: Config, sshd: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        config.write(
            entry("jump", sshd), entry("inner", sshd, f"Port {port}", "ConnectTimeout 1", "ProxyJump jump")
        )
        began = time.monotonic()
        with pytest.raises(NoAnswerError):
            config.connect("inner")
        assert 0.5 < time.monotonic() - began < 9


RELAY = """
import os, socket, sys, threading
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def send():
    while data := os.read(0, 65536):
        peer.sendall(data)
    peer.shutdown(socket.SHUT_WR)
threading.Thread(target=send, daemon=True).start()
while data := peer.recv(65536):
    os.write(1, data)
"""


@pytest.fixture
def relay(tmp_path: Path) -> str:
    """A command that connects its stdin and stdout to a host and port, as `nc` does."""
    script = tmp_path / "relay.py"
    script.write_text(RELAY)
    return f"{sys.executable} {script}"


def test_proxy_command_is_the_connection(config: Config, sshd: Server, relay: str) -> None:
    config.write(entry("web", sshd, f"ProxyCommand {relay} %h %p"))
    assert len(config.run("web", "head -c 3000000 /dev/zero | tr '\\0' x | wc -c")) > 1
    assert port_seen(config.run("web")) == sshd.port


def test_ssh_itself_serves_as_proxy_command(config: Config, sshd: Server, inner: Server) -> None:
    ssh = program("ssh", "openssh-client")
    config.write(
        entry("jump", sshd), entry("inner", inner, f"ProxyCommand {ssh} -F {config.path} -W %h:%p jump")
    )
    assert port_seen(config.run("inner")) == inner.port


def test_proxy_command_ends_with_the_connection(config: Config, sshd: Server, relay: str) -> None:
    sign = marker()
    config.write(entry("web", sshd, f"ProxyCommand {relay} %h %p {sign}"))
    connection = config.connect("web")
    assert running(sign)
    connection.close()
    wait_for(lambda: not running(sign))


def test_proxy_command_that_may_not_be_killed_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as `sudo nc`, which is root's."""
    sign = marker()
    proxy = Proxy(f"sleep 60{sign}")

    def refuse(*_: int) -> None:
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", refuse)
        closing_it = threading.Thread(target=proxy.close, daemon=True)
        closing_it.start()
        closing_it.join(15)
        assert running(sign)
    held_up = closing_it.is_alive()
    proxy.close()
    assert not held_up
    proxy.socket.close()


def test_process_with_the_number_of_a_proxy_command_that_is_gone_is_not_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: killed.append(group))
    proxy = Proxy("true")
    with closing(proxy.socket):
        assert proxy.socket.recv(1) == b""
        number = proxy._process.pid
        assert os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT), (
            "its number is not kept until it is closed"
        )
        for _ in range(2):
            proxy.close()
    assert killed == [number]


def test_last_words_of_a_failed_proxy_command_are_told(config: Config, sshd: Server) -> None:
    config.write(entry("web", sshd, "ProxyCommand sh -c 'echo one >&2; printf \"gone \\033[2J away\" >&2'"))
    with pytest.raises(UnreachableError, match=r"tester@web.*ProxyCommand ended.*gone .*away") as raised:
        config.connect("web")
    assert "\033" not in str(raised.value)
    assert "one" not in str(raised.value).split("exchange: ")[1].replace("gone", "")


def test_proxy_command_that_says_nothing_is_ended_in_time(config: Config, sshd: Server) -> None:
    sign = marker()
    config.write(entry("web", sshd, "ConnectTimeout 1", f"ProxyCommand sleep 60{sign}"))
    with pytest.raises(NoAnswerError):
        config.connect("web")
    wait_for(lambda: not running(sign))


def test_proxy_command_sees_no_secret(config: Config, sshd: Server, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SSH_KEY_PASSPHRASE", "canary")
    config.write(entry("web", sshd, f"ProxyCommand env >{tmp_path}/env"))
    with pytest.raises(UnreachableError):
        config.connect("web")
    assert "canary" not in (tmp_path / "env").read_text()


def test_host_key_alias_names_the_host_in_known_hosts(config: Config, sshd: Server, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    public = (sshd.folder / "host_key.pub").read_text()
    known.write_text(f"fleet {public}")
    web = entry("web", sshd).replace(str(sshd.known_hosts), str(known))
    config.write(web)
    with pytest.raises(HostKeyError, match=r"\[127.0.0.1\]"):
        config.connect("web")
    config.write(web, " HostKeyAlias Fleet")
    config.connect("web").close()


def test_identity_file_is_chosen_by_host(config: Config, sshd: Server, inner: Server) -> None:
    config.write(entry("one", sshd), entry("two", inner))
    for host, server in (("one", sshd), ("two", inner)):
        assert port_seen(config.run(host)) == server.port
        wrong = inner if server is sshd else sshd
        assert port_seen(config.run(host, ssh_key_path=wrong.key)) == server.port


def test_key_path_serves_the_default_target_and_hosts_without_an_identity_file(
    config: Config, sshd: Server, inner: Server
) -> None:
    named = entry("web", sshd).replace(str(sshd.key), str(inner.key))
    config.write(named)
    key = {"ssh_key_path": sshd.key}
    with pytest.raises(LoginError, match=str(inner.key)):
        config.connect("web", **key)
    config.connect("web", ssh_default_host="web", **key).close()
    config.write(named.replace(f"IdentityFile {inner.key}", ""))
    config.connect("web", **key).close()


def test_strictness_is_never_weakened_by_the_config(config: Config, sshd: Server, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    web = entry("web", sshd).replace(str(sshd.known_hosts), str(empty))
    for word in ("no", "off", "ask", "yes"):
        config.write(web, f" StrictHostKeyChecking {word}")
        with pytest.raises(HostKeyError, match="is not in"):
            config.connect("web")
    config.write(web, " StrictHostKeyChecking accept-new", " HashKnownHosts yes")
    with pytest.raises(HostKeyError, match="is not in"):
        config.connect("web", ssh_host_key_policy="strict")
    assert not empty.exists()
    config.connect("web").close()
    assert empty.read_text().startswith("|1|")


def test_new_host_is_not_accepted_where_nothing_is_recorded(config: Config, sshd: Server) -> None:
    web = entry("web", sshd)
    for nowhere in ("/dev/null", "none"):
        config.write(web.replace(str(sshd.known_hosts), nowhere))
        with pytest.raises(HostKeyError, match="is not in /dev/null"):
            config.connect("web", ssh_host_key_policy="accept-new")


def test_known_hosts_of_the_settings_win(config: Config, sshd: Server, tmp_path: Path) -> None:
    config.write(entry("web", sshd))
    with pytest.raises(HostKeyError, match=str(tmp_path / "mine")):
        config.connect("web", ssh_known_hosts=tmp_path / "mine")


def test_several_known_hosts_files_are_asked(config: Config, sshd: Server, tmp_path: Path) -> None:
    web = entry("web", sshd).replace(
        f"UserKnownHostsFile {sshd.known_hosts}", f"UserKnownHostsFile {tmp_path}/a"
    )
    config.write(web, f" GlobalKnownHostsFile {tmp_path}/b {sshd.known_hosts}")
    config.connect("web").close()


@pytest.mark.parametrize(
    ("line", "attribute", "used"),
    [
        ("Ciphers chacha20-poly1305@openssh.com,aes256-ctr", "remote_cipher", "aes256-ctr"),
        ("Ciphers ^aes192-ctr", "remote_cipher", "aes192-ctr"),
        ("Ciphers -*gcm*", "remote_cipher", "aes128-ctr"),
        ("MACs hmac-sha2-512\n Ciphers aes128-ctr", "remote_mac", "hmac-sha2-512"),
        ("KexAlgorithms curve25519-sha256", "preferred_kex", "curve25519-sha256@libssh.org"),
        ("KexAlgorithms ecdh-sha2-nistp384", "preferred_kex", "ecdh-sha2-nistp384"),
    ],
)
def test_algorithms_of_the_config_are_used(
    config: Config, sshd: Server, line: str, attribute: str, used: str
) -> None:
    config.write(entry("web", sshd, line))
    with closing(config.connect("web")) as connection:
        transport = connection._transport
        assert getattr(transport, attribute) in (used, (used,))


@pytest.mark.parametrize(
    "line",
    [
        "Ciphers chacha20-poly1305@openssh.com",
        "MACs umac-64@openssh.com",
        "KexAlgorithms sntrup761x25519-sha512@openssh.com",
        "HostKeyAlgorithms sk-ssh-ed25519@openssh.com",
    ],
)
def test_algorithms_of_which_none_is_left_are_an_error(config: Config, sshd: Server, line: str) -> None:
    config.write(entry("web", sshd, line))
    with pytest.raises(UnreachableError, match=f"nothing that can be used here is left of {line.split()[0]}"):
        config.connect("web")


def test_address_family_of_the_config_is_kept_to(config: Config, sshd: Server) -> None:
    config.write(entry("web", sshd, "HostName localhost", "AddressFamily inet6", "ConnectTimeout 3"))
    with pytest.raises(UnreachableError, match=r"^tester@web:\d+.*localhost"):
        config.connect("web")


def test_allowed_alias_may_be_named_but_not_what_it_leads_to(config: Config, sshd: Server) -> None:
    config.write(entry("web", sshd))
    reach = Reach(config.settings(ssh_allowed_hosts="web"))
    assert str(reach.target("WEB", None, None)) == f"tester@web:{sshd.port}"
    assert reach.target("web", "tester", sshd.port)
    for named in (("127.0.0.1", None, None), ("web", "root", None), ("web", None, 22)):
        with pytest.raises(RefusedError, match="SSH_ALLOWED_HOSTS"):
            reach.target(*named)


def test_settings_win_for_the_default_host_and_the_config_for_others(config: Config, sshd: Server) -> None:
    config.write(entry("web", sshd), entry("db", sshd))
    reach = Reach(config.settings(ssh_default_host="web", ssh_default_user="deploy", ssh_default_port=2222))
    assert str(reach.target(None, None, None)) == "deploy@web:2222"
    assert str(reach.target("db", None, None)) == f"tester@db:{sshd.port}"
    assert str(reach.target("other", None, None)) == "deploy@other:2222"
    unset = Reach(config.settings(ssh_default_host="web"))
    assert str(unset.target(None, None, None)) == f"tester@web:{sshd.port}"


def test_nothing_of_the_config_runs_for_a_host_that_is_not_allowed(config: Config, tmp_path: Path) -> None:
    config.write(f'Match exec "touch {tmp_path}/ran"', " User ann")
    with pytest.raises(RefusedError):
        Reach(config.settings(ssh_allowed_hosts="web")).target("db", None, None)
    assert not (tmp_path / "ran").exists()


def test_tool_takes_an_alias(config: Config, sshd: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write(entry("web", sshd))
    empty = config.path.with_name("env")
    empty.touch()
    for name, value in {
        "SSH_MCP_ENV_FILE": str(empty),
        "SSH_CONFIG": str(config.path),
        "SSH_ALLOWED_HOSTS": "web",
        "XDG_STATE_HOME": str(config.path.parent),
    }.items():
        monkeypatch.setenv(name, value)

    async def calls() -> tuple[Any, Any]:
        async with Client(app.mcp) as client:
            arguments = {"command": "echo $SSH_CONNECTION", "host": "web"}
            done = await client.call_tool("ssh_execute", arguments)
            config.write("Host web", " UserName x")
            return done, await client.call_tool("ssh_execute", arguments, raise_on_error=False)

    done, failed = asyncio.run(calls())
    assert port_seen(done.structured_content["stdout"]) == sshd.port
    assert done.structured_content["target"] == f"tester@web:{sshd.port}"
    assert failed.is_error
    assert f"{config.path} line 2: username is not known" in failed.content[0].text


def test_config_that_cannot_be_read_stops_the_start(config: Config) -> None:
    config.write("Host web", " UserName x")
    with pytest.raises(SettingsError, match=f"^SSH_CONFIG: {config.path} line 2: ") as raised:
        Reach(config.settings())
    assert "\n" not in str(raised.value)


def test_server_that_hung_up_is_told_so_though_the_last_try_had_no_time_left(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    def log_in(_: Host, wire: SocketWire, carrier: None, keys: Keys, deadline: float) -> Connection:
        wire.close()
        tries.append(deadline)
        if len(tries) == 1:
            time.sleep(max(0.0, deadline - 0.9 - time.monotonic()))
            raise HungUpError
        time.sleep(max(0.0, deadline - time.monotonic()))
        raise NoAnswerError("silent")

    monkeypatch.setattr("ssh_route.log_in", log_in)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config.write(f"Host web\n HostName 127.0.0.1\n Port {listener.getsockname()[1]}\n ConnectTimeout 3")
        with pytest.raises(UnreachableError, match="hangs up before the SSH key exchange"):
            config.connect("web")
    assert len(tries) == 2


def test_server_that_hangs_up_once_and_keeps_silent_then_does_not_answer(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a host which costs each call its whole time is found out (`ssh_breaker`)."""
    answers = iter((HungUpError(), NoAnswerError("silent")))

    def log_in(_: Host, wire: SocketWire, carrier: None, keys: Keys, deadline: float) -> Connection:
        wire.close()
        raise next(answers)

    monkeypatch.setattr("ssh_route.log_in", log_in)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config.write(f"Host web\n HostName 127.0.0.1\n Port {listener.getsockname()[1]}\n ConnectTimeout 60")
        with pytest.raises(NoAnswerError, match="silent"):
            config.connect("web")
