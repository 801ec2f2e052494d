"""The view of a system report: what clients that know MCP Apps (SEP-1865) show beside its text.

A page of its own, which the client runs in a sandbox and hands the report to. It may load nothing and connect to
nothing: what it shows beside the report, the client asks this server for. Other clients do not see it among the
resources.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmcp import FastMCP
from fastmcp.apps.config import UI_EXTENSION_ID, AppConfig, ResourceCSP
from fastmcp.resources import Resource
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext

_URI = "ui://ssh-mcp-server/system.html"
_PAGE = Path(__file__).resolve().parent / "templates" / "system_view.html"
_NOTHING_FROM_ELSEWHERE = ResourceCSP(connect_domains=[], resource_domains=[])

SHOWN_BY = AppConfig(resource_uri=_URI)
"""What the tool says of the view. Clients that do not know it pass it over."""


class ListedWhereKnown(Middleware):
    """Leave the view out of the list of resources for clients that do not say that they know MCP Apps."""

    async def on_list_resources(
        self, context: MiddlewareContext[Any], call_next: CallNext[Any, Sequence[Resource]]
    ) -> Sequence[Resource]:
        resources = await call_next(context)
        told = context.fastmcp_context
        if told is not None and told.client_supports_extension(UI_EXTENSION_ID):
            return resources
        return [resource for resource in resources if str(resource.uri) != _URI]


def add_to(mcp: FastMCP[None]) -> None:
    """Offer the view."""
    app = AppConfig(csp=_NOTHING_FROM_ELSEWHERE, prefers_border=True)
    mcp.resource(_URI, title="System report", app=app)(system_view)


def system_view() -> str:
    """Show a system report, with what is nearly full, and your jobs."""
    return _PAGE.read_text(encoding="utf-8")
