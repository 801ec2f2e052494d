"""Host certificates on the wire: a real sshd shows them, a thief tries to."""

import base64
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import paramiko
import pytest
from paramiko.packet import Packetizer

from conftest import Server, keygen, nobody_cancels, program
from settings import Target
from ssh_commands import Commands
from ssh_errors import HostKeyError, LoginError, UnreachableError
from ssh_host_keys import HostKey, read_key
from ssh_hosts import Hosts
from ssh_keys import Keys
from ssh_pool import Pool
from ssh_route import connect

CERTIFICATE = "ssh-ed25519-cert-v01@openssh.com"
KINDS = {
    "ed25519": ["-t", "ed25519"],
    "ecdsa": ["-t", "ecdsa", "-b", "384"],
    "rsa": ["-t", "rsa", "-b", "2048"],
}


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return keygen(tmp_path / "authority")


def public(path: Path) -> HostKey:
    key = read_key(*path.with_name(f"{path.name}.pub").read_text().split()[:2])
    assert key is not None
    return key


def certify(server: Server, authority: Path, *arguments: str, kind: str = "ed25519") -> None:
    """Give a server a new host key of some type with a certificate, and let known_hosts know the authority alone."""
    for path in server.folder.glob("host_key*"):
        path.unlink()
    key = keygen(server.folder / "host_key", *KINDS[kind])
    signing = ["-s", str(authority), "-h", "-I", "test", *arguments, f"{key}.pub"]
    subprocess.run([program("ssh-keygen", "openssh-client"), "-q", *signing], check=True)
    server.config.write_text(server.config.read_text() + f"HostCertificate {key}-cert.pub\n")
    server.known_hosts.write_text(f"@cert-authority 127.0.0.* {public(authority).text}\n")
    server.stop()
    server.start()


@pytest.mark.parametrize("kind", KINDS)
def test_certified_host_is_known_by_its_authority_and_not_recorded(
    own_sshd: Callable[..., Server],
    authority: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = own_sshd()
    certify(server, authority, "-n", "127.0.0.1", kind=kind)
    known = server.known_hosts.read_bytes()
    settings = server.settings(ssh_host_key_policy="accept-new")
    monkeypatch.setattr(Packetizer, "REKEY_BYTES", 1 << 20)
    with closing(Pool(settings)) as pool:
        commands = Commands(pool, settings)
        result = commands.run(server.target, "head -c 5000000 /dev/zero", cancelled=nobody_cancels)
    assert result.stdout_bytes == 5_000_000
    assert server.known_hosts.read_bytes() == known


def test_certificate_for_another_host_leaves_the_plain_key(
    own_sshd: Callable[..., Server], authority: Path
) -> None:
    server = own_sshd()
    certify(server, authority, "-n", "127.0.0.2")
    settings, key = server.settings(), public(server.folder / "host_key")
    with pytest.raises(HostKeyError, match="its certificate does not name 127") as raised:
        connect(server.target, Hosts(settings), Keys(settings))
    assert key.fingerprint in str(raised.value)
    server.known_hosts.write_text(server.known_hosts.read_text() + f"[127.0.0.1]:{server.port} {key.text}\n")
    connection = connect(server.target, Hosts(settings), Keys(settings))
    assert connection.host_key == key
    connection.close()


def test_certified_host_is_known_by_its_plain_key_where_no_authority_is_known(
    own_sshd: Callable[..., Server], authority: Path
) -> None:
    server = own_sshd()
    certify(server, authority, "-n", "127.0.0.1")
    server.known_hosts.unlink()
    settings = server.settings(ssh_host_key_policy="accept-new")
    connect(server.target, Hosts(settings), Keys(settings)).close()
    key = public(server.folder / "host_key")
    assert server.known_hosts.read_text() == f"[127.0.0.1]:{server.port} {key.text}\n"


class _Shower(paramiko.Ed25519Key):  # type: ignore[misc]
    """A key that shows a certificate, whoever that belongs to."""

    certificate = b""

    def asbytes(self) -> bytes:
        return self.certificate


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [("host_key", LoginError, "key"), ("thief", UnreachableError, "key exchange failed")],
)
def test_certificate_without_its_key_is_worth_nothing(
    own_sshd: Callable[..., Server], authority: Path, name: str, error: type[Exception], told: str
) -> None:
    server = own_sshd()
    certify(server, authority, "-n", "127.0.0.1")
    keygen(server.folder / "thief")
    key = _Shower.from_private_key_file(str(server.folder / name))
    key.certificate = base64.b64decode((server.folder / "host_key-cert.pub").read_text().split()[1])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            accepted, _ = listener.accept()
            transport = paramiko.Transport(accepted)
            transport.server_key_dict = {CERTIFICATE: key}
            transport.start_server(threading.Event(), paramiko.ServerInterface())

        threading.Thread(target=serve, daemon=True).start()
        target, settings = Target("tester", "127.0.0.1", listener.getsockname()[1]), server.settings()
        with pytest.raises(error, match=told):
            connect(target, Hosts(settings), Keys(settings))
