"""A model of a job's life, driven at random against a real sshd: what it said, how it ended, who may ask."""

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from conftest import Server, nobody_cancels
from ssh_answers import CommandResult
from ssh_commands import Commands
from ssh_errors import ArgumentError
from ssh_jobs import Jobs
from ssh_kill import Signal
from ssh_pool import Pool
from ssh_shells import Task

KEY = "k" * 64
LISTENS = """\
exec 3<>{}
echo ready
while IFS= read -r line <&3; do
case $line in exit*) exit "${{line#exit }}" ;; *) printf '%s\\n' "$line" ;; esac
done"""


@dataclass
class Model:
    """What is known of a job without asking for it."""

    pipe: Path
    job_id: str
    background: bool
    said: str = "ready\n"
    cursor: str | None = None
    read: str = ""
    exit_code: int | None = None
    signal: str | None = None
    forgotten: bool = False
    answers: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.exit_code is not None or self.signal is not None

    def tell(self, line: str) -> None:
        with self.pipe.open("w") as pipe:
            pipe.write(f"{line}\n")


class Life(RuleBasedStateMachine):
    """Jobs of one owner, detached and in the background; the server may be restarted in between."""

    server: ClassVar[Server]
    jobs_known = Bundle[Model]("jobs_known")

    def __init__(self) -> None:
        super().__init__()
        self.models: list[Model] = []
        self._begin()

    def _begin(self) -> None:
        self.pool = Pool(self.server.settings())
        self.commands = Commands(self.pool, self.server.settings())
        self.jobs = Jobs(self.commands, lambda: KEY)
        self.commands.run(self.server.target, "true", cancelled=nobody_cancels)

    def _end(self) -> None:
        self.commands.stop()
        self.jobs.close()
        self.pool.close()

    @rule(target=jobs_known, background=st.booleans())
    def start(self, background: bool) -> Model:
        pipe = self.server.home / secrets.token_hex(8)
        os.mkfifo(pipe)
        task = Task.of(LISTENS.format(pipe))
        if background:
            begun = self.jobs.start_background("me", self.server.target, task, cancelled=nobody_cancels)
        else:
            begun = self.jobs.execute(
                "me", self.server.target, task, timeout=1, on_timeout="detach", cancelled=nobody_cancels
            )
        assert begun.status == "running"
        assert begun.job_id
        model = Model(pipe, begun.job_id, background, cursor=begun.cursor, read=begun.stdout)
        self.models.append(model)
        while not model.read:
            self.ask_for_more(model)
        return model

    @rule(
        model=jobs_known, line=st.text("aä€😀 '\"\\$", min_size=1, max_size=20).map(lambda text: f"+{text}")
    )
    def say(self, model: Model, line: str) -> None:
        if not (model.over or model.forgotten):
            model.tell(line)
            model.said += f"{line}\n"

    @rule(model=jobs_known)
    def ask_for_more(self, model: Model) -> None:
        if (answer := self._ask(model, cursor=model.cursor, timeout=0.05)) is not None:
            model.read += answer.stdout
            model.cursor = answer.cursor
            assert model.said.startswith(model.read)
            assert answer.stdout_bytes >= len(model.read.encode())

    @rule(model=jobs_known)
    def ask_from_the_beginning(self, model: Model) -> None:
        if (answer := self._ask(model, timeout=0.05)) is not None:
            assert answer.stdout.startswith(model.read)
            assert model.said.startswith(answer.stdout)

    @rule(model=jobs_known, code=st.integers(0, 100))
    def end(self, model: Model, code: int) -> None:
        if not (model.over or model.forgotten):
            model.tell(f"exit {code}")
            model.exit_code = code

    @rule(model=jobs_known, name=st.sampled_from(("INT", "TERM", "KILL", "HUP")))
    def signal(self, model: Model, name: Signal) -> None:
        if not model.over and self._ask(model, signal=name, timeout=20) is not None:
            model.signal = name
            model.said = self._read_to_the_end(model)

    @rule(model=jobs_known)
    def kill(self, model: Model) -> None:
        if not model.over and self._ask(model, on_timeout="kill", timeout=0.05) is not None:
            model.signal = "TERM"
            model.said = self._read_to_the_end(model)

    @rule(model=jobs_known)
    def somebody_else_asks(self, model: Model) -> None:
        with pytest.raises(ArgumentError, match="unknown job"):
            self.jobs.go_on("you", model.job_id, on_timeout="detach", cancelled=nobody_cancels)

    @rule()
    def restart(self) -> None:
        for model in self.models:
            if not model.background and not model.over:
                self._ask(model, signal="KILL")
            model.forgotten |= not model.background
        self._end()
        self._begin()

    @rule(model=jobs_known)
    def wait_for_the_end(self, model: Model) -> None:
        if model.over and not model.forgotten:
            assert self._read_to_the_end(model) == model.said

    def _read_to_the_end(self, model: Model) -> str:
        answer = self._ask(model, cursor=model.cursor, timeout=20)
        assert answer is not None
        model.read += answer.stdout
        model.cursor = answer.cursor
        whole = self._ask(model, timeout=20)
        assert whole is not None
        assert whole.stdout == model.read
        expected = "killed" if model.signal else "exited"
        assert (whole.status, whole.signal) == (expected, model.signal), whole
        assert model.signal or whole.exit_code == model.exit_code
        return model.read

    def _ask(self, model: Model, **more: object) -> CommandResult | None:
        """Ask for a job, as its owner; None, which is checked, when the server must not know it any more."""
        given = {"on_timeout": "detach", "timeout": 5} | more
        if model.forgotten:
            with pytest.raises(ArgumentError, match="no longer known"):
                self.jobs.go_on("me", model.job_id, cancelled=nobody_cancels, **given)  # type: ignore[arg-type]
            return None
        answer = self.jobs.go_on("me", model.job_id, cancelled=nobody_cancels, **given)  # type: ignore[arg-type]
        assert answer.stderr == ""
        assert answer.status == "running" or model.over or more.get("signal") or more.get("on_timeout")
        return answer

    @invariant()
    def memory_and_sessions_are_bounded(self) -> None:
        going = sum(not (model.over or model.forgotten or model.background) for model in self.models)
        assert len(self.jobs._jobs) <= len(self.models)
        assert self.pool.open_targets().get(self.server.target, 0) <= 1 + going // 4

    def teardown(self) -> None:
        for model in self.models:
            if not (model.over or model.forgotten):
                self._ask(model, signal="KILL")
            model.pipe.unlink()
        self._end()


@pytest.fixture
def server(sshd: Server) -> Iterator[Server]:
    Life.server = sshd
    yield sshd
    del Life.server


def test_jobs_live_as_the_model_says(server: Server) -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=12,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
