"""`ssh-mcp-server secrets`."""

import os
from pathlib import Path

import pytest

import settings
import settings_login
from cli import main

HTTP = {"google_client_id": "id", "google_client_secret": "of google", "allowed_email": "me@example.com"}


@pytest.fixture(autouse=True)
def no_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_MCP_ENV_FILE", raising=False)


def test_file_is_its_owners_alone_and_its_keys_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "x.env"
    before = os.umask(0)
    try:
        main(["--env-file", str(path), "secrets"])
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    login = settings_login.login(settings.load(path).model_copy(update=HTTP))
    keys = {login.jwt_keys, login.session_keys, login.code_keys}
    assert len(keys) == 3
    said = capsys.readouterr()
    assert str(path) in said.out
    assert not any(key.decode() in said.out + said.err for (key,) in keys)


def test_no_two_files_share_a_key(tmp_path: Path) -> None:
    for name in ("one", "two"):
        main(["--env-file", str(tmp_path / name), "secrets"])
    one, two = (settings.load(tmp_path / name) for name in ("one", "two"))
    assert one.jwt_secret != two.jwt_secret


def test_file_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.env"
    path.write_text("JWT_SECRET=old\n")
    with pytest.raises(SystemExit) as ended:
        main(["--env-file", str(path), "secrets"])
    assert ended.value.code == 2
    assert path.read_text() == "JWT_SECRET=old\n"
    assert str(path) in capsys.readouterr().err


def test_link_to_nowhere_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.env").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        main(["--env-file", str(tmp_path / "x.env"), "secrets"])
    assert not (tmp_path / "elsewhere").exists()


def test_without_a_name_it_is_written_where_the_server_looks_first_unless_it_would_hide_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(settings, "_usual_env_files", lambda: [first, second])
    second.write_text("SSH_DEFAULT_HOST=web1\n")
    with pytest.raises(SystemExit):
        main(["secrets"])
    assert not first.exists()
    second.unlink()
    main(["secrets"])
    assert settings.env_file() == first


def test_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["--env-file", str(tmp_path / "file" / "x.env"), "secrets"])
    assert str(tmp_path / "file" / "x.env") in capsys.readouterr().err
