"""What is checked of an order where it is carried out, and what another delivery of it does."""

import asyncio
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from conftest import Server, marker, running, wait_for
from oauth_grants import Standing
from oauth_state import State, StateDown
from services import Services
from settings import Target
from ssh_errors import RefusedError
from task_orders import Command, Order, Outcome, Seal
from task_runner import Runner

ME = "me@example.com"
KEY = secrets.token_bytes(32)
SEAL = Seal.of_members([KEY])


class Logins:
    """A store that knows whether logins were taken back, if it can be asked."""

    alive_now: bool | None = True

    async def alive(self, family: str, token: str) -> bool:
        if self.alive_now is None:
            raise StateDown("the store is down")
        return self.alive_now


@pytest.fixture
def services_of(sshd: Server, tmp_path: Path) -> Iterator[Callable[..., Services]]:
    made: list[Services] = []

    def make(**changes: Any) -> Services:
        made.append(Services(sshd.settings(audit_log=str(tmp_path / "audit"), **changes), lambda: [KEY]))
        return made[-1]

    yield make
    for services in made:
        services.close()


def order(
    services: Services, command: str, owner: str = ME, target: Target | None = None, **more: Any
) -> Order:
    """Return what a server would order for that owner, whatever is allowed here."""
    at = target or Target("tester", "127.0.0.1", services.settings.ssh_default_port)
    job_id = str(services.jobs.promise(owner, at).job_id)
    return Order(
        job_id=job_id,
        owner=owner,
        client="c",
        token="family.token",
        confirmed=False,
        command=Command(command=command, **more),
    )


def runner(services: Services, logins: Logins | None = None) -> Runner:
    return Runner(lambda: services, SEAL, Standing({ME}, cast("State", logins or Logins())))


def carried_out(
    services: Services,
    wanted: Order,
    logins: Logins | None = None,
    *,
    redelivered: bool = False,
    reports: list[str] | None = None,
) -> Outcome:
    async def report(sealed: str) -> None:
        if reports is not None:
            reports.append(sealed)

    async def run() -> str:
        return await runner(services, logins).run(SEAL.order(wanted), redelivered, report)

    return SEAL.opened_outcome(asyncio.run(run()), wanted.job_id)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"allowed_commands": "uptime"}, "ALLOWED_COMMANDS"),
        ({"read_only": True}, "READ_ONLY"),
        ({"ssh_allowed_hosts": "web1.example"}, "SSH_ALLOWED_HOSTS"),
        ({"confirm": "destructive"}, "CONFIRM"),
    ],
)
def test_order_is_refused_where_it_is_not_allowed(
    services_of: Callable[..., Services],
    sshd: Server,
    tmp_path: Path,
    changes: dict[str, Any],
    named: str,
) -> None:
    wanted = order(services_of(), f"touch {tmp_path}/ran")
    outcome = carried_out(services_of(**changes), wanted)
    assert outcome.fields is None
    assert named in outcome.text
    assert not (tmp_path / "ran").exists()
    assert named in json.loads((tmp_path / "audit").read_text().splitlines()[-1])["error"]


@pytest.mark.parametrize("alive", [False, None])
@pytest.mark.parametrize("owner", [ME, "gone@example.com"])
def test_order_of_a_login_that_does_not_count_is_refused(
    services_of: Callable[..., Services], tmp_path: Path, alive: bool | None, owner: str
) -> None:
    services, logins = services_of(), Logins()
    logins.alive_now = alive
    outcome = carried_out(services, order(services, f"touch {tmp_path}/ran", owner), logins)
    assert outcome.fields is None
    assert "login" in outcome.text
    assert not (tmp_path / "ran").exists()


def test_order_that_is_delivered_again_waits_for_what_runs(
    services_of: Callable[..., Services], tmp_path: Path
) -> None:
    first, second = services_of(), services_of()
    wanted = order(first, f"echo x >> {tmp_path}/ran; sleep 1; echo end")
    told: list[Outcome] = []
    threads = [
        threading.Thread(target=lambda at=at: told.append(carried_out(at, wanted, redelivered=True)))
        for at in (first, second, first)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.fields and outcome.fields["stdout"] for outcome in told] == ["end\n"] * 3
    assert (tmp_path / "ran").read_text() == "x\n"


def test_how_a_command_goes_is_reported_sealed(services_of: Callable[..., Services], tmp_path: Path) -> None:
    services, reports, go = services_of(), list[str](), tmp_path / "go"
    line = f"echo so far; while [ ! -e {go} ]; do sleep 0.1; done"
    wanted, other = (order(services, line) for _ in range(2))

    def let_go() -> None:
        try:
            wait_for(lambda: reports)
        finally:
            go.touch()

    thread = threading.Thread(target=let_go)
    thread.start()
    carried_out(services, wanted, reports=reports)
    thread.join()
    assert SEAL.opened_progress(reports[-1], wanted.job_id).text.endswith(" s, 7 bytes: so far")
    for opened in (SEAL.opened_progress, SEAL.opened_outcome):
        with pytest.raises(RefusedError):
            opened(reports[-1], other.job_id)
    with pytest.raises(RefusedError):
        SEAL.opened_outcome(reports[-1], wanted.job_id)


def test_order_whose_job_has_made_room_is_lost_and_not_run_again(
    services_of: Callable[..., Services], sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssh_jobs._BEGIN_SECONDS", 0.4)
    services = services_of()
    wanted = order(services, f"echo x >> {tmp_path}/ran")
    begun = carried_out(services, wanted)
    assert begun.fields is not None
    folder = begun.fields["stdout_path"].removeprefix("~/").removesuffix("/stdout")
    services.commands.run(sshd.target, f"rm -r {folder}", cancelled=lambda: None)
    again = carried_out(services, wanted, redelivered=True)
    assert again.fields is not None
    assert again.fields["status"] == "lost"
    assert (tmp_path / "ran").read_text() == "x\n"


def test_target_that_cannot_be_reached_is_an_error_the_first_time_and_later_a_doubt(
    services_of: Callable[..., Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("task_runner._PATIENCE_SECONDS", 0.5)
    services = services_of(ssh_allowed_hosts="*@*:*")
    wanted = order(services, "true", target=Target("tester", "127.0.0.1", 1))
    first = carried_out(services, wanted)
    assert first.fields is None
    assert "127.0.0.1:1" in first.text
    again = carried_out(services, wanted, redelivered=True)
    assert again.fields is not None
    assert again.fields["status"] == "lost"


def test_order_that_is_ended_before_it_begins_never_does(
    services_of: Callable[..., Services], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssh_jobs._BEGIN_SECONDS", 0.4)
    services = services_of()
    wanted = order(services, f"touch {tmp_path}/ran")
    runner(services).end(wanted)
    outcome = carried_out(services, wanted)
    assert outcome.fields is not None
    assert outcome.fields["status"] == "lost"
    assert not (tmp_path / "ran").exists()


def test_task_ends_when_its_login_is_taken_back(
    services_of: Callable[..., Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("task_runner._LOGIN_SECONDS", 0.2)
    services, logins, mark = services_of(), Logins(), marker()

    def take_back() -> None:
        wait_for(lambda: running(mark))
        logins.alive_now = False

    thread = threading.Thread(target=take_back)
    thread.start()
    outcome = carried_out(services, order(services, f"sleep 30.{mark}"), logins)
    thread.join()
    assert "taken back" in outcome.text
    wait_for(lambda: not running(mark))


def test_store_that_goes_away_ends_nothing_that_runs(
    services_of: Callable[..., Services], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("task_runner._LOGIN_SECONDS", 0.05)
    services, logins = services_of(), Logins()
    line = f"touch {tmp_path}/begun; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; echo end"

    def go_away() -> None:
        wait_for((tmp_path / "begun").exists)
        logins.alive_now = None
        (tmp_path / "go").touch()

    thread = threading.Thread(target=go_away)
    thread.start()
    outcome = carried_out(services, order(services, line), logins)
    thread.join()
    assert outcome.fields is not None
    assert outcome.fields["stdout"] == "end\n"


def test_key_of_another_installation_opens_nothing() -> None:
    wanted = Order(
        job_id="j", owner=ME, client=None, token=None, confirmed=False, command=Command(command="true")
    )
    others = Seal.of_members([secrets.token_bytes(32)])
    for text in (others.order(wanted), SEAL.outcome(Outcome(job_id="j", text="", fields=None)), "", "x"):
        with pytest.raises(RefusedError, match="SESSION_SECRET"):
            SEAL.opened_order(text)
    assert SEAL.opened_order(SEAL.order(wanted)) == wanted


def test_keys_rotate() -> None:
    wanted = Order(
        job_id="j", owner=ME, client=None, token=None, confirmed=False, command=Command(command="true")
    )
    new = Seal.of_members([secrets.token_bytes(32), KEY])
    assert new.opened_order(SEAL.order(wanted)) == wanted
    with pytest.raises(RefusedError):
        SEAL.opened_order(new.order(wanted))


def test_order_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    wanted = Order(
        job_id="j", owner=ME, client=None, token=None, confirmed=False, command=Command(command="true")
    )
    sealed, now = SEAL.order(wanted), time.time()
    monkeypatch.setattr("cryptography.fernet.time.time", lambda: now + 13 * 3600)
    with pytest.raises(RefusedError):
        SEAL.opened_order(sealed)


def test_queues_of_local_users_are_apart() -> None:
    one, other = Seal.of_local_user("a" * 64), Seal.of_local_user("b" * 64)
    assert len({one.queue, other.queue, SEAL.queue}) == 3
    assert "a" * 16 not in one.queue
