"""What a server shows to be known by: a plain host key, or a certificate for it.

A certificate (OpenSSH's PROTOCOL.certkeys) is parsed, and its signature verified, when it is made: a
`HostCertificate` that exists is one that its authority signed. Whether that authority is trusted is not known here;
whether the certificate serves a host at a time is asked with `fault`.

Borrowed from cryptography's private parts, checked with 50.0.2 (`tests/test_ssh_host_keys.py` fails when it moves):
`SSHCertificate._inner_sig_type`, the algorithm that the authority signed with.
"""

import base64
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    SSHCertificateType,
    load_ssh_public_identity,
)
from cryptography.hazmat.primitives.serialization.ssh import SSHCertPublicKeyTypes

CERTIFICATE_SUFFIX = "-cert-v01@openssh.com"

_STRINGS = {
    "ssh-ed25519": 2,
    "ecdsa-sha2-nistp256": 3,
    "ecdsa-sha2-nistp384": 3,
    "ecdsa-sha2-nistp521": 3,
    "ssh-rsa": 3,
    "ssh-dss": 5,
    "sk-ssh-ed25519@openssh.com": 3,
    "sk-ecdsa-sha2-nistp256@openssh.com": 4,
}
"""Of how many strings the blob of each type consists (RFC 4253, 6.6; RFC 5656; RFC 8709; OpenSSH's PROTOCOL.u2f)."""


@dataclass(frozen=True)
class HostKey:
    """One public key of a server, as it travels (RFC 4253, 6.6)."""

    type: str
    blob: bytes
    is_new: bool = field(default=False, compare=False)
    """Whether it was unknown until this visit, and recorded at it."""

    def __str__(self) -> str:
        """The key as OpenSSH names it to people: type and fingerprint."""
        return f"{self.type.removeprefix('ssh-').upper()} key {self.fingerprint}"

    @property
    def fingerprint(self) -> str:
        """The fingerprint as OpenSSH prints it: SHA256 and unpadded base64."""
        return f"SHA256:{base64.b64encode(sha256(self.blob).digest()).decode().rstrip('=')}"

    @property
    def text(self) -> str:
        """The key as it stands in a file."""
        return f"{self.type} {base64.b64encode(self.blob).decode()}"


def read_key(kind: str, text: str) -> HostKey | None:
    """Return the key that a file names by its type and base64, or None when it is none that OpenSSH knows."""
    blob = _decoded(text)
    return HostKey(kind, blob) if _is_whole(kind, blob) else None


def read_certified_key(text: str) -> HostKey | None:
    """Return the key inside a certificate in base64, whoever signed it, or None when it is no certificate."""
    try:
        certificate = load_ssh_public_identity(_identity(_decoded(text)))
    except (ValueError, UnsupportedAlgorithm):
        return None
    return _host_key(certificate.public_key()) if isinstance(certificate, SSHCertificate) else None


class HostCertificate:
    """A certificate for a host's key, signed by `authority`. Immutable.

    Making one raises ValueError for anything but a whole certificate of a type that is used here, for which the
    signature by a plain key holds.
    """

    def __init__(self, blob: bytes) -> None:
        try:
            certificate = load_ssh_public_identity(_identity(blob))
            if not isinstance(certificate, SSHCertificate):
                raise ValueError("a plain key")
            certificate.verify_cert_signature()
            self.key = _host_key(certificate.public_key())
            self.authority = _host_key(certificate.signature_key())
        except (UnsupportedAlgorithm, InvalidSignature) as error:
            raise ValueError("no signature that can be verified") from error
        self._certificate = certificate

    def fault(self, host: str, now: float) -> str | None:
        """Return why the certificate does not serve `host` at `now` (seconds since 1970), or None when it does.

        The rules are those of ssh(1): principals are compared whole, wildcards in them mean nothing, and a
        certificate without principals is for every host (ssh-keygen(1), CERTIFICATES). No critical option is defined
        for hosts, so each is one that must not be ignored. SHA-1 signs nothing (CASignatureAlgorithms).
        """
        certificate = self._certificate
        principals = certificate.valid_principals
        if certificate.type is not SSHCertificateType.HOST:
            return "is for a user, not for a host"
        if now < certificate.valid_after:
            return "is not valid yet; check the clocks of both machines"
        if now >= certificate.valid_before:
            return f"expired on {datetime.fromtimestamp(certificate.valid_before, UTC):%Y-%m-%d}"
        if principals and host.encode() not in principals:
            return f"does not name {host}"
        if certificate.critical_options:
            return "has a critical option, and none is known for hosts"
        if bytes(certificate._inner_sig_type) == b"ssh-rsa":
            return "is signed with SHA-1"
        return None


def _host_key(key: SSHCertPublicKeyTypes) -> HostKey:
    kind, text = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[:2]
    return HostKey(kind.decode(), base64.b64decode(text))


def _identity(blob: bytes) -> bytes:
    """Return a key or a certificate as a line of a file, named by its own type."""
    return _first_string(blob) + b" " + base64.b64encode(blob)


def _first_string(blob: bytes) -> bytes:
    return blob[4 : 4 + int.from_bytes(blob[:4])]


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # no base64, or not even ASCII
        return b""


def _is_whole(kind: str, blob: bytes) -> bool:
    """Whether a blob is the strings (RFC 4251, 5) that its type has, the type's name first, and nothing else."""
    end = 0
    for _ in range(_STRINGS.get(kind, 0)):
        end += 4 + int.from_bytes(blob[end : end + 4])
    return 0 < end == len(blob) and _first_string(blob) == kind.encode()
