"""`server.json`, the server's description for MCP registries, against the registry's rules.

`SCHEMA` says what the registry's own schema, at `SOURCE`, says of the parts that we use, and is stricter: a field that
it does not name is an error, where the registry would drop it in silence.
"""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from settings import Settings, __version__, is_secret

SOURCE = "https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json"
ROOT = Path(__file__).parents[1]
DESCRIPTION: dict[str, Any] = json.loads((ROOT / "server.json").read_text())
(PACKAGE,) = DESCRIPTION["packages"]
VARIABLES: list[dict[str, Any]] = PACKAGE["environmentVariables"]


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has these properties and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
FLAG = {"type": "boolean"}
INPUT = {
    "description": TEXT,
    "isRequired": FLAG,
    "isSecret": FLAG,
    "format": {"enum": ["string", "number", "boolean", "filepath"]},
    "default": TEXT,
    "placeholder": TEXT,
    "choices": {"type": "array", "items": TEXT},
}
REMOTE = closed(
    "type",
    "url",
    type={"enum": ["streamable-http", "sse"]},
    url=TEXT,
    variables={"type": "object", "additionalProperties": closed(**INPUT)},
)
LOCAL = closed(
    "registryType",
    "identifier",
    "transport",
    registryType={"enum": ["npm", "pypi", "oci", "nuget", "mcpb"]},
    identifier=TEXT,
    version={"type": "string", "minLength": 1, "not": {"const": "latest"}},
    fileSha256={"type": "string", "pattern": "^[a-f0-9]{64}$"},
    transport=closed("type", type={"const": "stdio"}),
    environmentVariables={"type": "array", "items": closed("name", name=TEXT, **INPUT)},
)
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    **closed(
        "$schema",
        "name",
        "description",
        "version",
        **{
            "$schema": {"const": SOURCE},
            "name": {
                "type": "string",
                "minLength": 3,
                "maxLength": 200,
                "pattern": "^[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+$",
            },
            "title": {"type": "string", "minLength": 1, "maxLength": 100},
            "description": {"type": "string", "minLength": 1, "maxLength": 100},
            "version": {"type": "string", "maxLength": 255},
            "packages": {"type": "array", "items": LOCAL},
            "remotes": {"type": "array", "items": REMOTE},
        },
    ),
}


def check(description: object) -> None:
    jsonschema.validate(description, SCHEMA, cls=jsonschema.Draft7Validator)


def test_description_is_what_a_registry_takes() -> None:
    check(DESCRIPTION)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "ssh-mcp-server"},
        {"description": "x" * 101},
        {"version": None},
        {"remotes": [{"type": "streamable-http"}]},
        {"packages": [PACKAGE | {"version": "latest"}]},
        {"packages": [PACKAGE | {"registry_type": "mcpb"}]},
    ],
)
def test_what_a_registry_would_refuse_is_seen(change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(DESCRIPTION | change)


def test_versions_are_those_of_the_server() -> None:
    assert {DESCRIPTION["version"], PACKAGE["version"]} == {__version__}
    assert re.findall(r"/v([^/]+)/", PACKAGE["identifier"]) == [__version__]


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: str(variable["name"]))
def test_variable_is_a_setting_with_the_default_that_it_has(variable: dict[str, Any]) -> None:
    name = variable["name"].lower()
    assert name in Settings.model_fields
    assert variable.get("isSecret", False) == is_secret(name, "")
    for value in variable.get("choices", [variable["default"]] if "default" in variable else []):
        Settings(**{name: value})
    if "default" in variable:
        assert getattr(Settings(**{name: variable["default"]}), name) == Settings.model_fields[name].default


def test_package_is_nobody_elses() -> None:
    assert PACKAGE["registryType"] == "mcpb", "the name on the package indexes belongs to another project"
