"""The Caddyfile that ships, as it stands."""

import os
import subprocess
from pathlib import Path

from conftest import program
from front import DEPLOY


def test_caddy_takes_the_file_and_would_not_write_it_otherwise(tmp_path: Path) -> None:
    caddy, environment = program("caddy", "caddy"), os.environ | {"HOME": str(tmp_path)}
    for command in (["validate", "--adapter", "caddyfile", "--config"], ["fmt"]):
        done = subprocess.run(
            [caddy, *command, DEPLOY / "Caddyfile"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == (DEPLOY / "Caddyfile").read_text()
