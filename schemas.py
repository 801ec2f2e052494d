"""Schemas and descriptions of tools and prompts, without what is slow to import.

FastMCP takes 0.1 s of a start to import what replaces references in schemas, and as long for what finds sections in
docstrings. Here are none: parameters are described beside their types, and a whole docstring is a description.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema


class Inlined:
    """Annotates a model that is used in another one, or in a parameter; it must not contain itself.

    Its schema then stands where it is used. Pydantic would refer to it by `$ref`, which some clients do not follow.
    """

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema itself instead of a reference to it."""
        return handler.resolve_ref_schema(handler(core))


@contextmanager
def without_docstring(function: Callable[..., Any]) -> Iterator[None]:
    """Take the docstring of a function, or of a method's, away meanwhile."""
    function = getattr(function, "__func__", function)
    docstring, function.__doc__ = function.__doc__, None
    try:
        yield
    finally:
        function.__doc__ = docstring
