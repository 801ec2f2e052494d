"""The keys that are shown at a login: the configured one, else the agent's, the SSH config's, the usual default keys.

Ed25519, ECDSA and RSA in OpenSSH and PEM form, with a passphrase or without. A certificate beside a key
(`KEY-cert.pub`), or a CertificateFile of the SSH config that is for the key, is shown with it. A key file that others
may read is refused, as OpenSSH does. Of an agent's keys, those come first that IdentityFile names: a server hears only
a few out (MaxAuthTries).

Borrowed from Paramiko's private parts, checked with 5.1.0 (`tests/test_ssh_keys.py` fails when one moves):
`AgentSSH._connect` and `._close`.
"""

import errno
import io
import os
import socket
import stat
import threading
import time
from base64 import b64decode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from settings import Settings, Target
from ssh_config import HostConfig
from ssh_errors import LoginError
from ssh_host_keys import read_certified_key

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_AGENT_SECONDS = 5.0
_PUBLIC_BEGINS = (b"ssh-", b"ecdsa-", b"sk-")
_OPENSSH_BEGIN = b"-----BEGIN OPENSSH PRIVATE KEY-----"
_OPENSSH_MAGIC = b"openssh-key-v1\0"
_DEFAULT_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")


class _AgentSocket(socket.socket):
    """A socket to an agent, which is waited for until `deadline` (monotonic seconds).

    Of a time-out it says what Paramiko takes for granted of an error: its reading thread asks for signatures, and would
    otherwise end before it has woken who waits for the login.
    """

    deadline = 0.0
    owes = False
    """Whether something was asked that is not answered."""

    def send(self, data: "ReadableBuffer", flags: int = 0) -> int:
        """Ask something."""
        self.owes = True
        with self._in_time():
            return super().send(data, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return at most `size` bytes of the answer."""
        with self._in_time():
            data = super().recv(size, flags)
        self.owes = False
        return data

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        self.settimeout(max(0.1, self.deadline - time.monotonic()))
        try:
            yield
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None


@dataclass
class Agent:
    """An SSH agent (draft-ietf-sshm-ssh-agent) and the keys that it holds."""

    keys: Sequence[paramiko.AgentKey] = ()
    socket: _AgentSocket | None = None

    @property
    def is_silent(self) -> bool:
        """Whether it leaves something unanswered, such as what it was to sign."""
        return self.socket is not None and self.socket.owes


class Offer:
    """Keys with their names, in the order in which they are to be tried, and why some are not among them."""

    def __init__(self) -> None:
        self.unusable: list[str] = []
        self.agent = Agent()
        self._keys: Iterator[tuple[str, paramiko.PKey]] = iter(())

    def __iter__(self) -> Iterator[tuple[str, paramiko.PKey]]:
        return self._keys

    def add(self, keys: Iterable[tuple[str, paramiko.PKey]]) -> None:
        """Put keys behind those that are there; they are looked for when their turn comes."""
        self._keys = chain(self._keys, keys)


class Keys:
    """The keys of one configuration. Thread-safe; a decrypted key file is kept until the file changes."""

    def __init__(self, settings: Settings) -> None:
        self._path = settings.ssh_key_path
        secret = settings.ssh_key_passphrase
        self._passphrase = secret.get_secret_value().encode() if secret else None
        self._loaded: dict[tuple[Path, bytes, bytes], paramiko.PKey] = {}
        self._loaded_lock = threading.Lock()

    @contextmanager
    def offered(
        self, config: HostConfig | None = None, *, is_default: bool = False, deadline: float | None = None
    ) -> Iterator[Offer]:
        """Lend the keys for a host, or for one that the SSH config says nothing of.

        An agent has until `deadline` (monotonic seconds) to sign, if it is given.

        Raises LoginError when the key of SSH_KEY_PATH cannot be used.
        """
        files = None if config is None else config.identity_files
        certificates = () if config is None else tuple(map(Path, config.certificate_files))
        offer = Offer()
        if self._path is not None and (is_default or files is None):
            offer.add([(str(self._path), self._load(self._path, certificates, "SSH_KEY_PATH"))])
            yield offer
            return
        paths = _default_paths() if files is None else list(map(Path, files))
        with agent_at(config.identity_agent if config else None, deadline) as agent:
            offer.agent = agent
            named = [blob for path in paths if (blob := _public_blob(path))]
            first = [key for blob in named for key in agent.keys if key.asbytes() == blob]
            others = (
                [] if config and config.identities_only else [key for key in agent.keys if key not in first]
            )
            offer.add(_of_agent(offer, [*first, *others], certificates))
            taken = {key.asbytes() for key in first}
            rest = [path for path in paths if _public_blob(path) not in taken]
            offer.add(self._of_files(offer, rest, certificates, tells=files is not None))
            yield offer

    def advice(self, target: Target, tried: list[str], unusable: Sequence[str] = ()) -> str:
        """Return the sentence for a login that no key opened."""
        passed_over = f" ({'; '.join(unusable[:2])})" if unusable else ""
        if not tried:
            return (
                f"no key to log in to {target} with{passed_over}; set SSH_KEY_PATH, or start an SSH agent (ssh-add), "
                "or make a key: ssh-keygen -t ed25519"
            )
        shown = ", ".join(tried[:4])
        return (
            f"{target} does not accept {shown}{passed_over}; append the public key to ~/.ssh/authorized_keys of "
            f"{target.user} there, or name another key with SSH_KEY_PATH"
        )

    def _of_files(
        self, offer: Offer, paths: list[Path], certificates: tuple[Path, ...], *, tells: bool
    ) -> Iterator[tuple[str, paramiko.PKey]]:
        """Yield the keys that are there and can be used; note the others where the config `tells` of them."""
        for path in paths:
            try:
                key = self._load(path, certificates, "IdentityFile")
            except LoginError as error:
                if tells:
                    offer.unusable.append(str(error))
                continue
            yield str(path), key

    def _load(self, path: Path, certificates: tuple[Path, ...], source: str) -> paramiko.PKey:
        try:
            status = path.stat()
            data = path.read_bytes()
        except OSError as error:
            raise LoginError(f"the key {path} ({source}) cannot be read: {error.strerror}") from None
        if data.startswith(_PUBLIC_BEGINS):
            raise LoginError(
                f"the key {path} is a public one, and the SSH agent does not hold its private one; run: ssh-add"
            )
        if os.name == "posix" and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise LoginError(
                f"the key {path} may be read by others, so it is not used; run: chmod 600 {path}"
            )
        if _type_of(_public_in(data)).startswith("sk-"):
            raise LoginError(
                f"the key {path} is a FIDO key, which asks for a touch of its token, and nobody is there; give an "
                "Ed25519, ECDSA or RSA key"
            )
        beside = path.with_name(f"{path.name}-cert.pub")
        shown_with_it = _readable([beside, *certificates])
        version = (path, sha256(data).digest(), sha256(b"".join(shown_with_it.values())).digest())
        with self._loaded_lock:
            kept = self._loaded.get(version)
        if kept is None:
            kept = _paramiko_key(path, self._decrypted(path, data))
            _certify(kept, [name for name in shown_with_it if name == beside or _is_for(kept, name)])
            with self._loaded_lock:
                self._loaded[version] = kept
        return kept

    def _decrypted(self, path: Path, data: bytes) -> object:
        """Try OpenSSH's form, then PEM; each with the passphrase, then without."""
        passphrases = [self._passphrase, None] if self._passphrase else [None]
        encrypted = False
        for passphrase in passphrases:
            for load in (serialization.load_ssh_private_key, serialization.load_pem_private_key):
                try:
                    return load(data, passphrase)
                except UnsupportedAlgorithm:
                    raise _unused(path) from None
                except ValueError as error:
                    encrypted |= "decrypt" in str(error) or "password" in str(error).lower()
                except TypeError:
                    encrypted = True
        if not encrypted:
            raise LoginError(f"the key {path} is no private key in OpenSSH or PEM form")
        if self._passphrase:
            raise LoginError(f"SSH_KEY_PASSPHRASE does not open the key {path}")
        raise LoginError(
            f"the key {path} is encrypted; set SSH_KEY_PASSPHRASE, or use an SSH agent (ssh-add {path})"
        )


def _paramiko_key(path: Path, key: object) -> paramiko.PKey:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        kind: type[paramiko.PKey] = paramiko.Ed25519Key
    elif isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        kind = paramiko.ECDSAKey
    elif isinstance(key, rsa.RSAPrivateKey):
        kind = paramiko.RSAKey
    else:
        raise _unused(path)
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return kind.from_private_key(io.StringIO(text.decode()))


def _default_paths() -> list[Path]:
    return [path for name in _DEFAULT_NAMES if (path := Path("~/.ssh").expanduser() / name).is_file()]


@contextmanager
def agent_at(named: str | None, deadline: float | None = None) -> Iterator[Agent]:
    """Lend the agent at a socket, or the environment's; one without keys when it does not answer or is `none`.

    It has until `deadline` (monotonic seconds) to sign, if that is given, and `_AGENT_SECONDS` for all else.
    """
    asked = paramiko.agent.AgentSSH()
    agent = Agent()
    soon = time.monotonic() + _AGENT_SECONDS
    path = os.environ.get("SSH_AUTH_SOCK") if named is None else named
    try:
        if named is None and not hasattr(socket, "AF_UNIX"):
            asked = paramiko.Agent()  # where it has a fixed place
        elif path and named != "none":
            agent.socket = _unix_socket(path, soon if deadline is None else min(soon, deadline))
            asked._connect(agent.socket)
        agent.keys = list(asked.get_keys())
    except (OSError, paramiko.SSHException):  # an agent that hangs up holds no keys
        agent = Agent()
    if agent.socket is not None and deadline is not None:
        agent.socket.deadline = deadline
    try:
        yield agent
    finally:
        asked._close()


def _unix_socket(path: str, deadline: float) -> _AgentSocket:
    if not hasattr(socket, "AF_UNIX"):
        raise OSError("this system has no sockets with paths")
    connected = _AgentSocket(socket.AF_UNIX)
    connected.deadline = deadline
    try:
        connected.settimeout(max(0.1, deadline - time.monotonic()))
        connected.connect(path)
    except OSError:
        connected.close()
        raise
    return connected


def _of_agent(
    offer: Offer, keys: list[paramiko.AgentKey], certificates: tuple[Path, ...]
) -> Iterator[tuple[str, paramiko.PKey]]:
    for key in keys:
        if key.get_name().startswith("sk-"):
            offer.unusable.append("the agent's FIDO key asks for a touch of its token, and nobody is there")
            continue
        _certify(key, [name for name in _readable(certificates) if _is_for(key, name)])
        yield f"the agent's {key.get_name()} key", key


def _certify(key: paramiko.PKey, certificates: Iterable[Path]) -> None:
    """Let the first certificate that can be read be shown with a key."""
    for certificate in certificates:
        with suppress(ValueError, OSError, paramiko.SSHException):  # OpenSSH passes a broken one over, too
            key.load_certificate(str(certificate))
            return


def _is_for(key: paramiko.PKey, certificate: Path) -> bool:
    """Whether a certificate is for a key."""
    fields = certificate.read_text("utf-8", "replace").split()
    certified = read_certified_key(fields[1]) if len(fields) > 1 else None
    return certified is not None and certified.blob == key.asbytes()


def _readable(paths: Iterable[Path]) -> dict[Path, bytes]:
    found = {}
    for path in paths:
        with suppress(OSError):
            found[path] = path.read_bytes()
    return found


def _public_blob(path: Path) -> bytes:
    """Return the public key of a key file, from beside it or from it; nothing when neither tells."""
    for file, data in _readable([path.with_name(f"{path.name}.pub"), path]).items():
        fields = data.split()
        if file != path or not data.startswith(b"-----"):
            with suppress(ValueError, IndexError):
                return b64decode(fields[1], validate=True)
        if blob := _public_in(data):
            return blob
    return b""


def _public_in(data: bytes) -> bytes:
    """Return the public key in a private one of OpenSSH's form, which is not encrypted; nothing in another form."""
    body = data.strip().removeprefix(_OPENSSH_BEGIN).partition(b"-----END")[0]
    if not data.strip().startswith(_OPENSSH_BEGIN):
        return b""
    try:
        message = paramiko.Message(b64decode(b"".join(body.split()), validate=True))
    except ValueError:
        return b""
    message.get_bytes(len(_OPENSSH_MAGIC))
    for _ in ("cipher", "derivation", "its options"):
        message.get_binary()
    message.get_int()  # of keys, always one
    return bytes(message.get_binary())


def _type_of(blob: bytes) -> str:
    return bytes(paramiko.Message(blob).get_binary()).decode("utf-8", "replace")


def _unused(path: Path) -> LoginError:
    return LoginError(f"the key {path} is of a type that is not used here; give an Ed25519, ECDSA or RSA key")
