"""Who asks for access: registered clients and client ID metadata documents, and where they may be sent back.

- A client id of ours *is* the registration, signed (RFC 7591): nothing is kept, equal registrations give equal ids.
- A client id that is an https URL names a document, which FastMCP fetches without reaching into private networks.
  What it says of itself, and what it sends as proof, is a stranger's: however malformed, it is refused, no failure.
- All clients are public, but one whose document says `private_key_jwt` has to prove itself at `/token` (RFC 7523).
- A redirect URI is compared character by character; only the port of a loopback address is free (RFC 8252, 7.3).
"""

import hashlib
import ipaddress
import json
import string
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import SplitResult, urlsplit

import anyio
import jwt
from fastmcp.server.auth.cimd import (
    CIMDAssertionValidator,
    CIMDDocument,
    CIMDFetcher,
    CIMDFetchError,
    CIMDValidationError,
    _CIMDCachePolicy,
)

from oauth_state import State
from oauth_tokens import Tokens, Unreadable
from settings_values import host_token, is_loopback

SCOPE = "ssh"
"""The one there is: whoever may enter may use the server."""

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

_MOST_REDIRECT_URIS = 10
_MOST_NAME_CHARACTERS = 200
_MOST_URI_CHARACTERS = 1000
_MOST_CLIENT_ID_CHARACTERS = 16_000
_ASSERTION_SECONDS = 600
_MOST_ASSERTION_CHARACTERS = 4096
_MOST_FETCHES = 48
_FETCH_SECONDS = 10
_KEEP_SECONDS = 86_400

_URI_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-._~:/?[]@!$&'()+,;=%")
_SCHEME_CHARACTERS = frozenset(string.ascii_lowercase + string.digits + "+-.")
_PROGRAMS = frozenset(
    {"cherrystudio", "claude", "cursor", "goose", "kiro", "lmstudio", "raycast", "trae", "vscode"}
    | {"vscode-insiders", "vscodium", "warp", "windsurf", "zed"}
)
"""Schemes without a dot that known MCP clients use; any other could start what was never meant to be a redirect."""


class RegistrationError(Exception):
    """A registration is refused; `code` is RFC 7591's, `str()` says why."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class UnknownClient(Exception):  # noqa: N818
    """Nobody registered under that client id here."""


class ClientUnreachable(Exception):  # noqa: N818
    """The client's own description cannot be fetched now; what is known of the client is not in doubt."""


@dataclass(frozen=True)
class Client:
    """An application, as it describes itself; `host` is where its own document stands, if it has one."""

    id: str
    name: str
    redirect_uris: tuple[str, ...]
    host: str | None = None
    document: CIMDDocument | None = None

    def redirect_uri(self, asked: str | None) -> str | None:
        """Return where to send the browser, or None when that was not registered.

        Without `asked` it is the only one that is registered (RFC 6749, 3.1.2.3).
        """
        if asked is None:
            return self.redirect_uris[0] if len(self.redirect_uris) == 1 else None
        return asked if any(_fits(asked, registered) for registered in self.redirect_uris) else None


class _Fetcher(CIMDFetcher):
    """Fetches client documents, and keeps none for longer than a day, whatever its host asks for."""

    def _parse_cache_policy(self, headers: Mapping[str, str], now: float) -> _CIMDCachePolicy:
        policy = super()._parse_cache_policy(headers, now)
        return replace(
            policy,
            expires_at=min(policy.expires_at, now + _KEEP_SECONDS),
            freshness_lifetime=min(policy.freshness_lifetime, _KEEP_SECONDS),
        )

    def keeps(self, url: str) -> bool:
        """Tell whether a document is at hand, so that its host need not be asked."""
        kept = self._cache.get(url)
        return kept is not None and not kept.must_revalidate and time.time() < kept.expires_at


class Clients:
    """Registers clients and finds them again."""

    def __init__(self, tokens: Tokens, state: State, token_endpoint: str) -> None:
        self._tokens = tokens
        self._state = state
        self._token_endpoint = token_endpoint
        self._fetcher = _Fetcher()
        self._fetching = 0
        self._assertions = CIMDAssertionValidator()  # type: ignore[no-untyped-call]

    def register(self, body: bytes) -> dict[str, Any]:
        """Return the client information response to a registration request. Raises RegistrationError."""
        metadata = _object(body)
        uris = _redirect_uris(metadata.get("redirect_uris"))
        name = _name(metadata.get("client_name"), uris[0])
        _must_hold(metadata, "grant_types", "authorization_code")
        _must_hold(metadata, "response_types", "code")
        client_id = self._tokens.client_id({"name": name, "uris": uris})
        return {
            "client_id": client_id,
            "client_name": name,
            "redirect_uris": uris,
            "grant_types": ["authorization_code", "refresh_token"],
            "response_types": ["code"],
            "token_endpoint_auth_method": "none",
            "scope": SCOPE,
        }

    async def find(self, client_id: str) -> Client:
        """Return the client. Raises UnknownClient and ClientUnreachable."""
        if len(client_id) > _MOST_CLIENT_ID_CHARACTERS:
            raise UnknownClient
        if client_id.startswith("https://"):
            return await self._described(client_id)
        try:
            registration = self._tokens.registration(client_id)
        except Unreadable:
            raise UnknownClient from None
        return Client(client_id, registration["name"], tuple(registration["uris"]))

    async def _described(self, url: str) -> Client:
        host = _document_host(url)
        if self._fetching >= _MOST_FETCHES and not self._fetcher.keeps(url):
            raise ClientUnreachable
        self._fetching += 1
        try:
            with anyio.fail_after(_FETCH_SECONDS):
                document = await self._fetcher.fetch(url)
        except (CIMDFetchError, TimeoutError):
            raise ClientUnreachable from None
        except (CIMDValidationError, ValueError, RecursionError, OverflowError):
            raise UnknownClient from None  # FastMCP 4.1.2 parses JSON and headers unguarded
        finally:
            self._fetching -= 1
        if len(document.redirect_uris) > _MOST_REDIRECT_URIS:
            raise UnknownClient
        uris = tuple(uri for uri in document.redirect_uris if is_redirect_uri(uri))
        name = (document.client_name or "").strip()[:_MOST_NAME_CHARACTERS]
        if not _is_unicode(name):
            raise UnknownClient
        return Client(url, name or host, uris, host, document)

    async def proves_itself(self, client: Client, assertion_type: str | None, assertion: str | None) -> bool:
        """Tell whether the client at `/token` is who it says; a public client need not show anything."""
        if client.document is None or client.document.token_endpoint_auth_method == "none":  # noqa: S105
            return assertion is None
        if (
            assertion_type != ASSERTION_TYPE
            or assertion is None
            or len(assertion) > _MOST_ASSERTION_CHARACTERS
        ):
            return False
        try:
            await self._assertions.validate_assertion(
                assertion, client.id, self._token_endpoint, client.document
            )
        except (
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
            OverflowError,
        ):  # FastMCP 4.1.2 trusts the claims' types
            return False
        finally:
            # the memory of all clients, which one could fill, and of this process alone: the state store remembers
            self._assertions._jti_cache.clear()
        named = jwt.decode(assertion, options={"verify_signature": False})["jti"]
        if not isinstance(named, str):
            return False
        seen = hashlib.sha256(f"{client.id}\0{named}".encode("utf-8", "surrogatepass")).hexdigest()
        return await self._state.claim(f"assertion:{seen}", _ASSERTION_SECONDS)


def is_redirect_uri(uri: object) -> bool:
    """Tell whether a redirect URI may be registered: https, http on loopback, or an application's own scheme.

    Such a scheme has a dot (RFC 8252, 7.1) or is a known program's: others open what the system happens to have.
    """
    if not isinstance(uri, str) or not uri or len(uri) > _MOST_URI_CHARACTERS:
        return False
    if not _URI_CHARACTERS.issuperset(uri):
        return False
    parts = _split(uri)
    if parts is None or "@" in parts.netloc or "%" in parts.netloc:
        return False
    if parts.scheme == "https":
        return _is_host(parts)
    if parts.scheme == "http":
        return _is_host(parts) and is_loopback(parts.hostname)
    return _is_private_use(uri, parts)


def shown_host(redirect_uri: str) -> str:
    """Return what a person has to recognise of a redirect URI: its host, or its scheme if there is none."""
    parts = urlsplit(redirect_uri)
    return parts.netloc if parts.scheme in ("https", "http") else f"{parts.scheme}:"


def _split(uri: str) -> SplitResult | None:
    try:
        parts = urlsplit(uri)
        return parts if parts.port != 0 else None
    except ValueError:
        return None


def _is_host(parts: SplitResult) -> bool:
    try:
        host = host_token(parts.hostname or "")
    except ValueError:
        return False
    written = parts.netloc.lower() in _spellings(host, parts.port) and not parts.netloc.endswith(".")
    return written and (_is_address(host) or not _ends_in_number(host))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _ends_in_number(host: str) -> bool:
    """Browsers read such a name as an IPv4 address: 0x7f.1 is 127.0.0.1 (WHATWG URL, 3.5)."""
    last = host.removesuffix(".").rpartition(".")[2]
    return last.isdigit() or (last.startswith("0x") and set(last[2:]) <= set(string.hexdigits))


def _spellings(host: str, port: int | None) -> tuple[str, ...]:
    written = f"[{host}]" if ":" in host else host
    return (written,) if port is None else (f"{written}:{port}",)


def _is_private_use(uri: str, parts: SplitResult) -> bool:
    scheme = uri.partition(":")[0]
    return (
        scheme == parts.scheme
        and scheme[:1].isalpha()
        and _SCHEME_CHARACTERS.issuperset(scheme)
        and ("." in scheme or scheme in _PROGRAMS)
        and (_is_host(parts) if parts.netloc else parts.path.startswith("/"))
    )


def _fits(asked: str, registered: str) -> bool:
    if asked == registered:
        return True
    ours, theirs = _split(registered), _split(asked)
    return (
        ours is not None
        and theirs is not None
        and is_redirect_uri(asked)
        and ours.scheme == theirs.scheme == "http"
        and is_loopback(ours.hostname)
        and ours._replace(netloc="") == theirs._replace(netloc="")
        and ours.hostname == theirs.hostname
    )


def _document_host(url: str) -> str:
    parts = _split(url)
    if (
        parts is None
        or not _URI_CHARACTERS.issuperset(url)
        or not _is_host(parts)
        or parts.path in ("", "/")
        or any(segment in (".", "..") for segment in parts.path.split("/"))
        or len(url) > _MOST_URI_CHARACTERS
    ):
        raise UnknownClient
    return parts.hostname or ""


def _object(body: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(body)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise RegistrationError("invalid_client_metadata", "the registration is no JSON object")
    return metadata


def _redirect_uris(uris: object) -> list[str]:
    if not isinstance(uris, list) or not 1 <= len(uris) <= _MOST_REDIRECT_URIS:
        raise RegistrationError(
            "invalid_redirect_uri", f"redirect_uris must hold 1 to {_MOST_REDIRECT_URIS} URIs"
        )
    if not all(is_redirect_uri(uri) for uri in uris):
        raise RegistrationError(
            "invalid_redirect_uri",
            "a redirect URI must be https, http on loopback, or of the application's own scheme,"
            " without user, fragment or wildcard",
        )
    return uris


def _name(name: object, uri: str) -> str:
    if name is None:
        return shown_host(uri)
    if not isinstance(name, str) or len(name) > _MOST_NAME_CHARACTERS or not _is_unicode(name):
        raise RegistrationError(
            "invalid_client_metadata",
            f"client_name must be text of {_MOST_NAME_CHARACTERS} characters at most",
        )
    return name.strip() or shown_host(uri)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _must_hold(metadata: dict[str, Any], field: str, needed: str) -> None:
    values = metadata.get(field)
    if values is not None and not (isinstance(values, list) and needed in values):
        raise RegistrationError("invalid_client_metadata", f"{field} must hold {needed}")
