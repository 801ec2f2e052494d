"""Keys of every kind and form, and what is said of those that cannot be used."""

import base64
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, x25519
from paramiko import SSHException
from paramiko.agent import AgentSSH

from conftest import Server, keygen, program, wait_for
from settings import Settings, Target
from ssh_config import HostConfig, SshConfig
from ssh_errors import LoginError
from ssh_hosts import Hosts
from ssh_keys import Keys
from ssh_policy import Reach
from ssh_route import connect

TARGET = Target("me", "web1", 22)
KINDS = {
    "ed25519": ("-t", "ed25519"),
    "ecdsa256": ("-t", "ecdsa", "-b", "256"),
    "ecdsa384": ("-t", "ecdsa", "-b", "384"),
    "ecdsa521": ("-t", "ecdsa", "-b", "521"),
    "rsa": ("-t", "rsa", "-b", "2048"),
}


def offered(**values: Any) -> list[tuple[str, Any]]:
    with Keys(Settings(**values)).offered() as keys:
        return list(keys)


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("form", ["RFC4716", "PEM", "PKCS8"])
@pytest.mark.parametrize("passphrase", [None, "hunter2"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_form_of_key_signs(
    tmp_path: Path, kind: str, form: str, passphrase: str | None
) -> None:
    path = keygen(tmp_path / "key", *KINDS[kind], "-m", form, "-N", passphrase or "")
    ((name, key),) = offered(ssh_key_path=path, ssh_key_passphrase=passphrase)
    assert name == str(path)
    assert key.get_base64() == path.with_suffix(".pub").read_text().split()[1]
    algorithm = "rsa-sha2-512" if kind == "rsa" else None
    signature = key.sign_ssh_data(b"data", algorithm)
    signature.rewind()
    assert type(key)(data=key.asbytes()).verify_ssh_sig(b"data", signature)


def test_passphrase_for_a_key_that_has_none_does_no_harm(tmp_path: Path) -> None:
    assert offered(ssh_key_path=keygen(tmp_path / "key"), ssh_key_passphrase="x")


@pytest.mark.parametrize("form", ["RFC4716", "PEM", "PKCS8"])
def test_wrong_and_missing_passphrases_are_told_apart(tmp_path: Path, form: str) -> None:
    path = keygen(tmp_path / "key", "-t", "ecdsa", "-m", form, "-N", "hunter2")
    with pytest.raises(LoginError, match=r"encrypted.*SSH_KEY_PASSPHRASE.*ssh-add"):
        offered(ssh_key_path=path)
    with pytest.raises(LoginError, match="SSH_KEY_PASSPHRASE does not open") as raised:
        offered(ssh_key_path=path, ssh_key_passphrase="wrong-one")
    assert "wrong-one" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (None, 0o600, "cannot be read"),
        ("garbage", 0o600, "no private key"),
        ("", 0o600, "no private key"),
        ("key", 0o644, "chmod 600"),
    ],
)
def test_file_that_is_no_usable_key_is_told(
    tmp_path: Path, content: str | None, mode: int, words: str
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(LoginError, match=words) as raised:
        offered(ssh_key_path=path)
    assert str(path) in str(raised.value)


def test_key_that_changed_is_read_again(tmp_path: Path) -> None:
    path = keygen(tmp_path / "key")
    keys = Keys(Settings(ssh_key_path=path))
    with keys.offered() as offer:
        ((_, first),) = offer
    path.unlink()
    keygen(path)
    os.utime(path, ns=(1, 1))
    with keys.offered() as offer:
        ((_, second),) = offer
    assert first.get_base64() != second.get_base64()


def test_default_keys_are_offered_and_encrypted_ones_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    keygen(tmp_path / ".ssh" / "id_rsa", "-t", "rsa", "-b", "2048", "-N", "secret")
    keygen(tmp_path / ".ssh" / "id_ecdsa", "-t", "ecdsa")
    keygen(tmp_path / ".ssh" / "id_ed25519")
    assert [Path(name).name for name, _ in offered()] == ["id_ed25519", "id_ecdsa"]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "agent"
    process = subprocess.Popen(
        [program("ssh-agent", "openssh-client"), "-D", "-a", path], stdout=subprocess.DEVNULL
    )

    def listens() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0

    wait_for(listens)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
    yield path
    process.terminate()
    process.wait()


def test_keys_of_the_agent_come_first(agent: Path, tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    keygen(tmp_path / ".ssh" / "id_ed25519")
    path = keygen(tmp_path / "held")
    subprocess.run([program("ssh-add", "openssh-client"), "-q", path], check=True)
    (name, key), (other, _) = offered()
    assert "agent" in name
    assert other.endswith("id_ed25519")
    assert key.get_base64() == path.with_suffix(".pub").read_text().split()[1]


def test_configured_key_is_the_only_one(agent: Path, tmp_path: Path) -> None:
    subprocess.run(["ssh-add", "-q", keygen(tmp_path / "held")], check=True)
    assert [name for name, _ in offered(ssh_key_path=keygen(tmp_path / "key"))] == [str(tmp_path / "key")]


def test_certificate_beside_a_key_is_shown_with_it(tmp_path: Path) -> None:
    authority, path = keygen(tmp_path / "authority"), keygen(tmp_path / "key")
    subprocess.run(
        ["ssh-keygen", "-q", "-s", authority, "-I", "me", "-n", "me", path.with_suffix(".pub")], check=True
    )
    ((_, key),) = offered(ssh_key_path=path)
    assert key.public_blob.key_type == "ssh-ed25519-cert-v01@openssh.com"


def test_advice_names_what_was_tried() -> None:
    keys = Keys(Settings())
    assert "ssh-keygen -t ed25519" in keys.advice(TARGET, [])
    assert "/a/key" in keys.advice(TARGET, ["/a/key"])
    assert "authorized_keys" in keys.advice(TARGET, ["/a/key"])


def sign(authority: Path, path: Path, identity: str) -> str:
    """Make the certificate beside a key; return its base64."""
    public = path.with_name(f"{path.name}.pub")
    subprocess.run(["ssh-keygen", "-q", "-s", authority, "-I", identity, "-n", "me", public], check=True)
    return path.with_name(f"{path.name}-cert.pub").read_text().split()[1]


def shown_certificate(keys: Keys) -> str:
    with keys.offered() as offer:
        ((_, key),) = offer
    return key.public_blob.key_blob.hex() if key.public_blob else ""


def test_certificate_that_was_renewed_is_shown(tmp_path: Path) -> None:
    authority, path = keygen(tmp_path / "authority"), keygen(tmp_path / "key")
    keys = Keys(Settings(ssh_key_path=path))
    assert shown_certificate(keys) == ""
    for identity in ("monday", "tuesday"):
        sign(authority, path, identity)
        assert identity.encode().hex() in shown_certificate(keys)


def test_default_key_has_its_certificate(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    sign(keygen(tmp_path / "authority"), keygen(tmp_path / ".ssh" / "id_ed25519"), "me")
    ((_, key),) = offered()
    assert key.public_blob.key_type == "ssh-ed25519-cert-v01@openssh.com"


@pytest.mark.parametrize(
    "content", [b"", b"garbage\n", b"ssh-ed25519-cert-v01@openssh.com AAAA x\n", b"\xff\xfe"]
)
def test_broken_certificate_is_passed_over_as_openssh_does(tmp_path: Path, content: bytes) -> None:
    path = keygen(tmp_path / "key")
    (tmp_path / "key-cert.pub").write_bytes(content)
    ((_, key),) = offered(ssh_key_path=path)
    assert key.public_blob is None


def test_broken_default_key_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").write_text("garbage")
    keygen(tmp_path / ".ssh" / "id_rsa", "-t", "ecdsa")
    assert [Path(name).name for name, _ in offered()] == ["id_rsa"]


@pytest.mark.parametrize("passphrase", [None, "hunter2"])
@pytest.mark.parametrize("kind", ["dsa", "x25519", "ed448", "secp256k1"])
def test_type_that_is_not_used_here_is_told(tmp_path: Path, kind: str, passphrase: str | None) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "dsa": lambda: dsa.generate_private_key(1024),
        "x25519": x25519.X25519PrivateKey.generate,
        "ed448": ed448.Ed448PrivateKey.generate,
        "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    }
    key = makers[kind]()
    path = tmp_path / "key"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    path.chmod(0o600)
    with pytest.raises(LoginError, match="Ed25519, ECDSA or RSA") as raised:
        offered(ssh_key_path=path, ssh_key_passphrase=passphrase)
    assert "hunter2" not in str(raised.value)


def test_folder_in_place_of_a_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(LoginError, match=r"SSH_KEY_PATH.*cannot be read"):
        offered(ssh_key_path=tmp_path)


@pytest.mark.parametrize("passphrase", [None, "hunter2"])
def test_key_that_was_cut_short_is_told(tmp_path: Path, passphrase: str | None) -> None:
    path = keygen(tmp_path / "key")
    begin, *_, end = path.read_text().splitlines()
    path.write_text(f"{begin}\nb3BlbnNzaC1rZXktdjEA\n{end}\n")
    with pytest.raises(LoginError, match="no private key") as raised:
        offered(ssh_key_path=path, ssh_key_passphrase=passphrase)
    assert "hunter2" not in str(raised.value)


def test_agent_that_is_gone_leaves_the_default_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "gone"))
    (tmp_path / ".ssh").mkdir()
    keygen(tmp_path / ".ssh" / "id_ed25519")
    assert [Path(name).name for name, _ in offered()] == ["id_ed25519"]


def test_agent_that_hangs_up_leaves_the_default_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    keygen(tmp_path / ".ssh" / "id_ed25519")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent"))
        listener.listen()
        hanging_up = threading.Thread(target=lambda: listener.accept()[0].close())
        hanging_up.start()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        names: list[str] = []
        with contextlib.suppress(OSError, SSHException):
            names = [Path(name).name for name, _ in offered()]
        hanging_up.join(10)
    assert names == ["id_ed25519"]


def configured(tmp_path: Path, *lines: str) -> HostConfig:
    path = tmp_path / "config"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return SshConfig(path).lookup("web", "me")


def names(config: HostConfig, **values: Any) -> list[str]:
    with Keys(Settings(**values)).offered(config) as offer:
        return [Path(name).name for name, _ in offer]


def held(agent: Path, tmp_path: Path, *keys: str) -> None:
    for key in keys:
        subprocess.run(["ssh-add", "-q", keygen(tmp_path / key)], check=True)
        assert agent.exists()


def test_identity_files_take_the_place_of_the_default_keys(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    keygen(tmp_path / ".ssh" / "id_ed25519")
    one, two = keygen(tmp_path / "one"), keygen(tmp_path / "two")
    assert names(configured(tmp_path, f"IdentityFile {two}", f"IdentityFile {one}")) == ["two", "one"]
    assert names(configured(tmp_path, "IdentityFile none")) == []
    assert names(configured(tmp_path, "Port 1")) == ["id_ed25519"]


def test_identity_files_that_cannot_be_used_are_told_of(tmp_path: Path) -> None:
    good = keygen(tmp_path / "good")
    locked = keygen(tmp_path / "locked", "-t", "ed25519", "-N", "secret")
    config = configured(
        tmp_path, *(f"IdentityFile {path}" for path in (locked, tmp_path / "gone", good, tmp_path / "config"))
    )
    keys = Keys(Settings())
    with keys.offered(config) as offer:
        assert [name for name, _ in offer] == [str(good)]
        told = keys.advice(TARGET, [str(good)], offer.unusable)
    assert f"{locked} is encrypted" in told
    assert f"{tmp_path / 'gone'} (IdentityFile) cannot be read" in told


def test_key_of_the_agent_that_an_identity_file_names_comes_first(agent: Path, tmp_path: Path) -> None:
    held(agent, tmp_path, "one", "two")
    file = tmp_path / "two"
    file.unlink()
    other = keygen(tmp_path / "other")
    config = configured(tmp_path, f"IdentityFile {file}", f"IdentityFile {other}")
    with Keys(Settings()).offered(config) as offer:
        first, second, third = (key for _, key in offer)
    shown = [key.get_base64() for key in (first, second, third)]
    assert shown == [(tmp_path / f"{name}.pub").read_text().split()[1] for name in ("two", "one", "other")]


@pytest.mark.parametrize("form", ["RFC4716", "PEM"])
def test_key_that_the_agent_holds_is_shown_once(agent: Path, tmp_path: Path, form: str) -> None:
    path = keygen(tmp_path / "key", "-t", "ecdsa", "-m", form)
    subprocess.run(["ssh-add", "-q", path], check=True)
    if form == "RFC4716":
        path.with_suffix(".pub").unlink()
    assert len(names(configured(tmp_path, f"IdentityFile {path}"))) == 1


def test_identities_only_leaves_out_what_else_the_agent_holds(agent: Path, tmp_path: Path) -> None:
    held(agent, tmp_path, "one", "two")
    config = configured(tmp_path, "IdentitiesOnly yes", f"IdentityFile {tmp_path / 'two'}.pub")
    with Keys(Settings()).offered(config) as offer:
        ((_, key),) = offer
    assert key.get_base64() == (tmp_path / "two.pub").read_text().split()[1]


def test_public_key_that_no_agent_serves_is_told_of(tmp_path: Path) -> None:
    keygen(tmp_path / "key")
    with Keys(Settings()).offered(configured(tmp_path, f"IdentityFile {tmp_path}/key.pub")) as offer:
        assert list(offer) == []
        assert "is a public one, and the SSH agent does not hold" in offer.unusable[0]


def test_agent_of_the_config_is_asked(agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held(agent, tmp_path, "one")
    monkeypatch.delenv("SSH_AUTH_SOCK")
    assert names(configured(tmp_path, f"IdentityAgent {agent}")) == ["the agent's ssh-ed25519 key"]
    assert names(configured(tmp_path, f"IdentityAgent {tmp_path}/gone")) == []
    monkeypatch.setenv("OTHER", str(agent))
    assert names(configured(tmp_path, "IdentityAgent $OTHER")) == ["the agent's ssh-ed25519 key"]
    monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
    assert names(configured(tmp_path, "IdentityAgent none")) == []


def test_key_path_is_for_hosts_without_an_identity_file_and_for_the_default_one(tmp_path: Path) -> None:
    own, named = keygen(tmp_path / "own"), keygen(tmp_path / "named")
    config = configured(tmp_path, f"IdentityFile {named}")
    assert names(config, ssh_key_path=own) == ["named"]
    assert names(configured(tmp_path, "Port 1"), ssh_key_path=own) == ["own"]
    with Keys(Settings(ssh_key_path=own)).offered(config, is_default=True) as offer:
        assert [name for name, _ in offer] == [str(own)]


def test_certificate_file_is_shown_with_its_key_alone(agent: Path, tmp_path: Path) -> None:
    held(agent, tmp_path, "one")
    two, three = keygen(tmp_path / "two"), keygen(tmp_path / "three")
    authority = keygen(tmp_path / "authority")
    files = []
    for key in ("one", "three"):
        sign(authority, tmp_path / key, key)
        files.append((tmp_path / f"{key}-cert.pub").rename(tmp_path / f"{key}.certificate"))
    config = configured(
        tmp_path,
        *(f"CertificateFile {file}" for file in [*files, tmp_path / "gone"]),
        f"IdentityFile {two}",
        f"IdentityFile {three}",
    )
    with Keys(Settings()).offered(config) as offer:
        certified = [key.public_blob is not None for _, key in offer]
    assert certified == [True, False, True]


@contextlib.contextmanager
def agent_that_says(path: Path, *answers: bytes) -> Iterator[None]:
    """An agent that gives these answers to what it is asked first, and leaves the rest unanswered."""
    over = threading.Event()

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            for answer in answers:
                peer.recv(1000)
                peer.sendall(len(answer).to_bytes(4) + answer)
            over.wait(60)

    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor() as threads:
        listener.bind(str(path))
        listener.listen()
        served = threads.submit(serve)
        yield
        over.set()
        served.result(10)


@pytest.mark.parametrize("from_config", [True, False])
def test_agent_that_never_signs_is_told_of_when_the_time_for_a_login_is_over(
    tmp_path: Path, sshd: Server, monkeypatch: pytest.MonkeyPatch, from_config: bool
) -> None:
    """Such as one whose key was added with `ssh-add -c`, so that somebody is asked first."""
    blob = base64.b64decode((sshd.key.with_suffix(".pub")).read_text().split()[1])
    held = b"\x0c\0\0\0\1" + b"".join(len(part).to_bytes(4) + part for part in (blob, b"comment"))
    place = tmp_path / "agent"
    named = f"IdentityAgent {place}" if from_config else ""
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "none" if from_config else place))
    web = f"HostName 127.0.0.1\nPort {sshd.port}\nUser tester\nUserKnownHostsFile {sshd.known_hosts}"
    path = tmp_path / "config"
    path.write_text(f"Host web\n{web}\n{named}\nConnectTimeout 4\n")
    path.chmod(0o600)
    settings = Settings(ssh_config=path, ssh_allowed_hosts="*")
    before = set(threading.enumerate())
    with agent_that_says(place, held):
        with pytest.raises(
            LoginError, match=r"agent did not sign for .* with the agent's ssh-ed25519 key in time"
        ):
            connect(Reach(settings).target("web", None, None), Hosts(settings), Keys(settings))
        wait_for(
            lambda: (
                not [one for one in threading.enumerate() if one not in before and "Transport" in repr(one)]
            )
        )


def test_agent_that_says_nothing_leaves_the_default_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ssh_keys._AGENT_SECONDS", 1.0)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    (tmp_path / ".ssh").mkdir()
    keygen(tmp_path / ".ssh" / "id_ed25519")
    with agent_that_says(tmp_path / "agent"):
        assert [Path(name).name for name, _ in offered()] == ["id_ed25519"]


def test_agents_of_paramiko_are_connected_as_before() -> None:
    assert callable(AgentSSH._connect)
    assert callable(AgentSSH._close)


def security_key(path: Path) -> Path:
    """Make the file that stands for a FIDO key (OpenSSH's PROTOCOL.key and PROTOCOL.u2f); no device is asked."""

    def strings(*parts: bytes) -> bytes:
        return b"".join(len(part).to_bytes(4) + part for part in parts)

    public = strings(b"sk-ssh-ed25519@openssh.com", b"k" * 32, b"ssh:")
    private = b"same" * 2 + public + b"\1" + strings(b"handle", b"", b"comment")
    private += bytes(range(1, 1 + -len(private) % 8))
    file = b"openssh-key-v1\0" + strings(b"none", b"none", b"") + b"\0\0\0\1" + strings(public, private)
    lines = base64.encodebytes(file).decode()
    path.write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{lines}-----END OPENSSH PRIVATE KEY-----\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("passphrase", [None, "hunter2"])
def test_fido_key_is_refused_as_such(tmp_path: Path, passphrase: str | None) -> None:
    path = security_key(tmp_path / "key")
    if passphrase:
        subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", passphrase, "-f", path], check=True)
    shown = subprocess.run(["ssh-keygen", "-lf", path], check=True, capture_output=True, text=True)
    assert "ED25519-SK" in shown.stdout
    with pytest.raises(LoginError, match=r"FIDO.*Ed25519, ECDSA or RSA"):
        offered(ssh_key_path=path, ssh_key_passphrase=passphrase)


def test_fido_key_of_the_agent_is_passed_over(agent: Path, tmp_path: Path) -> None:
    subprocess.run(["ssh-add", "-q", security_key(tmp_path / "fido"), keygen(tmp_path / "held")], check=True)
    ((name, _),) = offered()
    assert name == "the agent's ssh-ed25519 key"


def test_fido_key_of_the_config_is_told_of(tmp_path: Path) -> None:
    path = security_key(tmp_path / "id_sk")
    keys = Keys(Settings())
    with keys.offered(configured(tmp_path, f"IdentityFile {path}")) as offer:
        assert list(offer) == []
        assert "FIDO key, which asks for a touch" in keys.advice(TARGET, [], offer.unusable)
