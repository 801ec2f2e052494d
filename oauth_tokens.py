"""What the authorization server signs and reads again. Pure: keys and claims in, strings out, and back.

- Each kind of string has a salt or a secret of its own: none can be used as another.
- Of several keys the first signs and all verify, which is how a secret is rotated.
- Nothing is in a string that its holder may not read; none is stored anywhere.
- A client id and a refresh token have no random part: the same contents give the same string.

Reading raises Unreadable, whatever is wrong: altered, expired, signed by others, or of another kind.
"""

import hashlib
import hmac
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import jwt
from itsdangerous import BadData, URLSafeSerializer, URLSafeTimedSerializer

CODE_SECONDS = 60
LOGIN_SECONDS = 600
ACCESS_SECONDS = 3600
REFRESH_SECONDS = 30 * 24 * 3600

_BROWSER_SECONDS = 24 * 3600
_REPLICA_SECONDS = 5
"""How far the clock of the replica that made a token may be ahead."""
_SIGNING = {"digest_method": hashlib.sha256, "key_derivation": "hmac"}

Keys = tuple[bytes, ...]
T = TypeVar("T", "Request", "Visit", "Code", "Refresh")


class Unreadable(Exception):  # noqa: N818
    """The string is not one of ours, not of this kind, or its time is over."""


@dataclass(frozen=True)
class Request:
    """An authorization request that was found good (RFC 6749, 4.1.1), on its way through the browser."""

    id: str
    client_id: str
    client_name: str
    client_host: str | None
    redirect_uri: str
    challenge: str
    state: str | None
    resources: list[str]
    scope: str


@dataclass(frozen=True)
class Visit:
    """What goes to Google and back as `state`: a request, and the browser that agreed to it."""

    request: Request
    browser: str


@dataclass(frozen=True)
class Identity:
    """Who logged in: Google's lasting identifier, and the e-mail address."""

    sub: str
    email: str


@dataclass(frozen=True)
class Code:
    """What an authorization code is bound to. Its id names the family of all tokens that come of it."""

    family: str
    client_id: str
    redirect_uri: str
    challenge: str
    resources: list[str]
    scope: str
    sub: str
    email: str


@dataclass(frozen=True)
class Refresh:
    """A refresh token: the grant that it renews, and its place in the family."""

    family: str
    generation: int
    client_id: str
    resources: list[str]
    scope: str
    sub: str
    email: str


@dataclass(frozen=True)
class Access:
    """An access token that was verified."""

    client_id: str
    audience: list[str]
    scope: str
    sub: str
    email: str
    jti: str
    expires_at: int

    @property
    def family(self) -> str:
        """The grant that the token came of."""
        return family_of(self.jti)


class Tokens:
    """Makes and reads every string. Thread-safe: nothing here changes."""

    def __init__(self, issuer: str, jwt_keys: Keys, session_keys: Keys, code_keys: Keys) -> None:
        self._issuer = issuer
        self._jwt_keys = jwt_keys
        self._session_keys = session_keys
        self._clients = URLSafeSerializer(_ordered(session_keys), "client", signer_kwargs=_SIGNING)
        self._requests = _timed(session_keys, "request")
        self._visits = _timed(session_keys, "state")
        self._browsers = _timed(session_keys, "browser")
        self._codes = _timed(code_keys, "code")
        self._refreshes = URLSafeSerializer(_ordered(jwt_keys), "refresh", signer_kwargs=_SIGNING)

    def client_id(self, registration: dict[str, Any]) -> str:
        """Sign a registration: the client id is the registration (RFC 7591)."""
        return _text(self._clients.dumps(registration))

    def registration(self, client_id: str) -> dict[str, Any]:
        """Read the registration that a client id is."""
        registration: dict[str, Any] = _loaded(self._clients, client_id)
        return registration

    def request(self, request: Request) -> str:
        """Sign an authorization request for the way to the consent page; it lives 10 minutes."""
        return _text(self._requests.dumps(asdict(request)))

    def read_request(self, text: str) -> Request:
        """Read an authorization request."""
        return _read(Request, self._requests, text, LOGIN_SECONDS)

    def state(self, visit: Visit) -> str:
        """Sign the `state` for Google; it lives 10 minutes."""
        return _text(self._visits.dumps(asdict(visit)))

    def read_state(self, text: str) -> Visit:
        """Read what came back from Google as `state`."""
        visit = _read(Visit, self._visits, text, LOGIN_SECONDS)
        return Visit(Request(**visit.request), visit.browser)  # type: ignore[arg-type]

    def google_secrets(self, state: str) -> tuple[str, str]:
        """Return the nonce and the code verifier that belong to a `state`.

        They come of the key that signed it, which is not the first any more when a secret is rotated meanwhile.
        """
        signing = (key for key in self._session_keys if _timed((key,), "state").loads_unsafe(state)[0])
        key = next(signing, self._session_keys[0])
        return _mark(key, "nonce", state), _mark(key, "verifier", state)

    def browser(self) -> str:
        """Make a cookie's value for a browser that has none."""
        return _text(self._browsers.dumps(secrets.token_urlsafe(16)))

    def knows_browser(self, cookie: str) -> bool:
        """Tell whether a cookie's value was made here, within a day."""
        try:
            _loaded(self._browsers, cookie, _BROWSER_SECONDS)
        except Unreadable:
            return False
        return True

    def csrf(self, browser: str, request: str) -> str:
        """Return the token of a form that a browser is shown for a request."""
        return _mark(self._session_keys[0], "csrf", browser, request)

    def is_csrf(self, token: str, browser: str, request: str) -> bool:
        """Tell in constant time whether a form's token is that of the browser and the request."""
        marks = [_mark(key, "csrf", browser, request) for key in self._session_keys]
        return any(hmac.compare_digest(token.encode(), mark.encode()) for mark in marks)

    def code(self, code: Code) -> str:
        """Sign an authorization code (RFC 6749, 4.1.2); it lives 60 seconds."""
        return _text(self._codes.dumps(asdict(code)))

    def read_code(self, text: str, lifetime_seconds: int = CODE_SECONDS) -> Code:
        """Read an authorization code; that it is used once is the caller's to see to."""
        return _read(Code, self._codes, text, lifetime_seconds)

    def refresh(self, refresh: Refresh) -> str:
        """Sign a refresh token; the state store knows when its family ends."""
        return _text(self._refreshes.dumps(asdict(refresh)))

    def read_refresh(self, text: str) -> Refresh:
        """Read a refresh token."""
        return _read(Refresh, self._refreshes, text)

    def access(self, grant: Refresh, audience: list[str]) -> str:
        """Make an access token of one hour (RFC 9068)."""
        now = int(time.time())
        claims = {
            "iss": self._issuer,
            "sub": grant.sub,
            "email": grant.email,
            "aud": audience,
            "client_id": grant.client_id,
            "scope": grant.scope,
            "iat": now,
            "exp": now + ACCESS_SECONDS,
            "jti": f"{grant.family}.{secrets.token_urlsafe(12)}",
        }
        return jwt.encode(claims, self._jwt_keys[0], "HS256", {"typ": "at+jwt"})

    def read_access(self, text: str, audience: list[str]) -> Access:
        """Verify an access token meant for one of the audience; it ends to the second."""
        for key in self._jwt_keys:
            try:
                return _access(text, key, self._issuer, audience)
            except (jwt.InvalidTokenError, TypeError, ValueError, RecursionError):
                continue
        raise Unreadable


_CLAIMS = ["iss", "sub", "email", "aud", "client_id", "scope", "iat", "exp", "jti"]


def _access(text: str, key: bytes, issuer: str, audience: list[str]) -> Access:
    token = jwt.decode_complete(
        text,
        key,
        algorithms=["HS256"],
        issuer=issuer,
        audience=audience,
        leeway=_REPLICA_SECONDS,
        options={"require": _CLAIMS},
    )
    claims = token["payload"]
    if token["header"].get("typ") != "at+jwt" or claims["exp"] <= time.time():
        raise Unreadable
    texts = [claims[name] for name in ("client_id", "scope", "sub", "email", "jti")]
    if not all(isinstance(value, str) for value in texts):
        raise Unreadable
    meant = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
    return Access(texts[0], meant, texts[1], texts[2], texts[3], texts[4], int(claims["exp"]))


def _mark(key: bytes, purpose: str, *of: str) -> str:
    """Return what only the key's holder can compute of the texts."""
    message = b"\0".join(hashlib.sha256(text.encode()).digest() for text in (purpose, *of))
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def new_id() -> str:
    """Return an identifier that nobody can guess, without a dot in it."""
    return secrets.token_urlsafe(16)


def family_of(jti: str) -> str:
    """Return the grant that an access token came of."""
    return jti.partition(".")[0]


def _ordered(keys: Keys) -> list[bytes]:
    return list(reversed(keys))  # itsdangerous signs with the last


def _timed(keys: Keys, salt: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(_ordered(keys), salt, signer_kwargs=_SIGNING)


def _text(signed: str | bytes) -> str:
    return signed if isinstance(signed, str) else signed.decode()


def _read(
    kind: type[T],
    serializer: URLSafeSerializer | URLSafeTimedSerializer,
    text: str,
    lifetime_seconds: int | None = None,
) -> T:
    try:
        return kind(**_loaded(serializer, text, lifetime_seconds))
    except TypeError:
        raise Unreadable from None


def _loaded(
    serializer: URLSafeSerializer | URLSafeTimedSerializer, text: str, lifetime_seconds: int | None = None
) -> Any:
    try:
        if isinstance(serializer, URLSafeTimedSerializer):
            return serializer.loads(text, max_age=lifetime_seconds)
        return serializer.loads(text)
    except (BadData, UnicodeEncodeError):
        raise Unreadable from None
