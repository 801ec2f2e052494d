"""What a login gives an application: a code, and for it tokens, which are renewed, checked and revoked.

- A code works once (RFC 6749, 4.1.2), and only if the store knows it. Whoever shows it again, for whatever client,
  with or without the verifier, in time or late, ends what it gave: it has leaked.
- A refresh token works once (RFC 9700, 4.14.2); the state store knows which of a family is the current one.
- Whoever left the whitelist has no working token. A store that cannot be asked grants nothing.

Errors are OAuthError, with the RFC's code, and StateDown.
"""

import base64
import hashlib
import hmac
import string
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from starlette.requests import Request as HTTPRequest

from oauth_clients import Clients, ClientUnreachable, UnknownClient
from oauth_requests import OAuthError, Parameters, form
from oauth_state import State
from oauth_tokens import (
    ACCESS_SECONDS,
    REFRESH_SECONDS,
    Access,
    Code,
    Identity,
    Refresh,
    Request,
    Tokens,
    Unreadable,
    family_of,
    new_id,
)
from settings_login import Login

RESOURCES = ("/sse", "/mcp")

_REDEEM_SECONDS = 180  # three times a code's life: the clocks of replicas differ
_VERIFIER_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-._~")


class Standing:
    """Tells whether a login that was verified, here or by another server, still counts. Used from one event loop."""

    def __init__(self, allowed_emails: Collection[str], state: State) -> None:
        self._allowed_emails = allowed_emails
        self._state = state

    def may_enter(self, email: str) -> bool:
        """Tell whether an address is on the whitelist; letters of other alphabets fold to ASCII, so none is taken."""
        return email.isascii() and email.lower() in self._allowed_emails

    async def stands(self, email: str, jti: str) -> bool:
        """Tell whether an access token was not taken back, and its owner may still enter. Raises StateDown."""
        return self.may_enter(email) and await self._state.alive(family_of(jti), jti)


class Grants(Standing):
    """Gives and takes back. Used from one event loop."""

    def __init__(self, login: Login, state: State, tokens: Tokens, clients: Clients) -> None:
        super().__init__(login.allowed_emails, state)
        self._login = login
        self._tokens = tokens
        self._clients = clients
        self.resources = [f"{login.base_url}{path}" for path in RESOURCES]

    def named(self, resources: list[str]) -> list[str]:
        """Return the resources that are meant; the bare origin is all of them (RFC 8707, 2). Raises OAuthError."""
        if not {*self.resources, self._login.base_url, f"{self._login.base_url}/"}.issuperset(resources):
            raise OAuthError("invalid_target", f"the resources here are {' and '.join(self.resources)}")
        if set(resources) - set(self.resources):
            return self.resources
        return [resource for resource in self.resources if resource in resources]

    async def code(self, wanted: Request, who: Identity) -> str:
        """Return the code that answers a request, for the person who agreed to it. Raises StateDown."""
        family = new_id()
        await self._state.open_family(family, _REDEEM_SECONDS)
        return self._tokens.code(
            Code(
                family,
                wanted.client_id,
                wanted.redirect_uri,
                wanted.challenge,
                wanted.resources,
                wanted.scope,
                who.sub,
                who.email.lower(),
            )
        )

    async def access(self, token: str) -> Access | None:
        """Return what an access token says, or None when it opens nothing."""
        try:
            access = self._tokens.read_access(token, self.resources)
        except Unreadable:
            return None
        return access if await self.stands(access.email, access.jti) else None

    def signed(self, text: str) -> bool:
        """Tell whether a code or a token was made here, whatever became of it since."""
        readers: tuple[Callable[[], object], ...] = (
            lambda: self._tokens.read_code(text, REFRESH_SECONDS),
            lambda: self._tokens.read_refresh(text),
            lambda: self._tokens.read_access(text, self.resources),
        )
        for read in readers:
            with suppress(Unreadable):
                read()
                return True
        return False

    async def exchange(self, request: HTTPRequest) -> dict[str, Any]:
        """Return tokens for a code or a refresh token (RFC 6749, 4.1.3 and 6)."""
        sent = await form(request)
        client_id = await self._authenticated(request, sent)
        grant_type = sent.need("grant_type")
        if grant_type == "authorization_code":
            grant = await self._redeemed(sent, client_id)
        elif grant_type == "refresh_token":
            grant = await self._rotated(sent, client_id)
        else:
            raise OAuthError("unsupported_grant_type", "codes and refresh tokens are what is taken here")
        return {
            "access_token": self._tokens.access(grant, self._audience(sent, grant)),
            "token_type": "Bearer",
            "expires_in": ACCESS_SECONDS,
            "refresh_token": self._tokens.refresh(grant),
            "scope": grant.scope,
        }

    async def revoke(self, request: HTTPRequest) -> None:
        """Take a token back (RFC 7009): a refresh token with its family, an access token alone.

        What is not valid, or not any more, needs no revoking.
        """
        sent = await form(request)
        client_id = await self._authenticated(request, sent)
        token = sent.need("token")
        with suppress(Unreadable):
            refresh = self._tokens.read_refresh(token)
            _must_own(refresh.client_id, client_id)
            await self._state.end_family(refresh.family)
        with suppress(Unreadable):
            access = self._tokens.read_access(token, self.resources)
            _must_own(access.client_id, client_id)
            await self._state.revoke(access.family, access.jti)

    async def _authenticated(self, request: HTTPRequest, sent: Parameters) -> str:
        """Return the client id of who asks. Raises OAuthError `invalid_client`."""
        client_id = sent.get("client_id")
        if client_id is None or "authorization" in request.headers or sent.get("client_secret") is not None:
            raise OAuthError("invalid_client", "clients here have no secret: send client_id alone", 401)
        try:
            client = await self._clients.find(client_id)
        except UnknownClient:
            raise OAuthError(
                "invalid_client", "this client id is not known here; register again", 401
            ) from None
        except ClientUnreachable:
            raise OAuthError(
                "temporarily_unavailable", "the client's own document cannot be fetched now; try later", 503
            ) from None
        shown = sent.get("client_assertion_type"), sent.get("client_assertion")
        if not await self._clients.proves_itself(client, *shown):
            raise OAuthError("invalid_client", "the client's assertion does not prove who it is", 401)
        return client.id

    async def _redeemed(self, sent: Parameters, client_id: str) -> Refresh:
        """Return the grant of a code, whose first use this must be."""
        code = await self._first_use(sent.need("code"))
        if not _same(code.client_id, client_id):
            raise OAuthError("invalid_grant", "the code was given to another client")
        if sent.get("redirect_uri") not in (None, code.redirect_uri):
            raise OAuthError("invalid_grant", "the code was given for another redirect URI")
        if not _answers(sent.need("code_verifier"), code.challenge):
            raise OAuthError("invalid_grant", "the code verifier does not answer the challenge")
        self._must_enter(code.email)
        self._audience(sent, code)
        return Refresh(code.family, 1, client_id, code.resources, code.scope, code.sub, code.email)

    async def _first_use(self, text: str) -> Code:
        try:
            code = self._tokens.read_code(text)
        except Unreadable:
            await self._end_late(text)
            raise OAuthError("invalid_grant", "the code is not valid, or 60 seconds have passed") from None
        if not await self._state.redeem(code.family, REFRESH_SECONDS):
            raise OAuthError("invalid_grant", "the code was used before; what it gave is revoked")
        return code

    async def _end_late(self, text: str) -> None:
        """End what an expired code may have given while it was good; if it was never used, there is nothing to end."""
        try:
            code = self._tokens.read_code(text, REFRESH_SECONDS)
        except Unreadable:
            return
        await self._state.end_family(code.family)

    async def _rotated(self, sent: Parameters, client_id: str) -> Refresh:
        """Return the grant of a refresh token, one generation on."""
        try:
            old = self._tokens.read_refresh(sent.need("refresh_token"))
        except Unreadable:
            raise OAuthError("invalid_grant", "the refresh token is not valid") from None
        if not _same(old.client_id, client_id):
            raise OAuthError("invalid_grant", "the refresh token was given to another client")
        self._must_enter(old.email)
        self._audience(sent, old)
        generation = await self._state.rotate(old.family, old.generation)
        if generation is None:
            raise OAuthError("invalid_grant", "the grant has ended; log in again")
        return Refresh(old.family, generation, client_id, old.resources, old.scope, old.sub, old.email)

    def _must_enter(self, email: str) -> None:
        if not self.may_enter(email):
            raise OAuthError("invalid_grant", "this account may no longer come in")

    def _audience(self, sent: Parameters, grant: Code | Refresh) -> list[str]:
        """Return whom an access token is for: what is asked, of what was granted (RFC 8707, 2.2)."""
        granted = [resource for resource in self.resources if resource in grant.resources]
        if not sent.resources:
            return granted
        asked = self.named(sent.resources)
        whole = set(sent.resources) - set(self.resources)
        if not whole and not set(granted).issuperset(asked):
            raise OAuthError("invalid_target", "access to that resource was not granted")
        return [resource for resource in granted if resource in asked]


def _must_own(owner: str, client_id: str) -> None:
    if not _same(owner, client_id):
        raise OAuthError("invalid_grant", "the token was given to another client")


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _answers(verifier: str, challenge: str) -> bool:
    """RFC 7636, 4.6."""
    if not 43 <= len(verifier) <= 128 or not _VERIFIER_CHARACTERS.issuperset(verifier):
        return False
    digest = hashlib.sha256(verifier.encode()).digest()
    return _same(base64.urlsafe_b64encode(digest).rstrip(b"=").decode(), challenge)
