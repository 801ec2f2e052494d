"""What becomes of commands when the wire is cut at many points, delayed and frozen; and what is left afterwards.

CUT_STEP=1 in the environment cuts at every byte, which takes some minutes.

Every command writes down on the other side that it runs, so that its answer can be held against that.
"""

import gc
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import paramiko
import pytest

from conftest import Server, nobody_cancels, wait_for
from relay import Relay, Way, way_to
from ssh_answers import CommandResult
from ssh_commands import Commands
from ssh_errors import ArgumentError, LoginError, SSHError
from ssh_files import Files
from ssh_jobs import Jobs
from ssh_pool import Pool
from ssh_shells import Task

Serve = Callable[..., Server]
KEY = "k" * 64
CALLS = 1000


def ran(server: Server, name: str) -> int:
    """Return how many times a command has written down that it runs."""
    path = server.home / name
    return len(path.read_text().splitlines()) if path.exists() else 0


def check(result: CommandResult | SSHError, times: int, said: str) -> str:
    """Hold an answer against what happened; return its kind."""
    if isinstance(result, SSHError):
        if "nothing was run" in str(result):
            assert times == 0, result
        assert times <= 1, result
        return "error"
    assert times <= 1, result
    if result.status == "exited":
        assert (times, result.exit_code, result.stdout) == (1, 0, said), result
    else:
        assert said.startswith(result.stdout), result
    return result.status


def cut_once(server: Server, way: str, size: int, *, warm: bool) -> str:
    """Run one command whose wire is cut after so many bytes one way, and hold its answer against what happened."""
    name = f"{way}{size}{warm}"
    with way_to(server) as path:
        pool = Pool(path.settings)
        commands = Commands(pool, path.settings)
        if warm:
            commands.run(path.target, "true", cancelled=nobody_cancels)
        path.relay.cut_after(way, size)
        try:
            result: CommandResult | SSHError = commands.run(
                path.target, f"echo run >> {name}; cat", stdin="in", cancelled=nobody_cancels
            )
        except SSHError as error:
            result = error
        pool.close()
    wait_for(lambda: not [pid for pid in processes_of(server) if name in command_line(pid)])
    return check(result, ran(server, name), "in")


def processes_of(server: Server) -> list[int]:
    """Return what runs with the login directory of the tester as its home: shells and what they started."""
    mark = f"HOME={server.home}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def size_of_a_command(server: Server, *, warm: bool) -> dict[str, int]:
    with way_to(server) as path:
        pool = Pool(path.settings)
        commands = Commands(pool, path.settings)
        if warm:
            commands.run(path.target, "true", cancelled=nobody_cancels)
            time.sleep(0.3)
        before = dict(path.relay.passed)
        commands.run(path.target, "echo run >> measured; cat", stdin="in", cancelled=nobody_cancels)
        after = dict(path.relay.passed)
        pool.close()
    return {name: after[name] - before[name] for name in after}


@pytest.mark.parametrize(("warm", "step"), [(True, 11), (False, 83)])
def test_command_whose_wire_is_cut_anywhere_runs_at_most_once_and_answers_truly(
    own_sshd: Serve, warm: bool, step: int
) -> None:
    server = own_sshd("MaxStartups 200")
    sizes = size_of_a_command(server, warm=warm)
    step = int(os.environ.get("CUT_STEP", step))
    points = [(name, at) for name, size in sizes.items() for at in range(1, size + step, step)]
    with ThreadPoolExecutor(6) as threads:
        kinds = Counter(threads.map(lambda point: cut_once(server, *point, warm=warm), points))
    assert sum(kinds.values()) == len(points)
    assert kinds["exited"]
    assert kinds["lost"]
    assert set(kinds) <= {"exited", "lost", "error"}


def test_login_whose_wire_is_cut_is_not_taken_for_a_refused_key(own_sshd: Serve) -> None:
    server = own_sshd("MaxStartups 200")

    def log_in(point: tuple[str, int] | None) -> tuple[str, dict[str, int]]:
        with way_to(server) as way:
            if point is not None:
                way.relay.cut_after(*point)
            pool = Pool(way.settings)
            try:
                Commands(pool, way.settings).run(way.target, "true", cancelled=nobody_cancels)
                kind = "done"
            except SSHError as error:
                kind = type(error).__name__ if not isinstance(error, LoginError) else f"LoginError {error}"
            finally:
                pool.close()
            return kind, dict(way.relay.passed)

    _, sizes = log_in(None)
    step = int(os.environ.get("CUT_STEP", 97))
    points = [(name, at) for name, size in sizes.items() for at in range(1, size, step)]
    with ThreadPoolExecutor(6) as threads:
        kinds = Counter(kind for kind, _ in threads.map(log_in, points))
    assert kinds["UnreachableError"]
    assert not [kind for kind in kinds if kind.startswith("LoginError")], kinds


@dataclass
class Left:
    """What this process holds."""

    threads: int
    files: int
    channels: int
    temporary: int

    def more_than(self, before: "Left") -> list[str]:
        """Return the names of what there is more of; what an earlier test left may have gone meanwhile."""
        return [name for name, count in vars(self).items() if count > getattr(before, name)]

    @classmethod
    def now(cls, temporary: Path) -> "Left":
        gc.collect()
        channels = sum(isinstance(thing, paramiko.Channel) for thing in gc.get_objects())
        return cls(
            threading.active_count(),
            len(list(Path("/proc/self/fd").iterdir())),
            channels,
            len(list(temporary.iterdir())),
        )


class Caller:
    """Calls of every kind, each with the means to tell whether its answer is true."""

    def __init__(self, way: Way) -> None:
        self.server = way.server
        self.target = way.target
        self.pool = Pool(way.settings)
        self.commands = Commands(self.pool, way.settings)
        self.jobs = Jobs(self.commands, lambda: KEY)
        self.files = Files(self.pool, way.settings)
        self._done = 0
        self._changed = threading.Condition()

    def call(self, number: int) -> str:
        outcome = self._call(number)
        with self._changed:
            self._done += not outcome.endswith(("lost", "error"))
            self._changed.notify_all()
        return outcome

    def wait_for_calls(self, count: int, over: threading.Event) -> None:
        """Wait until so many more calls have done what they should, or all is over."""
        with self._changed:
            until = self._done + count
            while self._done < until and not over.is_set():
                self._changed.wait(0.5)

    def _call(self, number: int) -> str:
        kind = (self.quick, self.fed, self.killed, self.detached, self.written, self.background)[number % 6]
        return f"{kind.__name__} {kind(f'{kind.__name__}{number}')}"

    def quick(self, name: str) -> str:
        return self._checked(
            name, lambda: self._run(f"echo run >> {name}; sleep 0.02; echo {name}"), f"{name}\n"
        )

    def fed(self, name: str) -> str:
        text = name * 5_000
        return self._checked(
            name, lambda: self._run(f"echo run >> {name}; wc -c", stdin=text), f"{len(text)}\n"
        )

    def killed(self, name: str) -> str:
        def call() -> CommandResult:
            return self._run(f"echo run >> {name}; sleep 15.{name[6:]}1", timeout=0.3)

        try:
            result = call()
        except SSHError as error:
            return check(error, ran(self.server, name), "")
        assert result.status in ("killed", "lost"), result
        assert ran(self.server, name) <= 1
        if result.status == "killed" and result.note is None:
            assert not [p for p in processes_of(self.server) if f"sleep\x0015.{name[6:]}1" in command_line(p)]
        return result.status

    def detached(self, name: str) -> str:
        task = Task.of(f"echo run >> {name}; sleep 0.6; echo {name}")

        def call() -> CommandResult:
            result = self.jobs.execute(
                "me", self.target, task, timeout=0.3, on_timeout="detach", cancelled=nobody_cancels
            )
            while result.status == "running":
                assert result.job_id
                result = self.jobs.go_on(
                    "me", result.job_id, timeout=20, on_timeout="detach", cancelled=nobody_cancels
                )
            return result

        return self._checked(name, call, f"{name}\n")

    def written(self, name: str) -> str:
        text = f"{name}\n" * 100
        try:
            self.files.write(self.target, name, text.encode(), cancelled=nobody_cancels)
        except SSHError:
            path = self.server.home / name
            assert not path.exists() or path.read_text() == text
            return "error"
        assert (self.server.home / name).read_text() == text
        return "written"

    def writes(self, name: str) -> bool:
        return self.written(name) == "written"

    def background(self, name: str) -> str:
        task = Task.of(f"echo run >> {name}; echo {name}")
        try:
            begun = self.jobs.start_background("me", self.target, task, timeout=20, cancelled=nobody_cancels)
        except SSHError as error:
            return check(error, ran(self.server, name), "")
        assert begun.job_id
        while True:
            try:
                result = self.jobs.go_on(
                    "me", begun.job_id, timeout=20, on_timeout="detach", cancelled=nobody_cancels
                )
            except ArgumentError:  # such as "no longer on"
                raise
            except SSHError:
                continue
            assert result.status == "exited", result
            return check(result, ran(self.server, name), f"{name}\n")

    def _run(self, command: str, *, timeout: float = 30, **more: str) -> CommandResult:
        return self.commands.run(self.target, command, cancelled=nobody_cancels, timeout=timeout, **more)  # type: ignore[arg-type]

    def _checked(self, name: str, call: Callable[[], CommandResult], said: str) -> str:
        try:
            result: CommandResult | SSHError = call()
        except SSHError as error:
            result = error
        return check(result, ran(self.server, name), said)

    def close(self) -> None:
        self.commands.stop()
        self.jobs.close()
        self.pool.close(5)


def disturb(caller: Caller, relay: Relay, over: threading.Event, seed: int) -> None:
    """Delay, freeze and cut the wire at random until it is over; a slow machine is left time for calls in between."""
    dice = random.Random(seed)
    while not over.wait(dice.uniform(0.05, 0.6)):
        caller.wait_for_calls(8, over)
        fault = dice.choice(("cut", "cut", "cut_after", "freeze", "delay", "none"))
        if fault == "cut":
            relay.cut()
        elif fault == "cut_after":
            relay.cut_after(dice.choice(("up", "down")), dice.randrange(1, 20_000))
        elif fault == "freeze":
            relay.freeze()
            over.wait(dice.uniform(0.05, 1.0))
            relay.thaw()
        else:
            relay.delay_seconds = dice.uniform(0, 0.1) if fault == "delay" else 0.0


def test_thousand_calls_with_random_faults_end_truly_and_leave_nothing(
    own_sshd: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(
        logging.root.manager, "disable", logging.CRITICAL
    )  # pytest keeps what records refer to
    server = own_sshd("MaxStartups 200")
    before = Left.now(temporary)
    over = threading.Event()
    with way_to(server) as way:
        caller = Caller(way)
        disturbing = threading.Thread(target=disturb, args=(caller, way.relay, over, 5))
        disturbing.start()
        try:
            with ThreadPoolExecutor(16) as threads:
                kinds = Counter(threads.map(caller.call, range(CALLS)))
        finally:
            over.set()
            disturbing.join()
        for direction in ("up", "down"):
            way.relay.cut_after(direction, 1 << 60)
        wait_for(partial(caller.writes, "last"))  # the last cut may not have been noticed yet
        caller.close()
    assert [path.name for path in server.home.glob(".ssh-mcp-*") if path.is_file()] == []
    assert sum(kinds.values()) == CALLS
    for kind in ("quick exited", "fed exited", "killed killed", "detached exited", "written written"):
        assert kinds[kind] > CALLS / 50, kinds
    assert kinds["background exited"] > CALLS / 50, kinds
    assert sum(count for kind, count in kinds.items() if kind.endswith(("lost", "error"))) > CALLS / 50, kinds
    wait_for(lambda: not server.session_pids(), 60)
    wait_for(lambda: not processes_of(server), 60)
    del caller, way  # what has ended answers for an hour, and is kept as long
    wait_for(lambda: not Left.now(temporary).more_than(before), 30)
