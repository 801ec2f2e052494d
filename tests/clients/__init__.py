"""Other people's clients: programs for Node, pinned in package.json, which `tests/run` installs."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from conftest import wait_for

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"


def node() -> Path:
    """Return the Node that the lock file names, or fail with the command that installs it."""
    found = list(MODULES.glob("node-linux-*/bin/node"))
    if not found:
        pytest.fail("the clients are missing; run: npm ci --ignore-scripts --prefix tests/clients")
    return found[0]


class Program:
    """A program for Node: what it printed so far, and how to answer it."""

    def __init__(self, folder: Path, script: Path, *arguments: str, **environment: str) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [node(), script, *arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                cwd=folder,
                env={"HOME": str(folder), "PATH": ""} | environment,
            )

    def printed(self) -> str:
        return self._out.read_text() + self._err.read_text()

    def line(self, number: int, seconds: float = 60) -> str:
        """Wait for that line of stdout, counted from 0."""

        def lines() -> list[str]:
            return self._out.read_text().split("\n")[:-1]

        wait_for(lambda: len(lines()) > number or self.process.poll() is not None, seconds)
        assert len(lines()) > number, self.printed()
        return lines()[number]

    def json(self, number: int) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads(self.line(number)))

    def tell(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def ended(self, seconds: float = 60) -> int:
        """Wait for its end and return its exit status."""
        return self.process.wait(seconds)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


@contextmanager
def running(folder: Path, script: Path, *arguments: str, **environment: str) -> Iterator[Program]:
    """Run a program for Node, and end it in the end."""
    program = Program(folder, script, *arguments, **environment)
    try:
        yield program
    finally:
        program.close()
