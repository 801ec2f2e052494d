"""The command line is completed by real shells: bash and zsh at a terminal, fish by what it would offer there."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import program

BIN = Path(sys.executable).parent
PROMPT = "ready>"
EMPTY_LINE = "\x15\n"
"""Control-U and Enter: an interrupt would be lost on a shell that still waits for its completer."""
SHELLS = {
    "bash": ["--norc", "--noprofile", "-i"],
    "zsh": ["-f", "-o", "no_prompt_sp", "-i"],
}
LEARNS = {
    "bash": 'eval "$(ssh-mcp-server completion bash)"',
    "zsh": 'autoload -U compinit; compinit -u -D; eval "$(ssh-mcp-server completion zsh)"',
}
COMPLETED = [
    ("conf", "config"),
    ("--trans", "--transport"),
    ("--transport ht", "--transport http"),
    ("audit ver", "audit verify"),
    ("config claude-d", "config claude-desktop"),
    ("config codex --wr", "config codex --write"),
    ("config codex --env SSH_DEFAULT_H", "config codex --env SSH_DEFAULT_HOST="),
    ("config codex --env SSH_DEFAULT_HOST=bui", "config codex --env SSH_DEFAULT_HOST=builder"),
    ("config codex --env SSH_DEFAULT_HOST=db", "config codex --env SSH_DEFAULT_HOST=db.example.com"),
    ("check bui", "check builder"),
    ("check me@db", "check me@db.example.com"),
    ("check --js", "check --json"),
    ("completion fi", "completion fish"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home whose SSH config has an alias, in a file that it includes, and patterns; and a default host."""
    home = tmp_path_factory.mktemp("home")
    ssh = home / ".ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "config").write_text("Include more\nHost * !web\n  User me\n")
    (ssh / "more").write_text("Host builder web-*\n  HostName 192.0.2.1\n")
    for name in ("config", "more"):
        (ssh / name).chmod(0o600)
    return {
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "TERM": "dumb",
        "PS1": PROMPT,
        "SSH_DEFAULT_HOST": "db.example.com",
    }


class Terminal:
    """A shell at a terminal that knows how to complete our command line."""

    def __init__(self, shell: str, environment: dict[str, str]) -> None:
        self._keyboard, other_end = pty.openpty()
        termios.tcsetwinsize(other_end, (24, 200))
        self._process = subprocess.Popen(
            [program(shell, shell), *SHELLS[shell]],
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
            env=environment,
            start_new_session=True,
        )
        os.close(other_end)
        self.type(f"{LEARNS[shell]}; echo lear''ned\n")
        self.wait_for(f"learned\n{PROMPT}")

    def type(self, keys: str) -> None:
        self.seen = ""
        os.write(self._keyboard, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read what the terminal shows until the text is there."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self._keyboard], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown, but {self.seen!r}"
            shown = os.read(self._keyboard, 65_536).decode()
            self.seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[\r\x07]", "", shown)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._keyboard)


@pytest.fixture(scope="module")
def terminal(environment: dict[str, str]) -> Iterator[Callable[[str], Terminal]]:
    opened: dict[str, Terminal] = {}

    def of(shell: str) -> Terminal:
        if shell not in opened:
            opened[shell] = Terminal(shell, environment)
        return opened[shell]

    yield of
    for terminal in opened.values():
        terminal.close()


@pytest.mark.parametrize(("typed", "completed"), COMPLETED)
@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes_what_was_typed(
    shell: str, typed: str, completed: str, terminal: Callable[[str], Terminal]
) -> None:
    at = terminal(shell)
    at.type(f"ssh-mcp-server {typed}\t")
    at.wait_for(f"ssh-mcp-server {completed}")
    at.type(EMPTY_LINE)
    at.wait_for(PROMPT)


@pytest.mark.parametrize(("typed", "completed"), COMPLETED)
def test_fish_offers_what_may_be_meant(typed: str, completed: str, environment: dict[str, str]) -> None:
    offered = by_fish(f"ssh-mcp-server {typed}", environment)
    assert offered == [completed.rpartition(" ")[2]]


def by_fish(line: str, environment: dict[str, str]) -> list[str]:
    script = f"ssh-mcp-server completion fish | source; complete -C '{line}'"
    done = subprocess.run(
        [program("fish", "fish"), "--no-config", "-c", script],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [line.partition("\t")[0].rstrip() for line in done.stdout.splitlines()]


def test_no_secret_and_no_pattern_is_offered(environment: dict[str, str]) -> None:
    variables = by_fish("ssh-mcp-server config codex --env ", environment)
    assert "SSH_KEY_PATH=" in variables
    assert not {"JWT_SECRET=", "SSH_KEY_PASSPHRASE=", "SSH_SUDO_PASSWORD="} & {*variables}
    hosts = by_fish("ssh-mcp-server config codex --env SSH_DEFAULT_HOST=", environment)
    assert hosts == [f"SSH_DEFAULT_HOST={host}" for host in ("builder", "db.example.com")]


def test_settings_that_cannot_be_read_offer_nothing_and_say_nothing(environment: dict[str, str]) -> None:
    broken = environment | {"SSH_MAX_CONNECTIONS": "many"}
    assert by_fish("ssh-mcp-server config codex --env SSH_DEFAULT_HOST=", broken) == []
    assert "config" in by_fish("ssh-mcp-server ", broken)


def test_start_that_no_shell_asked_for_imports_nothing_of_it() -> None:
    ask = "import sys, cli\ntry: cli.main(['--version'])\nexcept SystemExit: print('argcomplete' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=BIN.parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "False"
