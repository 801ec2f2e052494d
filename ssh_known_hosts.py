"""What known_hosts says of a target's host key.

The format is that of sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT", whole: names, `[host]:port`, the wildcards `*` and `?`,
negation with `!`, hashed names, `@cert-authority`, `@revoked`, in one file or several. A line that OpenSSH passes
over is passed over.

Invariants:

- A key that a file marks as `@revoked` is refused for every host, shown plainly, in a certificate or as an authority.
- A certificate counts only when an authority that is known for that very host signed it, and it serves that host now.
  Another one counts for nothing: what remains is the plain key in it, as for ssh(1).
- A file that is there and cannot be read is an error: it may hold a revocation.
- What is recorded is appended, one whole line in one write, behind a lock that keeps this server's processes apart.
  A new file in the old one's place would lose what `ssh` appends meanwhile. Whoever reads half a line passes it over.

Addresses are not looked up beside names: that is `CheckHostIP`, which OpenSSH has off.
"""

import base64
import errno
import hmac
import os
import re
import secrets
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ssh_errors import HostKeyError
from ssh_host_keys import CERTIFICATE_SUFFIX, HostCertificate, HostKey, read_certified_key, read_key

try:
    import fcntl
except ImportError:  # Windows, where two processes may both record the same key
    fcntl = None  # type: ignore[assignment]

_ALGORITHMS = {
    "ssh-ed25519": "ssh-ed25519",
    "ecdsa-sha2-nistp256": "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384": "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521": "ecdsa-sha2-nistp521",
    "rsa-sha2-512": "ssh-rsa",
    "rsa-sha2-256": "ssh-rsa",
}
"""The host key algorithms that are used here, the best first, and the type of key of each."""

_LONGEST_PATTERN = 1022  # a line with a longer one matches nothing for OpenSSH
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class KnownAs:
    """What a host is called in known_hosts: by its name and port, or by an alias (`HostKeyAlias`) instead."""

    host: str
    port: int
    alias: str | None = None

    def __str__(self) -> str:
        return self.name if self.alias or self.port == 22 else f"[{self.name}]:{self.port}"

    @property
    def name(self) -> str:
        """The name without a port: what certificates call the host, and lines that serve any port."""
        return (self.alias or self.host).lower()

    @property
    def scan(self) -> str:
        """The command that prints lines for the host's keys as they are now."""
        scan = f"ssh-keyscan -p {self.port} {self.host}" if self.port != 22 else f"ssh-keyscan {self.host}"
        return f"{scan} | sed 's/^[^ ]*/{self.alias}/'" if self.alias else scan


class UnknownHostKeyError(HostKeyError):
    """Nothing is known of the host: the one case that `accept-new` accepts."""


@dataclass(frozen=True)
class _Line:
    path: Path
    number: int
    marker: str
    names: str
    type: str
    base64: str

    @property
    def key(self) -> HostKey | None:
        """The line's key, or None when it holds none that OpenSSH would read.

        OpenSSH takes the name of an algorithm for that of its type of key: `rsa-sha2-512` for `ssh-rsa`.
        """
        key = read_key(_ALGORITHMS.get(self.type, self.type), self.base64)
        if key is None and self.marker == "@revoked":
            return read_certified_key(self.base64)
        return key


@dataclass(frozen=True)
class _Entry:
    """A line that names the host, and its key."""

    line: _Line
    key: HostKey


class KnownHosts:
    """The host keys of known_hosts files, read anew at each question. Thread-safe: it keeps no state.

    New keys go into the first of the files, under a hash of the host's name when `hash_names` (`HashKnownHosts`).
    """

    def __init__(self, *paths: Path, hash_names: bool = False) -> None:
        self._paths = paths
        self._hash_names = hash_names

    def algorithms(self, host: KnownAs) -> list[str]:
        """Return the host key algorithms to ask a host for, so that it shows what is known of it.

        Certificates come first when an authority is known for the host, and are else not asked for; then the types
        of its known keys; then the others, so that a changed key is found out.
        """
        lines = list(self._lines())
        authorities = {entry.key.type for entry in _authorities(lines, host)}
        known = {entry.key.type for entry in _plain_keys(lines, host)}
        certificates = [f"{name}{CERTIFICATE_SUFFIX}" for name in _ALGORITHMS]
        usable = authorities & set(_ALGORITHMS.values())
        return (certificates if usable else []) + sorted(
            _ALGORITHMS, key=lambda name: _ALGORITHMS[name] not in known
        )

    def verify(self, host: KnownAs, key: HostKey, certificate: bytes | None = None) -> None:
        """Return when the key that a host shows is known, or the certificate for it is by a known authority.

        `key` is the one that signed the key exchange. Raises HostKeyError when it or the authority is revoked, or when
        it differs from what is known; its kind `UnknownHostKeyError` when nothing is known.
        """
        lines = list(self._lines())
        _refuse_revoked(lines, host, key)
        preface = ""
        if certificate is not None:
            fault = _fault(lines, host, key, certificate)
            if fault is None:
                return
            preface = f"its certificate {fault}; "
        self._verify_plain(lines, host, key, preface)

    def add(self, host: KnownAs, key: HostKey) -> None:
        """Append a key, as OpenSSH does under `StrictHostKeyChecking accept-new`.

        What another process recorded meanwhile is looked at first. Raises HostKeyError when that differs, or when
        the file cannot be written: a key that is not kept protects nothing. Waits at most ten seconds for others.
        """
        path = self._paths[0]
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(path) as descriptor:
                try:
                    self.verify(host, key)
                except UnknownHostKeyError:
                    name = _hashed(str(host), secrets.token_bytes(20)) if self._hash_names else str(host)
                    _append(descriptor, f"{name} {key.text}\n".encode())
        except OSError as error:
            why = error.strerror or "another process keeps it locked"
            raise HostKeyError(f"the host key of {host} cannot be recorded in {path}: {why}") from None

    def _verify_plain(self, lines: list[_Line], host: KnownAs, key: HostKey, preface: str) -> None:
        known = _plain_keys(lines, host)
        if any(entry.key == key for entry in known):
            return
        known = [entry for entry in known if _matches(entry.line.names, str(host))]
        if not known:
            files = " or ".join(map(str, self._paths))
            raise UnknownHostKeyError(
                f"{host} is not in {files}; {preface}it shows {key}. If its console shows the same "
                f"fingerprint (ssh-keygen -lf), add the key: {host.scan} >> {shlex.quote(str(self._paths[0]))}"
            )
        old = next((entry for entry in known if entry.key.type == key.type), known[0])
        path = old.line.path
        unused = "" if old.key.type in _ALGORITHMS.values() else ", of a type that is not used here"
        raise HostKeyError(
            f"the host key of {host} has changed: {preface}it shows {key}, but {path} line {old.line.number} has "
            f"{old.key}{unused}. Somebody may be in between; if the machine was set up anew, compare the fingerprints, "
            f'then: ssh-keygen -R "{host}" -f {shlex.quote(str(path))}'
        )

    def _lines(self) -> Iterator[_Line]:
        for path in self._paths:
            try:
                text = path.read_bytes().decode("utf-8", "replace")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise HostKeyError(f"SSH_KNOWN_HOSTS: {path} cannot be read: {error.strerror}") from None
            for number, line in enumerate(text.split("\n"), 1):
                line, _, _ = line.partition("\0")  # where it ends for OpenSSH
                fields = re.split(r"[ \t]+", line.removesuffix("\r").strip(" \t"), maxsplit=4)
                marker = fields.pop(0) if fields[0].startswith("@") else ""
                if len(fields) >= 3 and not fields[0].startswith("#"):
                    yield _Line(path, number, marker, *fields[:3])


def _plain_keys(lines: list[_Line], host: KnownAs) -> list[_Entry]:
    """Return what may vouch for a host's key: the lines for its port, or else those that name no port."""
    return _entries(lines, "", str(host)) or _entries(lines, "", host.name)


def _authorities(lines: list[_Line], host: KnownAs) -> list[_Entry]:
    """Return what may vouch for a host's certificate: the lines for its port, and those that name no port."""
    marker = "@cert-authority"
    return _entries(lines, marker, str(host)) + _entries(lines, marker, host.name)


def _entries(lines: list[_Line], marker: str, name: str) -> list[_Entry]:
    return [
        _Entry(line, key)
        for line in lines
        if line.marker == marker and _matches(line.names, name) and (key := line.key)
    ]


def _refuse_revoked(lines: list[_Line], host: KnownAs, key: HostKey) -> None:
    for line in lines:
        if line.marker == "@revoked" and line.key == key:
            raise HostKeyError(
                f"{host} shows a host key, or a certificate by one, that {line.path} marks as @revoked: {key}. "
                "Do not connect; ask whoever runs that machine."
            )


def _fault(lines: list[_Line], host: KnownAs, key: HostKey, blob: bytes) -> str | None:
    """Return why a certificate does not vouch for a host's key, or None when it does."""
    try:
        certificate = HostCertificate(blob)
    except ValueError:
        return "is broken, or of a type that is not used here"
    _refuse_revoked(lines, host, certificate.authority)
    if certificate.key != key:
        return "is for another key"
    if all(entry.key != certificate.authority for entry in _authorities(lines, host)):
        return "is by an authority that is not known for it"
    return certificate.fault(host.name, time.time())


def _matches(names: str, name: str) -> bool:
    if names.startswith("|1|"):
        return _matches_hash(names, name)
    patterns = [pattern.lower() for pattern in names.split(",")]
    if any(len(pattern) > _LONGEST_PATTERN for pattern in patterns):
        return False
    if any(_glob(pattern[1:], name) for pattern in patterns if pattern.startswith("!")):
        return False
    return any(_glob(pattern, name) for pattern in patterns if not pattern.startswith("!"))


def _glob(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern.replace("[", "[[]"))


def _matches_hash(names: str, name: str) -> bool:
    try:
        salt = base64.b64decode(names.split("|")[2], validate=True)
    except ValueError:  # no base64, or not even ASCII
        return False
    return names == _hashed(name, salt)


def _hashed(name: str, salt: bytes) -> str:
    digest = hmac.digest(salt, name.encode(), "sha1")
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open a file for appending, made with mode 0600 if need be, while no other process of this kind has it open."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _lock(descriptor):
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.005)
        yield descriptor
    finally:
        os.close(descriptor)  # which ends the lock


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _append(descriptor: int, line: bytes) -> None:
    """Append a line in one write, which no other writer's can part; behind a newline where the file ends without."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    os.lseek(descriptor, max(0, size - 1), os.SEEK_SET)
    if os.read(descriptor, 1) not in (b"", b"\n"):
        line = b"\n" + line
    if os.write(descriptor, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
