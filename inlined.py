"""Marks the parts of a tool's schema that stand where they are used.

Pydantic would refer to them by `$ref`, which some clients do not follow, and FastMCP takes 0.1 s of a start to import
what replaces those.
"""

from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema


class Inlined:
    """Annotates a model that is used in another one, or in a parameter; it must not contain itself."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema itself instead of a reference to it."""
        return handler.resolve_ref_schema(handler(core))
