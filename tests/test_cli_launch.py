"""How an installation says it is started."""

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from cli import launch
from settings import SettingsError


class Distribution:
    """What an installed distribution tells of itself."""

    def __init__(self, origin: dict[str, Any] | None) -> None:
        self._origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self._origin is None else json.dumps(self._origin)


@pytest.fixture
def made_by_uvx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    uv = tmp_path / "uv"
    uv.write_text(f"#!/bin/sh\n[ \"$*\" = 'cache dir' ] && echo '{Path(sys.prefix).parent}'\n")
    uv.chmod(0o755)
    monkeypatch.setenv("UV", str(uv))
    return tmp_path / "uvx"


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ({"url": "file:///opt/my%20clone", "dir_info": {}}, "/opt/my clone"),
        (
            {"url": "https://git.example.com/x", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}},
            "git+https://git.example.com/x",
        ),
        (
            {
                "url": "file:///srv/x",
                "vcs_info": {"vcs": "git", "commit_id": "0" * 40, "requested_revision": "v1"},
            },
            "git+file:///srv/x@v1",
        ),
        (
            {"url": "https://example.com/x-1-py3-none-any.whl", "archive_info": {}},
            "https://example.com/x-1-py3-none-any.whl",
        ),
    ],
)
def test_passing_environment_is_made_again_from_where_it_came(
    made_by_uvx: Path, monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any], source: str
) -> None:
    monkeypatch.setattr(launch, "distribution", lambda _: Distribution(origin))
    assert launch.command() == [str(made_by_uvx), "--from", source, "ssh-mcp-server"]


def test_passing_environment_of_unknown_origin_is_refused(
    made_by_uvx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "distribution", lambda _: Distribution(None))
    with pytest.raises(SettingsError, match="git URL"):
        launch.command()


def test_environment_that_stays_is_started_by_its_script_even_under_uv(
    made_by_uvx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(Path(sys.executable).parent / "ssh-mcp-server")
    (tmp_path / "uv").write_text(f"#!/bin/sh\necho '{tmp_path}'\n")
    assert launch.command() == [script]
    monkeypatch.delenv("UV")
    assert launch.command() == [script]


def test_environment_without_the_script_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(SettingsError, match=str(tmp_path)):
        launch.command()


def test_uv_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV", "/nowhere/uv")
    with pytest.raises(SettingsError, match="/nowhere/uv"):
        launch.command()
