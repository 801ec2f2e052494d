"""What known_hosts says of a target's host key.

The format is that of sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT". Read here: names, `[host]:port`, the wildcards `*` and
`?`, negation with `!`, hashed names, `@revoked`. Lines marked `@cert-authority` are passed over: a server that
only shows a host certificate is unknown.
"""

import base64
import binascii
import hashlib
import hmac
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ssh_errors import HostKeyError


@dataclass(frozen=True)
class HostKey:
    """One public key of a server, as it travels (RFC 4253, 6.6)."""

    type: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """The fingerprint as OpenSSH prints it: SHA256 and unpadded base64."""
        digest = base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")
        return f"{self.type.removeprefix('ssh-').upper()} key SHA256:{digest}"


@dataclass(frozen=True)
class _Line:
    number: int
    marker: str
    names: str
    key: HostKey


class KnownHosts:
    """The host keys of one known_hosts file, read anew at each question. Thread-safe: it keeps no state."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def key_types(self, host: str, port: int) -> list[str]:
        """Return the types of the keys known for a host, so that these are asked for first."""
        return [line.key.type for line in self._known(host, port)]

    def verify(self, host: str, port: int, key: HostKey) -> None:
        """Return when `key` is known for the host.

        Raises HostKeyError when the key is revoked, or differs from what is known, or nothing is known; the
        latter is `UnknownHostKeyError`.
        """
        where = _name(host, port)
        if any(line.marker == "@revoked" and line.key == key for line in self._lines()):
            raise HostKeyError(
                f"{where} shows a host key that {self._path} marks as @revoked: {key.fingerprint}. "
                "Do not connect; ask whoever runs that machine."
            )
        known = self._known(host, port)
        if any(line.key == key for line in known):
            return
        known = [line for line in known if _matches(line.names, where)]
        if not known:
            scan = f"ssh-keyscan -p {port} {host}" if port != 22 else f"ssh-keyscan {host}"
            raise UnknownHostKeyError(
                f"{where} is not in {self._path}; it shows {key.fingerprint}. If its console shows the same "
                f"fingerprint (ssh-keygen -lf), add the key: {scan} >> {self._path}"
            )
        old = next((line for line in known if line.key.type == key.type), known[0])
        raise HostKeyError(
            f"the host key of {where} has changed: it shows {key.fingerprint}, but {self._path} line "
            f"{old.number} has {old.key.fingerprint}. Somebody may be in between. If the machine was set up "
            f'anew, compare the fingerprints, then: ssh-keygen -R "{where}" -f {shlex.quote(str(self._path))}'
        )

    def add(self, host: str, port: int, key: HostKey) -> None:
        """Append a key, as OpenSSH does under `StrictHostKeyChecking accept-new`.

        Raises HostKeyError when the file cannot be written: a key that is not kept protects nothing.
        """
        entry = f"{_name(host, port)} {key.type} {base64.b64encode(key.blob).decode()}\n".encode()
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                file.write(entry if file.read(1) in (b"", b"\n") else b"\n" + entry)
        except OSError as error:
            raise HostKeyError(
                f"the host key of {host} cannot be recorded in {self._path}: {error.strerror}"
            ) from None

    def _known(self, host: str, port: int) -> list[_Line]:
        """Return the lines that may vouch for a host: those for its port, or else those that name no port."""
        plain = [line for line in self._lines() if not line.marker]
        exact = [line for line in plain if _matches(line.names, _name(host, port))]
        return exact or [line for line in plain if _matches(line.names, host)]

    def _lines(self) -> Iterator[_Line]:
        try:
            text = self._path.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostKeyError(f"SSH_KNOWN_HOSTS: {self._path} cannot be read: {error.strerror}") from None
        for number, line in enumerate(text.split("\n"), 1):
            fields = [field for field in re.split(r"[ \t\r]+", line) if field]
            marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
            if len(fields) >= 3 and not fields[0].startswith("#") and (key := _key(fields[1], fields[2])):
                yield _Line(number, marker, fields[0], key)


def _key(kind: str, text: str) -> HostKey | None:
    """Return a key whose blob is one of that type, else None: OpenSSH passes such lines over."""
    try:
        blob = base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
    name = kind.encode()
    return HostKey(kind, blob) if blob.startswith(len(name).to_bytes(4, "big") + name) else None


class UnknownHostKeyError(HostKeyError):
    """Nothing is known of the host: the one case that `accept-new` accepts."""


def _name(host: str, port: int) -> str:
    return host if port == 22 else f"[{host}]:{port}"


def _matches(names: str, name: str) -> bool:
    if names.startswith("|1|"):
        return _matches_hash(names, name)
    patterns = [pattern.lower() for pattern in names.split(",")]
    if any(_glob(pattern[1:], name) for pattern in patterns if pattern.startswith("!")):
        return False
    return any(_glob(pattern, name) for pattern in patterns if not pattern.startswith("!"))


def _glob(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern.replace("[", "[[]"))


def _matches_hash(field: str, name: str) -> bool:
    try:
        salt, digest = (base64.b64decode(part, validate=True) for part in field.split("|")[2:4])
    except (ValueError, binascii.Error):
        return False
    return hmac.compare_digest(hmac.new(salt, name.encode(), hashlib.sha1).digest(), digest)
