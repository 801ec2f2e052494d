"""FastMCP as this product serves it: over stdio as it is, over HTTP with both transports behind the login.

Whether HTTP is served is known only once it is asked for, so its settings are demanded there and not before.
"""

import inspect
import os
import warnings
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread
import fastmcp
from fastmcp import FastMCP
from fastmcp.server.auth import AccessToken
from fastmcp.utilities.logging import temporary_log_level
from mcp import MCPDeprecationWarning
from mcp.server.request_state import AESGCMRequestStateCodec, RequestStateSecurity

import settings
import settings_login
from confirm import Answers
from schemas import without_docstring
from settings import SettingsError
from settings_login import Members

if TYPE_CHECKING:
    from fastmcp.server.http import StarletteWithLifespan

    from shared_counts import SharedRate

# Log messages still reach clients that ask for them; that their successor is OpenTelemetry helps no operator
warnings.filterwarnings("ignore", "The logging capability", MCPDeprecationWarning)

_MOST_FILES = 65_536

F = TypeVar("F", bound=Callable[..., Any])

_UVICORN: dict[str, Any] = {
    "proxy_headers": False,  # the application knows which proxies to believe
    "access_log": False,  # it would hold codes, and goes to stdout
    "log_config": None,
    "server_header": False,
    "lifespan": "on",
    "ws": "none",
    "backlog": 512,  # asyncio tries that often, and logs as often, to accept what it has no descriptor for
}


def _local_key() -> str:
    from ssh_jobs import local_key  # with Paramiko below it, which no list of tools needs

    return local_key()


async def _always(_: AccessToken) -> bool:
    return True


class _Sealing:
    """Seals what clients carry from one call to the next; replicas can read it that share a key."""

    def __init__(self) -> None:
        self.use([os.urandom(32)])

    def use(self, keys: Sequence[bytes]) -> None:
        """Seal with the first key from now on, and open with all of them."""
        self._codec = AESGCMRequestStateCodec(list(dict.fromkeys(keys)))

    def seal(self, payload: bytes) -> str:
        return self._codec.seal(payload)

    def unseal(self, token: str) -> bytes:
        """Raise InvalidRequestState for what was not sealed by any of the keys."""
        return self._codec.unseal(token)


class Server(FastMCP[None]):
    """FastMCP, whose HTTP transports are one application behind the login."""

    members: Members | None = None
    """Whose job ids and tasks these are; None: the local user's."""
    shared_rate: "SharedRate | None" = None
    """Counts calls with other replicas, if there may be any."""
    runs_tasks: bool = True
    """Whether tasks run here too, and not only in workers."""
    in_force: Callable[[AccessToken], Awaitable[bool]] = staticmethod(_always)
    """Tells whether a login was not taken back, as far as is known: yes when nobody knows."""
    stands: Callable[[AccessToken], Awaitable[bool]] = staticmethod(_always)
    """Tells the same, and raises when nobody knows."""
    is_first: Callable[[str], Awaitable[bool | None]]
    """Tells whether a person's answer was not used before, at any replica; None when nobody knows."""
    _listens_on: str | None = None

    def __init__(self, report: Callable[[], dict[str, Any]], **options: Any) -> None:
        """Make it; `report` is what holders of a token are told of the default target, and may block."""
        self._sealing = _Sealing()
        super().__init__(request_state_security=RequestStateSecurity(codec=self._sealing), **options)
        self._report = report
        self.is_first = Answers().is_first

    def job_key(self) -> str | Sequence[bytes]:
        """Return what signs job ids. Raises SSHError when the local user's key cannot be used."""
        return _local_key() if self.members is None else self.members.session_keys[::-1]  # the last signs

    def tool(self, **options: Any) -> Callable[[F], F]:  # type: ignore[override]
        """Return a decorator that registers a tool, whose whole docstring is its description."""

        def register(function: F) -> F:
            described = {"description": inspect.getdoc(function)} | options
            with without_docstring(function):
                super(Server, self).tool(**described)(function)
            return function

        return register

    async def run_http_async(self, *_: Any, **kwargs: Any) -> None:
        """Serve over HTTP until told to stop; a setting that cannot be used ends the process before it listens.

        FastMCP's own (4.1.2) serves no subclass of uvicorn's server, and nothing else ends without a lost call.
        """
        host = kwargs.get("host") or fastmcp.settings.host
        port = kwargs.get("port") or fastmcp.settings.port
        self._listens_on = settings_login.http_url(host, port)
        import uvicorn

        from http_deadline import PunctualProtocol
        from http_drain import GRACE_SECONDS, DrainingServer

        _allow_many_connections()
        options = _UVICORN | {"http": PunctualProtocol, "timeout_graceful_shutdown": GRACE_SECONDS}
        options |= kwargs.get("uvicorn_config") or {}
        with temporary_log_level(kwargs.get("log_level")):
            try:
                app = self.http_app(**kwargs)
                async with self._lifespan_manager():
                    config = uvicorn.Config(app, host=host, port=port, **options)
                    await DrainingServer(config, app.state.stopping).serve(kwargs.get("sockets"))
            except SettingsError as error:
                settings.exit_for(error)

    def http_app(self, *args: Any, **kwargs: Any) -> "StarletteWithLifespan":
        """Return the application that serves both HTTP transports. Raises SettingsError without a complete login."""
        import http_server  # what only HTTP needs takes a second to import
        import oauth_state

        current = settings.load()
        login = settings_login.login(current, self._listens_on)
        self.members = login.members
        self._sealing.use(login.session_keys)
        served = http_server.http_app(
            self,
            login,
            current.forwarded_allow_ips,
            lambda: anyio.to_thread.run_sync(self._report),
            json_response=bool(kwargs.get("json_response")),
            stateless=any(map(kwargs.get, ("stateless_http", "stateless")))
            or fastmcp.settings.stateless_http,
        )
        self.in_force, self.stands = served.state.in_force, served.state.stands
        self.is_first = served.state.is_first
        if current.rate_limit is not None and oauth_state.file_of(login.state_url) is None:
            from shared_counts import SharedRate

            self.shared_rate = SharedRate(current.rate_limit, login.state_url, login.session_keys[-1])
        return served


def _allow_many_connections() -> None:
    """Raise the soft limit of file descriptors, usually 1024: each stream holds one, and each message another."""
    if os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
