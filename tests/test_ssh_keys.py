"""Keys of every kind and form, and what is said of those that cannot be used."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import keygen, program, wait_for
from settings import Settings, Target
from ssh_errors import LoginError
from ssh_keys import Keys

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
    wait_for(path.exists)
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
