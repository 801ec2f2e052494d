"""The table of tested clients says what the lock files pin and which tests there are."""

import ast
import itertools
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "clients.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if re.search(r"`test_\w+` in `tests/", line) and line.startswith("|")
]
NPM = json.loads((ROOT / "tests" / "clients" / "package-lock.json").read_text())["packages"]
PYPI = {
    package["name"]: package["version"]
    for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    if "version" in package
}
PINNED = PYPI | {name.removeprefix("node_modules/"): package.get("version") for name, package in NPM.items()}


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_each_version_is_the_one_that_a_lock_file_pins() -> None:
    versions = {}
    for client, version, *_ in ROWS:
        for package in named(client):
            versions[package] = version
            assert PINNED[package] == version
    assert versions.keys() >= {*json.loads((ROOT / "tests/clients/package.json").read_text())["dependencies"]}


def test_a_row_without_a_package_tells_of_the_one_above() -> None:
    for above, row in itertools.pairwise(ROWS):
        assert named(row[0]) or row[1] == above[1]


@pytest.mark.parametrize(
    "told", sorted(set(re.findall(r"`(test_\w+)`\s+in\s+`(tests/\w+\.py)`", TEXT))), ids="/".join
)
def test_each_test_that_is_named_is_there(told: tuple[str, str]) -> None:
    name, path = told
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_program_of_the_bundle_is_called_in_the_version_that_was_tested() -> None:
    assert re.findall(r"@anthropic-ai/mcpb@([\d.]+)", TEXT) == [PINNED["@anthropic-ai/mcpb"]]
