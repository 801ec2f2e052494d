"""What the policy approved is what real shells run, word for word; and what the line had said before.

`SSH_MCP_POLICY_LINES` is how many random lines are tried, `SSH_MCP_POLICY_SEED` where they begin: a failure names it.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from conftest import SHELLS, Server, make_server, nobody_cancels, open_folder
from settings import Settings
from shell_lines import (
    ALLOWED,
    AS_SH,
    AS_THEMSELVES,
    Argv,
    Shell,
    Stubs,
    comparable,
    expected,
    lines,
    recorded,
)
from ssh_commands import Commands
from ssh_errors import RefusedError
from ssh_policy import AllowedCommands
from ssh_pool import Pool
from ssh_shells import Task
from ssh_words import CommandLine, read

COUNT = int(os.environ.get("SSH_MCP_POLICY_LINES", "2000"))
SEED = int(os.environ.get("SSH_MCP_POLICY_SEED", time.time_ns() % 1_000_000))
BATCH = 2000
SESSION_LINES = 40
POLICY = AllowedCommands(Settings(allowed_commands=ALLOWED))

Approved = Mapping[int, tuple[str, str]]
"""The lines that were approved, by number: as they were, and rebuilt."""


def batches() -> Iterator[tuple[int, Approved]]:
    """Return seeds, and which of their lines were approved."""
    for start in range(0, COUNT, BATCH):
        numbered = enumerate(lines(SEED + start, min(BATCH, COUNT - start)))
        yield (
            SEED + start,
            {number: (line, POLICY.approved(line)) for number, line in numbered if is_approved(line)},
        )


def is_approved(line: str) -> bool:
    try:
        POLICY.approved(line)
    except RefusedError:
        return False
    return True


def check(
    stubs: Stubs, shells: Mapping[str, Shell], scripts: Mapping[int, str], approved: Approved, folder: Path
) -> None:
    """Run the scripts in all the shells, in one locale or another, and look at what was run."""
    folder.mkdir()
    started = [
        stubs.start(shell, scripts, folder / name, ("C", "C.UTF-8")[at % 2])
        for at, (name, shell) in enumerate(shells.items())
    ]
    for process in started:
        process.wait()
    for name in shells:
        ran: dict[int, list[Argv]] = defaultdict(list)
        for number, words in recorded(folder / name / "record"):
            ran[number].append(words)
        for number, (line, _) in approved.items():
            meant: CommandLine = read(line)
            assert comparable(ran[number], meant) == expected(meant), (
                f"{name} with {scripts[number]!r}, from {line!r}: {(folder / name / 'out').read_text()[:500]}"
            )
        assert ran.keys() == approved.keys()
    assert stubs.untouched()


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


def test_shells_run_what_was_approved_and_what_the_line_said(stubs: Stubs, tmp_path: Path) -> None:
    total = 0
    for seed, approved in batches():
        try:
            rebuilt = {number: line for number, (_, line) in approved.items()}
            check(stubs, AS_SH, rebuilt, approved, tmp_path / f"rebuilt-{seed}")
            as_written = {number: line for number, (line, _) in approved.items()}
            check(stubs, AS_THEMSELVES, as_written, approved, tmp_path / f"written-{seed}")
        except AssertionError as error:
            error.add_note(f"SSH_MCP_POLICY_SEED={seed} SSH_MCP_POLICY_LINES={BATCH}")
            raise
        total += len(approved)
    print(f"{COUNT} lines from seed {SEED}: {total} approved, the others refused")
    assert total > COUNT / 5, "a policy that refuses everything proves nothing"


@pytest.fixture(scope="module")
def recording() -> Iterator[tuple[Server, Stubs, Path]]:
    """An sshd whose sessions know no programs but the stubs, the stubs, and their record."""
    with open_folder() as folder:
        stubs = Stubs(folder)
        record = folder / "record"
        variables = " ".join(
            f'"{name}={value}"' for name, value in stubs.environment(record).items() if name != "HOME"
        )
        server = make_server(folder / "server", f"SetEnv {variables}")
        yield server, stubs, record
        server.stop()


@pytest.mark.parametrize("account", SHELLS)
def test_sessions_of_every_login_shell_run_what_was_approved(
    recording: tuple[Server, Stubs, Path], account: str
) -> None:
    server, stubs, record = recording
    settings = server.settings(allowed_commands=ALLOWED)
    pool = Pool(settings)
    commands = Commands(pool, settings)
    try:
        for line in [line for line in lines(SEED, 400) if is_approved(line)][:SESSION_LINES]:
            record.unlink(missing_ok=True)
            task = Task.of(POLICY.approved(line), str(stubs.cwd))
            commands.run_task(server.account(account), task, timeout=30, cancelled=nobody_cancels)
            meant = read(line)
            ran = [words for _, words in recorded(record)]
            assert comparable(ran, meant) == expected(meant), f"{line!r} (SSH_MCP_POLICY_SEED={SEED})"
    finally:
        pool.close()
    assert stubs.untouched()
