"""An entry put into somebody's file, as text."""

import json
import tomllib
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.entries import EntryError, in_json, in_toml

ENTRY = {
    "command": "/opt/é/ssh-mcp-server",
    "args": ["--env-file", 'a "b" \\c'],
    "env": {"SSH_DEFAULT_HOST": "w"},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def only_added_to(before: str, after: str) -> bool:
    """Tell whether `after` is `before` with one stretch of text put in."""
    kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    return after.endswith(before[kept:])


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.text(max_size=5), VALUES, max_size=4),
    st.none() | st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
    st.sampled_from([None, 0, 2, 4, "\t"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_every_byte_of_any_json_stays(
    others: dict[str, Any],
    servers: dict[str, Any] | None,
    indent: int | str | None,
    newline: str,
    first: bool,
) -> None:
    table = {} if servers is None else {"mcpServers": servers}
    held = table | others if first else others | table
    before = json.dumps(held, indent=indent).replace("\n", newline) + newline
    after = in_json(before, "mcpServers", "ssh-1234", ENTRY, replace=False)
    assert json.loads(after) == held | {"mcpServers": (servers or {}) | {"ssh-1234": ENTRY}}
    assert only_added_to(before, after)
    assert after.count("\n") == after.count(newline)
    assert in_json(after, "mcpServers", "ssh-1234", ENTRY, replace=False) == after


@pytest.mark.parametrize("unit", ["  ", "    ", "\t"])
def test_new_lines_are_indented_like_the_old_ones(unit: str) -> None:
    held: dict[str, Any] = {"mcpServers": {"other": {"command": "x", "args": []}}, "theme": "dark"}
    after = in_json(json.dumps(held, indent=unit) + "\n", "mcpServers", "ssh", ENTRY, replace=False)
    held["mcpServers"]["ssh"] = ENTRY
    assert after == json.dumps(held, indent=unit, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("before", ["{}", '{\n  "a": 1\n}', '{\n  "mcpServers": {}\n}'])
def test_table_that_is_missing_or_empty_is_laid_out_like_any_other(before: str) -> None:
    after = in_json(before, "mcpServers", "ssh", ENTRY, replace=False)
    held = json.loads(before) | {"mcpServers": {"ssh": ENTRY}}
    assert after == json.dumps(held, indent=2, ensure_ascii=False)


def test_what_a_second_dump_would_change_is_kept() -> None:
    before = '{"a": 1.50, "b": "\\u00e9", "c": [1,2,\n3], "a": 1e2,\n\n   "mcpServers": { "x": {} }}'
    after = in_json(before, "mcpServers", "ssh", ENTRY, replace=False)
    assert only_added_to(before, after)
    assert json.loads(after)["mcpServers"] == {"x": {}, "ssh": ENTRY}


def test_other_server_of_that_name_is_replaced_on_request_only() -> None:
    before = '{"mcpServers": {"ssh": {"command": "old"}, "x": {}}}'
    with pytest.raises(EntryError, match="--force"):
        in_json(before, "mcpServers", "ssh", ENTRY, replace=False)
    after = in_json(before, "mcpServers", "ssh", ENTRY, replace=True)
    assert after == before.replace('{"command": "old"}', json.dumps(ENTRY, ensure_ascii=False))


@pytest.mark.parametrize(
    "text",
    [
        '{\n  // my servers\n  "mcpServers": {}\n}',
        '{"mcpServers": {},}',
        "[]",
        '"text"',
        '{"mcpServers": []}',
        '{"mcpServers": null}',
        "{",
    ],
)
def test_what_is_no_plain_json_object_is_refused(text: str) -> None:
    with pytest.raises(EntryError):
        in_json(text, "mcpServers", "ssh", ENTRY, replace=True)


TOML = """\
# mine
model = "m"

[mcp_servers.ssh]  # old
command = "old"
args = [
]

[mcp_servers.ssh.env]
A = "b"

# of the next one
[mcp_servers.sshd]
command = "other"
"""


@pytest.mark.parametrize(
    "before", ["", 'model = "m"', "a = 1\n", "a = 1\r\n\r\n[mcp_servers.x]\r\ncommand = 'x'\r\n"]
)
def test_tables_are_added_at_the_end_of_toml(before: str) -> None:
    after = in_toml(before, "mcp_servers", "ssh", ENTRY, replace=False)
    assert after.startswith(before)
    held = tomllib.loads(before)
    assert tomllib.loads(after) == held | {"mcp_servers": held.get("mcp_servers", {}) | {"ssh": ENTRY}}
    assert in_toml(after, "mcp_servers", "ssh", ENTRY, replace=False) == after
    assert "\r\n" not in before or after.count("\n") == after.count("\r\n")


def test_replaced_tables_leave_all_else_and_its_comments() -> None:
    with pytest.raises(EntryError, match="--force"):
        in_toml(TOML, "mcp_servers", "ssh", ENTRY, replace=False)
    after = in_toml(TOML, "mcp_servers", "ssh", ENTRY, replace=True)
    assert tomllib.loads(after)["mcp_servers"] == {"ssh": ENTRY, "sshd": {"command": "other"}}
    assert after.startswith('# mine\nmodel = "m"\n\n')
    assert '\n# of the next one\n[mcp_servers.sshd]\ncommand = "other"\n' in after
    assert "old" not in after
    again = in_toml(after, "mcp_servers", "ssh", {"command": "x"}, replace=True)
    assert in_toml(again, "mcp_servers", "ssh", ENTRY, replace=True) == after


@pytest.mark.parametrize(
    "text",
    [
        "no toml",
        'mcp_servers = { x = { command = "x" } }\n',
        '[mcp_servers."ssh"]\ncommand = "old"\n',
        '[mcp_servers.ssh]\ncommand = """\n[other]\n"""\n',
        "mcp_servers = 1\n",
    ],
)
def test_toml_that_cannot_take_one_more_table_is_refused(text: str) -> None:
    with pytest.raises(EntryError):
        in_toml(text, "mcp_servers", "ssh", ENTRY, replace=True)
