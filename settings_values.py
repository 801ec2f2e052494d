"""What the values of settings must look like. Pure: text in, the text in its usual form out, or ValueError."""

import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import AnyHttpUrl, ConfigDict, SecretStr, TypeAdapter

_HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")
_USER_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-@+")
_PASSWORD_BYTES = 255

_url = TypeAdapter(AnyHttpUrl, config=ConfigDict(url_preserve_empty_path=True))


def expanded(path: Path) -> Path:
    """Return a path with the home directory in place of `~`, else raise ValueError."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("there is no such home directory") from None


def host_token(text: str) -> str:
    """Return `text` in lower case if it is a host name, an alias or an IP address, else raise ValueError."""
    host = text.strip().removeprefix("[").removesuffix("]").lower()
    address, _, zone = host.partition("%")
    if _HOST_CHARACTERS.issuperset(zone) and not zone.startswith("-"):
        try:
            return str(ipaddress.ip_address(address + (f"%{zone}" if zone else "")))
        except ValueError:
            pass
    if not host or len(host) > 253 or host.startswith(("-", ".")) or not _HOST_CHARACTERS.issuperset(host):
        raise ValueError("a host name or an IP address")
    return host


def user_token(text: str) -> str:
    """Return `text` if it is an account's name, else raise ValueError."""
    user = text.strip()
    if not user or len(user) > 64 or user.startswith("-") or not _USER_CHARACTERS.issuperset(user):
        raise ValueError("an account name: letters, digits and . _ - @ +")
    return user


def is_loopback(host: str | None) -> bool:
    """Tell whether a host is the machine that asks, by name or by address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def trusted_url(text: str) -> str:
    """Return an https URL, or an http one of this machine, in its canonical form; else raise ValueError."""
    url = str(_url.validate_python(text.strip()))
    parts = urlsplit(url)
    if parts.scheme != "https" and not is_loopback(parts.hostname):
        raise ValueError("plain http leaves this machine")
    if parts.username is not None or parts.password is not None or "#" in url:
        raise ValueError("a URL without user name, password and fragment")
    return url


def origin(text: str) -> str:
    """Return the canonical origin, without a slash at its end; raise ValueError when there is more to the URL."""
    url = trusted_url(text).removesuffix("/")
    if urlsplit(url).path or "?" in url:
        raise ValueError("an origin without path and query")
    return url


def redis_url(text: str) -> str:
    """Return the URL of a Redis server, else raise ValueError."""
    url = text.strip()
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or parts.port == 0:
        raise ValueError("no Redis server")
    return url


def state_url(text: str) -> str:
    """Return the URL of a SQLite file or a Redis server, else raise ValueError."""
    url = text.strip()
    parts = urlsplit(url)
    names_file = parts.scheme == "sqlite" and not parts.netloc and len(parts.path) > 1
    return url if names_file else redis_url(url)


def networks(text: str) -> str:
    """Return comma-separated addresses and networks as they stand if all can be read, else raise ValueError."""
    for part in text.split(","):
        ipaddress.ip_network(part.strip(), strict=False)
    return text


def emails(text: str) -> str:
    """Return comma-separated addresses as they stand if all can be used, else raise ValueError.

    Only ASCII: letters of other alphabets that fold to the same one would let a stranger pass for somebody.
    """
    for part in text.split(","):
        name, _, domain = part.strip().rpartition("@")
        if not part.isascii() or not name or not domain or len(part.split()) != 1 or "*" in part:
            raise ValueError("e-mail addresses")
    return text


def audit_log(text: str) -> str:
    """Return where an audit trail goes, a file by its absolute path, else raise ValueError."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "fd" and rest.isascii() and rest.isdecimal() and int(rest[:9]) >= 2:
        return text  # 0 and 1 belong to MCP
    if colon and kind == "syslog" and (not rest or rest.startswith("/")):
        return text
    path = expanded(Path(text))
    if not path.is_absolute():
        raise ValueError("an absolute path")
    return str(path)


def directories(text: str) -> str:
    """Return colon-separated directories as they stand if all can be meant, else raise ValueError."""
    entries = [entry for part in text.split(":") if (entry := part.strip())]
    if not entries:
        raise ValueError("directories")
    for entry in entries:
        if not entry.isprintable() or "*" in entry or (entry.startswith("~") and entry[1:2] not in ("", "/")):
            raise ValueError("directories without wildcards, in the login directory of the account alone")
    return text


def one_line(secret: SecretStr) -> SecretStr:
    """Return a password that sudo reads whole, else raise ValueError: what it left would be the command's stdin."""
    text = secret.get_secret_value()
    if len(text.encode()) > _PASSWORD_BYTES or not {*"\r\n\0"}.isdisjoint(text):
        raise ValueError("a password of one line")
    return secret
