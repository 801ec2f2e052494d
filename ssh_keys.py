"""The keys that are shown at a login: the configured one, else the agent's, else the usual default keys.

Ed25519, ECDSA and RSA in OpenSSH and PEM form, with a passphrase or without. A certificate beside a key
(`KEY-cert.pub`) is shown with it. A key file that others may read is refused, as OpenSSH does. FIDO keys (`sk-`) are
not used.
"""

import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from settings import Settings, Target
from ssh_errors import LoginError

_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_DEFAULT_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")


class Keys:
    """The keys of one configuration. Thread-safe; a decrypted key file is kept until the file changes."""

    def __init__(self, settings: Settings) -> None:
        self._path = settings.ssh_key_path
        secret = settings.ssh_key_passphrase
        self._passphrase = secret.get_secret_value().encode() if secret else None
        self._loaded: dict[tuple[Path, bytes, bytes], paramiko.PKey] = {}
        self._loaded_lock = threading.Lock()

    @contextmanager
    def offered(self) -> Iterator[Iterator[tuple[str, paramiko.PKey]]]:
        """Lend the keys with their names, in the order in which they are to be tried.

        Raises LoginError when the configured key cannot be used.
        """
        if self._path is not None:
            yield iter([(str(self._path), self._load(self._path))])
            return
        try:
            agent = paramiko.Agent()
        except (OSError, paramiko.SSHException):  # an agent that hangs up holds no keys
            yield self._default_keys()
            return
        try:
            yield chain(
                ((f"the agent's {key.get_name()} key", key) for key in _usable(agent)), self._default_keys()
            )
        finally:
            agent.close()

    def advice(self, target: Target, tried: list[str]) -> str:
        """Return the sentence for a login that no key opened."""
        if not tried:
            return (
                f"no key to log in to {target} with; set SSH_KEY_PATH, or start an SSH agent (ssh-add), or make a "
                "key: ssh-keygen -t ed25519"
            )
        shown = ", ".join(tried[:4])
        return (
            f"{target} does not accept {shown}; append the public key to ~/.ssh/authorized_keys of "
            f"{target.user} there, or name another key with SSH_KEY_PATH"
        )

    def _default_keys(self) -> Iterator[tuple[str, paramiko.PKey]]:
        """Yield the usual keys that are there and can be used."""
        for name in _DEFAULT_NAMES:
            path = Path("~/.ssh").expanduser() / name
            if path.is_file():
                try:
                    key = self._load(path)
                except LoginError:
                    continue
                yield str(path), key

    def _load(self, path: Path) -> paramiko.PKey:
        try:
            status = path.stat()
            data = path.read_bytes()
        except OSError as error:
            raise LoginError(f"the key {path} (SSH_KEY_PATH) cannot be read: {error.strerror}") from None
        if os.name == "posix" and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise LoginError(
                f"the key {path} may be read by others, so it is not used; run: chmod 600 {path}"
            )
        certificate = path.with_name(f"{path.name}-cert.pub")
        beside = certificate.read_bytes() if certificate.is_file() else b""
        version = (path, sha256(data).digest(), sha256(beside).digest())
        with self._loaded_lock:
            kept = self._loaded.get(version)
        if kept is None:
            kept = _paramiko_key(path, self._decrypted(path, data))
            if beside:
                with suppress(ValueError, paramiko.SSHException):  # OpenSSH passes a broken one over, too
                    kept.load_certificate(str(certificate))
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


def _usable(agent: paramiko.Agent) -> list[paramiko.PKey]:
    """Return the agent's keys but those of FIDO, each login with which waits for somebody's touch."""
    return [key for key in agent.get_keys() if not key.get_name().startswith("sk-")]


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


def _unused(path: Path) -> LoginError:
    return LoginError(
        f"the key {path} is of a type that is not used here, such as a FIDO security key; "
        "give an Ed25519, ECDSA or RSA key"
    )
