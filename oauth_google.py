"""The login at Google, or at another OpenID provider: there with a challenge and a nonce, back with an identity.

- What the provider says is believed only as an ID token under one of its published keys, for us, from it, now, and
  with the nonce of this login (OpenID Connect Core, 3.1.3.7). Only public-key signatures are read.
- An address counts only if the provider verified it.
- Nothing of a login is kept here; documents and keys are fetched again after an hour, keys also when one is unknown.
"""

import hmac
import logging
import time
from typing import Any
from urllib.parse import urlsplit

import httpx2
import jwt
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.httpx_client import AsyncOAuth2Client

from oauth_tokens import Identity
from settings_login import Login
from settings_values import is_loopback

_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_KEEP_SECONDS = 3600
_TIMEOUT_SECONDS = 10
_CLOCK_SECONDS = 60
_MOST_CLAIM_CHARACTERS = 320

_log = logging.getLogger("ssh_mcp_server")


class LoginError(Exception):
    """The provider's answer proves nobody's identity; `str()` is a sentence for the person."""


class ProviderDown(Exception):  # noqa: N818
    """The provider cannot be asked right now."""


class Google:
    """The provider that GOOGLE_DISCOVERY_URL describes. Used from one event loop."""

    def __init__(self, login: Login) -> None:
        self._login = login
        self._document: dict[str, Any] = {}
        self._keys: list[jwt.PyJWK] = []
        self._fetched = 0.0

    async def leave_url(self, state: str, nonce: str, verifier: str) -> str:
        """Return where the browser has to go to log in. Raises ProviderDown."""
        document = await self._described()
        async with self._client() as client:
            url, _ = client.create_authorization_url(
                document["authorization_endpoint"],
                state=state,
                nonce=nonce,
                code_verifier=verifier,
                prompt="select_account",
            )
        return str(url)

    async def issuer(self) -> str:
        """Return the provider's name for itself. Raises ProviderDown."""
        return str((await self._described())["issuer"])

    async def identity(self, code: str, nonce: str, verifier: str) -> Identity:
        """Exchange the provider's code and return who logged in. Raises LoginError or ProviderDown."""
        document = await self._described()
        try:
            async with self._client() as client:
                answer = await client.fetch_token(
                    document["token_endpoint"], code=code, code_verifier=verifier
                )
        except httpx2.HTTPError as error:
            raise _down(error) from error
        except (AuthlibBaseError, ValueError, RecursionError) as error:
            _log.warning("the login provider refused a code: %s", getattr(error, "error", "no JSON"))
            raise LoginError("The login was not confirmed. Start it again from your application.") from None
        claims = await self._claims(answer.get("id_token"), nonce)
        return _identity(claims)

    async def _claims(self, id_token: object, nonce: str) -> dict[str, Any]:
        document = await self._described()
        try:
            claims: dict[str, Any] = jwt.decode(
                str(id_token),
                await self._key(str(id_token)),
                algorithms=_ALGORITHMS,
                issuer=str(document["issuer"]),
                audience=self._login.google_client_id,
                leeway=_CLOCK_SECONDS,
                options={"require": ["iss", "sub", "aud", "exp", "iat", "nonce"]},
            )
        except (jwt.PyJWTError, TypeError, ValueError, RecursionError):
            raise LoginError(
                "The login could not be verified. Start it again from your application."
            ) from None
        several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
        party = claims.get("azp", None if several else self._login.google_client_id)
        ours = hmac.compare_digest(str(claims["nonce"]).encode("utf-8", "replace"), nonce.encode())
        if party != self._login.google_client_id or not ours:
            raise LoginError("The login belongs to another request. Start it again from your application.")
        return claims

    async def _key(self, id_token: str) -> jwt.PyJWK:
        header = jwt.get_unverified_header(id_token)
        for forced in (False, True):
            if forced:
                self._fetched = 0.0
                await self._described()
            fitting = [key for key in self._keys if key.key_id == header.get("kid")]
            if not fitting and header.get("kid") is None and len(self._keys) == 1:
                fitting = self._keys
            if fitting:
                return fitting[0]
        raise jwt.InvalidKeyError("no key of the provider has that name")

    async def _described(self) -> dict[str, Any]:
        if self._document and 0 <= time.monotonic() - self._fetched < _KEEP_SECONDS and self._fetched:
            return self._document
        try:
            async with httpx2.AsyncClient(timeout=_TIMEOUT_SECONDS) as http:
                document = await _fetched(http, self._login.discovery_url)
                _check(document, self._login.discovery_url)
                keys = await _fetched(http, document["jwks_uri"])
            self._keys = jwt.PyJWKSet.from_dict(keys).keys
        except (
            httpx2.HTTPError,
            httpx2.InvalidURL,
            KeyError,
            TypeError,
            ValueError,
            RecursionError,
            jwt.PyJWTError,
        ) as error:
            raise _down(error) from error
        self._document, self._fetched = document, time.monotonic()
        return document

    def _client(self) -> AsyncOAuth2Client:
        return AsyncOAuth2Client(
            self._login.google_client_id,
            self._login.google_client_secret.get_secret_value(),
            scope="openid email",
            redirect_uri=f"{self._login.base_url}/google/callback",
            code_challenge_method="S256",
            timeout=_TIMEOUT_SECONDS,
        )


def _down(error: Exception) -> ProviderDown:
    """Say it to the operator, without what was sent."""
    reason = f"status {error.response.status_code}" if isinstance(error, httpx2.HTTPStatusError) else error
    _log.error(
        "the login provider (GOOGLE_DISCOVERY_URL) cannot be asked: %s %s", type(error).__name__, reason
    )
    return ProviderDown("the login provider cannot be asked")


def _identity(claims: dict[str, Any]) -> Identity:
    sub, email = claims["sub"], claims.get("email")
    if (
        not isinstance(sub, str)
        or not sub
        or not isinstance(email, str)
        or len(sub + email) > _MOST_CLAIM_CHARACTERS
    ):
        raise LoginError("The account has no e-mail address that could be checked. Use another account.")
    if claims.get("email_verified") is not True:
        raise LoginError("The account's e-mail address is not verified. Verify it, or use another account.")
    return Identity(sub, email)


async def _fetched(http: httpx2.AsyncClient, url: str) -> dict[str, Any]:
    response = await http.get(url)
    response.raise_for_status()
    document = response.json()
    if not isinstance(document, dict):
        raise TypeError("no JSON object")
    return document


def _check(document: dict[str, Any], discovery_url: str) -> None:
    """Check that the document is of that issuer and leads nowhere unprotected (OpenID Connect Discovery, 4.3)."""
    names = ("issuer", "authorization_endpoint", "token_endpoint", "jwks_uri")
    if not all(isinstance(document[name], str) for name in names):
        raise TypeError("a URL in the document is none")
    if f"{document['issuer'].removesuffix('/')}/.well-known/openid-configuration" != discovery_url:
        raise ValueError("the document is another issuer's")
    for name in names[1:]:
        parts = urlsplit(document[name])
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname)):
            raise ValueError(f"{name} is not protected")
