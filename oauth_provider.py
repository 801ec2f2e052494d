"""The authorization server: registration, consent, login at Google, codes and tokens (OAuth 2.1, RFC 9700).

The way of a login: `/authorize` checks the request and leads to `/consent`, where a person agrees to this application
in this browser; then to Google and back to `/google/callback`, which gives the application a code for `/token`.

- Nothing is kept between the steps: each carries what the last one found good, signed, and bound to the browser.
- Only S256 (RFC 7636), only registered redirect URIs, only resources of this server (RFC 8707); `iss` in every answer.
- Google's answer is taken once; what an application may do with its code is the matter of `oauth_grants`.

Borrowed from FastMCP 4.1.2, where a test looks whether it moved: AuthProvider and AccessToken here; in `oauth_clients`
the client ID metadata documents (a beta there), and the memory of used assertions, which is emptied. The base is not
its OAuthProvider, whose endpoints come from the MCP SDK: those refuse revocation by public clients, answer 401 where
RFC 6749 says 400, and know one resource; with endpoints of our own its methods for them would be there for nobody.
"""

import hashlib
import hmac
import string
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

from fastmcp.server.auth.auth import AccessToken, AuthProvider
from pydantic import AnyHttpUrl, ConfigDict, TypeAdapter
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from oauth_clients import (
    SCOPE,
    Client,
    Clients,
    ClientUnreachable,
    RegistrationError,
    UnknownClient,
    shown_host,
)
from oauth_google import Google, LoginError, ProviderDown
from oauth_grants import RESOURCES, Grants
from oauth_requests import (
    OAuthError,
    PageError,
    Parameters,
    answer,
    body,
    for_people,
    for_programs,
    form,
    media_type,
    query,
)
from oauth_state import State
from oauth_tokens import (
    LOGIN_SECONDS,
    Identity,
    Request,
    Tokens,
    Unreadable,
    Visit,
    new_id,
)
from pages import page
from settings_login import Login

_CHALLENGE_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_")
_MOST_STATE_CHARACTERS = 4096
_ANYWHERE = Middleware(
    CORSMiddleware,
    allow_origins=["*"],
    allow_methods=["GET", "POST"],
    allow_headers=["Authorization", "Content-Type", "MCP-Protocol-Version"],
    max_age=86_400,
)
_START_AGAIN = "Go back to your application and connect again; it takes a new login."


class Provider(AuthProvider):
    """The authorization server of one base URL. Used from one event loop."""

    def __init__(self, login: Login, state: State) -> None:
        bare = TypeAdapter(AnyHttpUrl, config=ConfigDict(url_preserve_empty_path=True))
        super().__init__(base_url=bare.validate_python(login.base_url))
        self._login = login
        self._state = state
        self._tokens = Tokens(login.base_url, login.jwt_keys, login.session_keys, login.code_keys)
        self._clients = Clients(self._tokens, state, f"{login.base_url}/token")
        self._google = Google(login)
        self._grants = Grants(login, state, self._tokens, self._clients)
        secure = login.base_url.startswith("https:")
        self._cookie = "__Host-ssh-mcp" if secure else "ssh-mcp"
        self._secure = secure

    # Tokens, as FastMCP asks for them

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return what a token grants, or None. Raises StateDown."""
        access = await self._grants.access(token)
        if access is None:
            return None
        return AccessToken(
            token=token,
            client_id=access.client_id,
            scopes=access.scope.split(),
            expires_at=access.expires_at,
            resource=access.audience[0] if len(access.audience) == 1 else None,
            subject=access.sub,
            claims={"sub": access.sub, "email": access.email, "aud": access.audience, "jti": access.jti},
        )

    async def stands(self, claims: Mapping[str, Any]) -> bool:
        """Tell whether a token that was verified has not been taken back since, expired or not. Raises StateDown."""
        return await self._grants.stands(claims["email"], claims["jti"])

    def opens(self, token: AccessToken, path: str) -> bool:
        """Tell whether a token was given for what stands at that path: `/sse` with `/messages/`, or `/mcp`."""
        resource = "/sse" if path.startswith("/messages") else path
        return f"{self._login.base_url}{resource}" in token.claims["aud"]

    def signed(self, text: str) -> bool:
        """Tell whether a code or a token was made here, whatever became of it."""
        return self._grants.signed(text)

    # Routes

    def get_routes(self, mcp_path: str | None = None) -> list[Route]:
        """Return all endpoints and documents."""
        return [
            _for_browsers_too("GET", "/.well-known/oauth-authorization-server", self._metadata),
            _for_browsers_too("GET", "/.well-known/openid-configuration", self._metadata),
            *(
                _for_browsers_too("GET", f"/.well-known/oauth-protected-resource{path}", self._resource)
                for path in ("", *RESOURCES)
            ),
            _for_browsers_too("POST", "/register", self._register),
            _for_browsers_too("POST", "/token", self._token),
            _for_browsers_too("POST", "/revoke", self._revoke),
            Route("/authorize", self._authorize, methods=["GET", "POST"]),
            Route("/consent", self._ask, methods=["GET"]),
            Route("/consent", self._decide, methods=["POST"]),
            Route("/google/callback", self._come_back, methods=["GET"]),
        ]

    async def _metadata(self, _: HTTPRequest) -> Response:
        """RFC 8414; the same document under OpenID's path, where some clients look first."""
        base = self._login.base_url
        return JSONResponse(
            {
                "issuer": base,
                "authorization_endpoint": f"{base}/authorize",
                "token_endpoint": f"{base}/token",
                "registration_endpoint": f"{base}/register",
                "revocation_endpoint": f"{base}/revoke",
                "scopes_supported": [SCOPE],
                "response_types_supported": ["code"],
                "response_modes_supported": ["query"],
                "grant_types_supported": ["authorization_code", "refresh_token"],
                "code_challenge_methods_supported": ["S256"],
                "token_endpoint_auth_methods_supported": ["none", "private_key_jwt"],
                "token_endpoint_auth_signing_alg_values_supported": ["RS256", "ES256"],
                "revocation_endpoint_auth_methods_supported": ["none", "private_key_jwt"],
                "revocation_endpoint_auth_signing_alg_values_supported": ["RS256", "ES256"],
                "authorization_response_iss_parameter_supported": True,
                "client_id_metadata_document_supported": True,
            }
        )

    async def _resource(self, request: HTTPRequest) -> Response:
        """RFC 9728."""
        path = request.url.path.removeprefix("/.well-known/oauth-protected-resource")
        return JSONResponse(
            {
                "resource": f"{self._login.base_url}{path}",
                "authorization_servers": [self._login.base_url],
                "scopes_supported": [SCOPE],
                "bearer_methods_supported": ["header"],
                "resource_name": "SSH MCP Server",
            }
        )

    @for_programs
    async def _register(self, request: HTTPRequest) -> Response:
        """RFC 7591."""
        if media_type(request) != "application/json":
            raise OAuthError("invalid_client_metadata", "the body must be application/json")
        try:
            return answer(self._clients.register(await body(request)), 201)
        except RegistrationError as error:
            raise OAuthError(error.code, str(error)) from None

    # The way of a login

    @for_people
    async def _authorize(self, request: HTTPRequest) -> Response:
        """RFC 6749, 4.1.1. Without any effect: clients open it before the browser does."""
        sent = query(request) if request.method == "GET" else await form(request)
        client, redirect_uri = await self._asking(sent)
        try:
            wanted = self._wanted(sent, client, redirect_uri)
        except OAuthError as error:
            url = self._answer_url(
                redirect_uri, sent.get("state"), error=error.code, error_description=str(error)
            )
            return (
                _redirect(url) if _is_own_machine(redirect_uri) else _offering(url, client.name, str(error))
            )
        return _redirect(
            f"{self._login.base_url}/consent?{urlencode({'request': self._tokens.request(wanted)})}"
        )

    async def _asking(self, sent: Parameters) -> tuple[Client, str]:
        """Return who asks and where the answer goes; until both are known a browser must not be sent anywhere."""
        try:
            client = await self._clients.find(sent.need("client_id"))
        except UnknownClient:
            raise PageError(
                "This application is not known here",
                "Its registration is not this server's, or its description could not be read.",
                "Remove the connection in the application and add it again; it registers anew.",
            ) from None
        except ClientUnreachable:
            raise PageError(
                "This application cannot be looked up",
                "It describes itself at an address that does not answer right now.",
                "Try again in a minute. If it goes on, the application's maker should know.",
                503,
            ) from None
        redirect_uri = client.redirect_uri(sent.get("redirect_uri"))
        if redirect_uri is None:
            raise PageError(
                "This link leads elsewhere",
                "It asks to send you to an address that the application did not register.",
                "Do not go on from here. Start again in the application itself.",
            )
        return client, redirect_uri

    def _wanted(self, sent: Parameters, client: Client, redirect_uri: str) -> Request:
        """Check the rest of the request. Raises OAuthError, which the application is told."""
        if sent.get("request") is not None:
            raise OAuthError("request_not_supported", "requests are not read from objects")
        if sent.get("request_uri") is not None:
            raise OAuthError("request_uri_not_supported", "requests are not fetched")
        if sent.need("response_type") != "code":
            raise OAuthError("unsupported_response_type", "the response type must be code")
        if sent.get("response_mode") not in (None, "query"):
            raise OAuthError("invalid_request", "the response mode must be query")
        if "none" in (sent.get("prompt") or "").split():
            raise OAuthError("interaction_required", "a person has to agree")
        if len(sent.get("state") or "") > _MOST_STATE_CHARACTERS:
            raise OAuthError("invalid_request", f"state is longer than {_MOST_STATE_CHARACTERS} characters")
        challenge = sent.need("code_challenge")
        if sent.get("code_challenge_method") != "S256":
            raise OAuthError("invalid_request", "the code challenge method must be S256")
        if len(challenge) != 43 or not _CHALLENGE_CHARACTERS.issuperset(challenge):
            raise OAuthError("invalid_request", "the code challenge is no S256 challenge")
        return Request(
            new_id(),
            client.id,
            client.name,
            client.host,
            redirect_uri,
            challenge,
            sent.get("state"),
            self._grants.named(sent.resources) or self._grants.resources,
            SCOPE,
        )

    @for_people
    async def _ask(self, request: HTTPRequest) -> Response:
        """Ask the person whether this application may have access; the browser gets its cookie here."""
        signed = query(request).need("request")
        wanted = self._read_request(signed)
        browser = self._browser(request) or self._tokens.browser()
        shown = page(
            "consent",
            client_name=wanted.client_name,
            client_uri_host=wanted.client_host,
            redirect_host=shown_host(wanted.redirect_uri),
            resources=wanted.resources,
            provider=self._login.provider,
            fields={"request": signed, "csrf": self._tokens.csrf(browser, signed)},
        )
        shown.set_cookie(self._cookie, browser, secure=self._secure, httponly=True, samesite="lax")
        return shown

    @for_people
    async def _decide(self, request: HTTPRequest) -> Response:
        """Take the person's decision from the page that was shown in this browser."""
        self._must_be_ours(request)
        sent = await form(request)
        signed, browser = sent.need("request"), self._browser(request)
        wanted = self._read_request(signed)
        if browser is None or not self._tokens.is_csrf(sent.need("csrf"), browser, signed):
            raise PageError(
                "This page belongs to another browser",
                "Approval has to come from the page that this browser was shown.",
                _START_AGAIN,
                403,
            )
        decision = sent.get("decision")
        if decision == "deny":
            return _leaving(self._answer_url(wanted.redirect_uri, wanted.state, error="access_denied"))
        if decision != "approve":
            raise OAuthError("invalid_request", "the decision must be approve or deny")
        state = self._tokens.state(Visit(wanted, _digest(browser)))
        try:
            url = await self._google.leave_url(state, *self._tokens.google_secrets(state))
        except ProviderDown:
            raise _PROVIDER_DOWN from None
        return _leaving(url)

    @for_people
    async def _come_back(self, request: HTTPRequest) -> Response:
        """Take Google's answer, and give the application its code if the person may enter."""
        sent = query(request)
        state = sent.need("state")
        wanted = self._visited(state, request)
        await self._must_be_from_google(sent.get("iss"))
        if not await self._state.claim(f"state:{_digest(state)}", LOGIN_SECONDS):
            raise PageError("This login is used up", "Its answer was taken already.", _START_AGAIN)
        if sent.get("error") is not None:
            code = "access_denied" if sent.get("error") == "access_denied" else "server_error"
            return self._sent_back(wanted.redirect_uri, wanted.state, error=code)
        identity = await self._identity(sent.need("code"), state)
        if not self._grants.may_enter(identity.email):
            return page(
                "refused",
                403,
                email=identity.email,
                client_name=wanted.client_name,
                provider=self._login.provider,
                leave_url=self._answer_url(wanted.redirect_uri, wanted.state, error="access_denied"),
            )
        return self._sent_back(
            wanted.redirect_uri, wanted.state, code=await self._grants.code(wanted, identity)
        )

    def _read_request(self, signed: str) -> Request:
        try:
            return self._tokens.read_request(signed)
        except Unreadable:
            raise _EXPIRED from None

    def _browser(self, request: HTTPRequest) -> str | None:
        """Return our cookie, its name read byte for byte.

        Starlette's parser strips more than browsers do: a neighbour's `\\xa0__Host-...` would count as ours.
        """
        name = f"{self._cookie}=".encode()
        pairs = [
            pair.strip(b" \t")
            for header, value in request.scope["headers"]
            if header == b"cookie"
            for pair in value.split(b";")
        ]
        ours = [pair.removeprefix(name).decode("latin-1") for pair in pairs if pair.startswith(name)]
        return ours[0] if len(ours) == 1 and self._tokens.knows_browser(ours[0]) else None

    def _must_be_ours(self, request: HTTPRequest) -> None:
        origin = request.headers.get("origin", self._login.base_url)
        site = request.headers.get("sec-fetch-site", "same-origin")
        if origin != self._login.base_url or site != "same-origin":
            raise PageError(
                "This came from another page",
                "Approval has to come from this server's page.",
                _START_AGAIN,
                403,
            )

    def _visited(self, state: str, request: HTTPRequest) -> Request:
        try:
            visit = self._tokens.read_state(state)
        except Unreadable:
            raise _EXPIRED from None
        browser = self._browser(request)
        if browser is None or not hmac.compare_digest(_digest(browser), visit.browser):
            raise PageError(
                "This login was begun elsewhere",
                "It was approved in another browser, or this one keeps no cookies.",
                "If you did not begin it, close this page. Otherwise connect again and stay in one browser.",
                403,
            )
        return visit.request

    async def _must_be_from_google(self, issuer: str | None) -> None:
        """RFC 9207, 2.4: an answer that names its issuer must name the one that was asked."""
        try:
            if issuer is not None and issuer != await self._google.issuer():
                raise PageError("This answer is a stranger's", "It names another sender.", _START_AGAIN)
        except ProviderDown:
            raise _PROVIDER_DOWN from None

    async def _identity(self, code: str, state: str) -> Identity:
        try:
            return await self._google.identity(code, *self._tokens.google_secrets(state))
        except ProviderDown:
            raise _PROVIDER_DOWN from None
        except LoginError as error:
            raise PageError("You are not logged in", str(error), _START_AGAIN, 403) from None

    def _answer_url(self, redirect_uri: str, state: str | None, **values: str) -> str:
        """Return where the application gets its answer (RFC 6749, 4.1.2; RFC 9207)."""
        given = values | ({} if state is None else {"state": state}) | {"iss": self._login.base_url}
        return f"{redirect_uri}{'&' if '?' in redirect_uri else '?'}{urlencode(given)}"

    def _sent_back(self, redirect_uri: str, state: str | None, **values: str) -> Response:
        return _redirect(self._answer_url(redirect_uri, state, **values))

    # Tokens, as applications ask for them

    @for_programs
    async def _token(self, request: HTTPRequest) -> Response:
        return answer(await self._grants.exchange(request))

    @for_programs
    async def _revoke(self, request: HTTPRequest) -> Response:
        await self._grants.revoke(request)
        return answer({})


_EXPIRED = PageError(
    "This page has expired",
    "The request is older than 10 minutes, or was changed on its way.",
    _START_AGAIN,
)
_PROVIDER_DOWN = PageError(
    "The login service does not answer",
    "The login could not be completed because the service that tells who you are cannot be reached from this server.",
    "Try again in a minute from your application.",
    503,
)


def _for_browsers_too(
    method: str, path: str, endpoint: Callable[[HTTPRequest], Awaitable[Response]]
) -> Route:
    """Return a route that applications inside a browser may ask from any origin (CORS)."""
    return Route(path, endpoint, methods=[method, "OPTIONS"], middleware=[_ANYWHERE])


def _redirect(url: str) -> Response:
    return RedirectResponse(url, 302, {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})


def _leaving(url: str) -> Response:
    """Leave by a page: browsers apply the form's policy to every redirect that follows a form."""
    return page("leaving", url=url, host=shown_host(url))


def _is_own_machine(redirect_uri: str) -> bool:
    return urlsplit(redirect_uri).scheme == "http"  # which is registered for loopback alone


def _offering(url: str, client_name: str, reason: str) -> Response:
    """Leave the way back to the person: anybody may register an address, so none is trusted (RFC 9700, 4.11.2)."""
    return page("faulty", 400, url=url, host=shown_host(url), client_name=client_name, reason=reason)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
