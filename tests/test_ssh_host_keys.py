"""Keys and certificates of hosts; what ssh makes of them is in test_known_hosts_as_ssh."""

import base64
import subprocess
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_public_identity

from conftest import keygen, program
from ssh_host_keys import HostCertificate, read_certified_key, read_key


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for an Ed25519 key by an RSA authority, beside both."""
    keygen(tmp_path / "authority", "-t", "rsa", "-b", "2048")
    keygen(tmp_path / "key")
    signing = ["-s", str(tmp_path / "authority"), "-h", "-I", "test", "-n", "web1", str(tmp_path / "key.pub")]
    subprocess.run([program("ssh-keygen", "openssh-client"), "-q", *signing], check=True)
    return tmp_path / "key-cert.pub"


def fields(path: Path) -> tuple[str, str]:
    kind, text, *_ = path.read_text().split()
    return kind, text


def test_algorithm_of_an_authoritys_signature_is_where_it_was(certificate: Path) -> None:
    parsed = load_ssh_public_identity(certificate.read_bytes())
    assert bytes(parsed._inner_sig_type) == b"rsa-sha2-512"  # type: ignore[union-attr]


def test_certificate_holds_its_key_and_its_authority(certificate: Path) -> None:
    shown = HostCertificate(base64.b64decode(fields(certificate)[1]))
    assert shown.key == read_key(*fields(certificate.with_name("key.pub")))
    assert shown.authority == read_key(*fields(certificate.with_name("authority.pub")))
    assert shown.fault("web1", time.time()) is None
    assert read_certified_key(*fields(certificate)) == shown.key


def test_certificate_of_which_any_byte_was_changed_is_none(certificate: Path) -> None:
    blob = base64.b64decode(fields(certificate)[1])
    for place in range(len(blob)):
        changed = bytearray(blob)
        changed[place] ^= 1
        with pytest.raises(ValueError):
            HostCertificate(bytes(changed))


def test_certificate_that_is_cut_or_goes_on_is_none(certificate: Path) -> None:
    blob = base64.b64decode(fields(certificate)[1])
    for wrong in [*(blob[:length] for length in range(len(blob))), blob + b"\0"]:
        with pytest.raises(ValueError):
            HostCertificate(wrong)


def test_certificate_by_a_certificate_is_none(certificate: Path) -> None:
    """PROTOCOL.certkeys: chained certificates are not supported."""
    text = fields(certificate)[1]
    blob, authority = base64.b64decode(text), fields(certificate.with_name("authority.pub"))[1]
    plain = base64.b64decode(authority)
    nested = len(blob).to_bytes(4) + blob
    with pytest.raises(ValueError):
        HostCertificate(blob.replace(len(plain).to_bytes(4) + plain, nested))


def test_plain_key_is_no_certificate(certificate: Path) -> None:
    kind, text = fields(certificate.with_name("key.pub"))
    with pytest.raises(ValueError):
        HostCertificate(base64.b64decode(text))
    assert read_certified_key(kind, text) is None


def test_key_is_read_whole_or_not_at_all(certificate: Path) -> None:
    for name in ("key.pub", "authority.pub"):
        kind, text = fields(certificate.with_name(name))
        blob = base64.b64decode(text)
        assert read_key(kind, text) is not None
        for wrong in [*(blob[:length] for length in range(len(blob))), blob + b"\0", blob + b"\0\0\0\0"]:
            assert read_key(kind, base64.b64encode(wrong).decode()) is None
        assert read_key(kind, text + "é") is None
        assert read_key("ssh-unknown", text) is None
    assert read_key(*fields(certificate)) is None
