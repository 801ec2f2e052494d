"""The examples of docs/tools.md: each call, made on a real sshd in that order, has the answer that stands there."""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client

import app
from conftest import Server
from documents import ROOT, Document

PAGE = Document(ROOT / "docs" / "tools.md")
VARIES = [
    (r"\b[\w.-]+@[\w.-]+:\d+\b", "ACCOUNT"),
    (r"\b\d+\.\d\d? s\b", "SECONDS"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
    (r"\bjob_id [^] ]+", "job_id JOB"),
    (r"\bcursor [^] ]+", "cursor CURSOR"),
    (r"/jobs/[\w-]+/", "/jobs/JOB/"),
    (r"\b[\w.-]+:[\w.-]+ +(?=\d+ TIME|- TIME)", "OWNER "),
    (r"(?m)^(host|system|kernel|uptime|load|cpu|memory|swap|disk) +.*(\n\1 .*)*", r"\1 FACTS"),
]
"""What differs from run to run, or from machine to machine, and what stands for it in the comparison."""


@dataclass(frozen=True)
class Example:
    """One call of the page, and the answer that the page shows."""

    tool: str
    arguments: str
    answer: str


def examples() -> list[Example]:
    blocks = PAGE.blocks
    assert [block.language for block in blocks] == ["json", "text"] * (len(blocks) // 2)
    return [
        Example(call.section, call.text, answer.text)
        for call, answer in zip(blocks[::2], blocks[1::2], strict=True)
    ]


async def answers(calls: list[Example]) -> list[str]:
    """Make the calls, one after the other, and return their texts; a call goes on with the job of the one before."""
    texts: list[str] = []
    async with Client(app.mcp) as client:
        for call in calls:
            arguments = json.loads(call.arguments)
            for name in ("job_id", "cursor") & arguments.keys():
                arguments[name] = handle(name, texts[-1])
            result: Any = await client.call_tool(call.tool, arguments, raise_on_error=False)
            texts.append(result.content[0].text)
    return texts


def handle(name: str, text: str) -> str:
    """Return the job's id or cursor, which stands behind its name at the end of an answer."""
    found: list[str] = re.findall(rf"\b{name} ([^] ]+)", text)
    return found[-1]


def comparable(text: str, home: str = "/home/deploy") -> str:
    text = text.replace(home, "~")
    for pattern, word in VARIES:
        text = re.sub(pattern, word, text)
    return text.rstrip("\n")


@pytest.fixture
def home(own_sshd: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Make a server whose account has the files that the page speaks of, the default target; return the home there."""
    sshd = own_sshd()
    (sshd.home / "shop").mkdir()
    for name in ("index.html", "prices.csv"):
        (sshd.home / "shop" / name).touch()
    (tmp_path / "settings").touch()
    monkeypatch.setenv("SSH_MCP_ENV_FILE", str(tmp_path / "settings"))
    monkeypatch.setenv("SSH_MAX_OUTPUT_BYTES", "1000")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name, value in sshd.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return str(sshd.home)


def test_every_example_of_the_page_is_answered_as_it_shows(home: str) -> None:
    calls = examples()
    for call, answer in zip(calls, asyncio.run(answers(calls)), strict=True):
        assert comparable(answer, home) == comparable(call.answer), call.arguments


def test_page_has_an_example_of_every_tool() -> None:
    async def listed() -> set[str]:
        async with Client(app.mcp) as client:
            return {tool.name for tool in await client.list_tools()}

    assert {call.tool for call in examples()} == asyncio.run(listed())
