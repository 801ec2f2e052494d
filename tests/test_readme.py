"""What the README tells people to copy."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [block.rstrip("\n") for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]


def test_each_command_stands_on_one_line() -> None:
    assert COMMANDS
    assert not [command for command in COMMANDS if "\n" in command]


def test_first_command_works_in_a_fresh_clone(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    for name in filter(None, os.fsdecode(tracked).split("\0")):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "SSL_"))}
    environment = kept | {"HOME": str(home), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        COMMANDS[0],
        shell=True,
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "answers were as expected" in done.stdout


def test_second_command_is_the_one_that_ci_calls() -> None:
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text().splitlines()
    assert os.access(ROOT / COMMANDS[1], os.X_OK)


def test_every_setting_is_in_the_table() -> None:
    for name, field in Settings.model_fields.items():
        assert f"`{name.upper()}`" in README, field


def test_nobody_is_sent_to_the_other_package() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        assert not re.search(
            r"(uvx|pip install|pipx install|tool install) ssh-mcp-server\b", path.read_text()
        )
