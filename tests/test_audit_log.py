"""Where a trail is kept: real files, crashes, full disks, several processes, logrotate, syslog."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import audit_log
from audit_chain import Check, Finding, digest, parsed
from audit_log import FileLog, SentLog, open_log, try_log
from conftest import program
from settings import SettingsError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path / "log" / "audit.jsonl"


def write(path: Path, *commands: str) -> None:
    with closing(FileLog(path)) as log:
        for command in commands:
            log.write([{"event": "intent", "command": command}])


def records(*paths: Path) -> list[dict[str, Any]]:
    lines = [line for path in paths for line in path.read_bytes().splitlines()]
    return [record for line in lines if (record := parsed(line)) is not None]


def commands(*paths: Path) -> list[str]:
    return [record["command"] for record in records(*paths) if record["event"] == "intent"]


def checked(*paths: Path) -> list[Finding]:
    """What is found in a trail's files, its own key known."""
    key = audit_log._key(paths[-1].with_name(".audit.jsonl.key")).public_key()
    return list(
        Check([key]).run([(str(path), path.read_bytes().splitlines(keepends=True)) for path in paths])
    )


def altered(*paths: Path) -> list[Finding]:
    return [found for found in checked(*paths) if found.altered]


def test_chain_goes_on_after_a_restart(path: Path) -> None:
    write(path, "a", "b")
    write(path, "c")
    assert commands(path) == ["a", "b", "c"]
    assert [record["sequence"] for record in records(path)] == [1, 2, 3, 4]
    assert checked(path) == []


def test_files_are_their_owners_alone(path: Path) -> None:
    before = os.umask(0)
    try:
        write(path, "a")
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == dict.fromkeys(
        ("audit.jsonl", ".audit.jsonl.state", ".audit.jsonl.key"), 0o600
    )


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        ("audit.jsonl", 0o620, "chmod go-w"),
        ("audit.jsonl", 0o602, "chmod go-w"),
        (".audit.jsonl.state", 0o602, "chmod go-w"),
        (".audit.jsonl.key", 0o640, "chmod 600"),
    ],
)
def test_what_others_may_change_or_forge_is_refused(path: Path, name: str, mode: int, words: str) -> None:
    write(path, "a")
    path.with_name(name).chmod(mode)
    with pytest.raises(SettingsError, match=f"AUDIT_LOG.*{words}"):
        FileLog(path)


def test_log_that_others_come_to_be_able_to_write_is_written_no_more_after_rotation(path: Path) -> None:
    with closing(FileLog(path)) as log:
        log.write([{"event": "intent", "command": "a"}])
        path.rename(path.with_suffix(".1"))
        path.touch()
        path.chmod(0o666)
        with pytest.raises(SettingsError, match="others may write"):
            log.write([{"event": "intent", "command": "b"}])
        assert path.read_bytes() == b""
        path.chmod(0o600)
        log.write([{"event": "intent", "command": "c"}])
    assert commands(path.with_suffix(".1"), path) == ["a", "c"]
    assert altered(path.with_suffix(".1"), path) == []


@pytest.mark.parametrize("name", ["audit.jsonl", ".audit.jsonl.state", ".audit.jsonl.key"])
def test_file_of_another_account_is_refused(path: Path, name: str) -> None:
    assert os.geteuid() == 0, "this test gives files away: run it as root"
    write(path, "a")
    os.chown(path.with_name(name), 1234, 1234)
    with pytest.raises(SettingsError, match=f"AUDIT_LOG.*{name} belongs to another account"):
        FileLog(path)


@pytest.mark.parametrize("open_it", [open_log, try_log])
def test_place_where_no_file_can_be_is_told(open_it: Callable[[str], object]) -> None:
    with pytest.raises(SettingsError, match="AUDIT_LOG is '/', which cannot be written"):
        open_it("/")


def test_trying_a_trail_finds_what_opening_it_would_and_makes_nothing(path: Path) -> None:
    write(path, "a")
    path.with_name(".audit.jsonl.state").unlink()
    assert try_log(str(path)) is False
    path.with_name(".audit.jsonl.key").chmod(0o644)
    with pytest.raises(SettingsError, match="others may read its key"):
        try_log(str(path))
    assert not path.with_name(".audit.jsonl.state").exists()


def test_fifo_in_the_place_of_the_key_holds_nobody_up(path: Path) -> None:
    os.mkfifo(path.with_name(".audit.jsonl.key"), 0o600)
    with pytest.raises(SettingsError, match="no Ed25519 key"):
        FileLog(path)


@pytest.mark.parametrize("where", ["/nowhere/audit.jsonl", "fd:987", "syslog:/nowhere"])
def test_place_that_cannot_be_written_is_one_sentence(where: str) -> None:
    with pytest.raises(SettingsError, match=f"AUDIT_LOG is '{where}'"):
        open_log(where)


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to(os.devnull)])
def test_what_is_no_file_is_refused(path: Path, make: Any) -> None:
    make(path)
    with pytest.raises(SettingsError, match="is no file"):
        FileLog(path)


def test_key_that_is_none_is_refused(path: Path) -> None:
    key = path.with_name(".audit.jsonl.key")
    key.touch(mode=0o600)
    key.write_text("x")
    with pytest.raises(SettingsError, match="no Ed25519 key"):
        FileLog(path)
    key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(key)], check=True)
    with pytest.raises(SettingsError, match="no Ed25519 key"):
        FileLog(path)


def test_public_key_is_what_ssh_keygen_prints(path: Path) -> None:
    with closing(FileLog(path)) as log:
        key = path.with_name(".audit.jsonl.key")
        shown = subprocess.run(
            ["ssh-keygen", "-y", "-f", str(key)], capture_output=True, text=True, check=True
        )
        assert shown.stdout.split()[:2] == (log.public_key or "").split()


def test_operators_own_key_signs(path: Path) -> None:
    key = path.with_name(".audit.jsonl.key")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    write(path, "a")
    assert checked(path) == []


def test_each_of_the_records_written_together_is_signed(path: Path) -> None:
    with closing(FileLog(path)) as log:
        log.write([{"event": "intent", "command": str(n)} for n in range(3)])
    assert ["signature" in record for record in records(path)] == [True] * 4
    assert checked(path) == []


def test_renamed_file_is_followed_by_a_new_one_in_the_same_chain(path: Path) -> None:
    old = path.with_suffix(".jsonl.1")
    with closing(FileLog(path)) as log, closing(FileLog(path)) as other:
        log.write([{"event": "intent", "command": "a"}])
        path.rename(old)
        other.write([{"event": "intent", "command": "b"}])
        log.write([{"event": "intent", "command": "c"}])
    assert (commands(old), commands(path)) == (["a"], ["b", "c"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert checked(old, path) == []


def test_file_renamed_while_no_server_runs_is_followed_in_the_same_chain(path: Path) -> None:
    old = path.with_suffix(".jsonl.1")
    write(path, "a")
    path.rename(old)
    write(path, "b")
    assert records(path)[0]["event"] == "file"
    assert checked(old, path) == []


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("create", ["nocreate", "create"])
def test_logrotate_splits_no_chain(path: Path, tmp_path: Path, running: bool, create: str) -> None:
    config = tmp_path / "logrotate.conf"
    config.write_text(f"{path} {{\n  size 1\n  rotate 9\n  {create}\n}}\n")
    config.chmod(0o600)
    rotate = [program("logrotate", "logrotate"), "-f", "-s", str(tmp_path / "rotated"), str(config)]
    log = FileLog(path)
    for number in range(3):
        log.write([{"event": "intent", "command": str(number)}])
        if not running:
            log.close()
        subprocess.run(rotate, check=True, capture_output=True)
        if not running:
            log = FileLog(path)
    log.write([{"event": "intent", "command": "3"}])
    log.close()
    files = [*sorted(path.parent.glob("audit.jsonl.*"), reverse=True), path]
    assert [commands(file) for file in files] == [["0"], ["1"], ["2"], ["3"]]
    assert checked(*files) == []


@pytest.mark.parametrize("lost", [True, False])
def test_copytruncate_splits_no_chain_and_what_it_loses_is_found(path: Path, lost: bool) -> None:
    old = path.with_suffix(".jsonl.1")
    with closing(FileLog(path)) as log:
        log.write([{"event": "intent", "command": "a"}])
        shutil.copy(path, old)
        if lost:
            log.write([{"event": "intent", "command": "b"}])
        os.truncate(path, 0)
        log.write([{"event": "intent", "command": "c"}])
    assert [found.sentence for found in altered(old, path)] == ["record 3 is missing before this one"] * lost


def test_new_file_with_the_inode_of_the_old_is_no_damage(path: Path) -> None:
    """As when logrotate packs the old one and no server runs."""
    write(path, "a")
    os.truncate(path, 0)
    write(path, "b")
    assert altered(path) == []
    assert records(path)[0]["event"] == "file"


def test_full_file_takes_no_other_files_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "_FILE_BYTES", 1)
    other = path.with_name("audit.jsonl.000000000002")
    other.write_text("of another trail")
    with closing(FileLog(path)) as log:
        log.write([{"event": "intent", "command": "a"}])
        with pytest.raises(FileExistsError, match="000000000002 is there already"):
            log.write([{"event": "intent", "command": "b"}])
        assert other.read_text() == "of another trail"
        other.unlink()
        log.write([{"event": "intent", "command": "c"}])
    assert (commands(other), commands(path)) == (["a"], ["c"])


def test_full_file_is_renamed_by_its_last_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "_FILE_BYTES", 1000)
    write(path, *(f"{number:0300d}" for number in range(7)))
    files = [*sorted(path.parent.glob("audit.jsonl.*")), path]
    assert len(files) == 4
    assert [int(command) for command in commands(*files)] == list(range(7))
    for file in files[:-1]:
        assert int(file.suffix[1:]) == records(file)[-1]["sequence"]
    assert checked(*files) == []


@pytest.mark.parametrize("cut", [1, 20, 400, 700])
def test_end_cut_off_while_no_server_runs_is_told(path: Path, cut: int) -> None:
    write(path, "a", "b", "c")
    os.truncate(path, max(0, path.stat().st_size - cut))
    write(path, "d")
    assert any("damage" in found.sentence for found in altered(path))
    assert commands(path)[-1] == "d"
    assert records(path)[-1]["sequence"] == 6


@pytest.mark.parametrize("replaced", [True, False])
def test_altered_last_record_is_found_once_another_follows(path: Path, replaced: bool) -> None:
    """In place, or by an editor that leaves another file there."""
    write(path, "a", "b")
    text = path.read_bytes().replace(b'"b"', b'"x"')
    if replaced:
        path.unlink()
        path.touch(mode=0o600)
    path.write_bytes(text)
    write(path, "c")
    assert altered(path)


def test_older_copy_in_the_files_place_is_told(path: Path) -> None:
    write(path, "a")
    text = path.read_bytes()
    write(path, "b")
    path.unlink()
    path.touch(mode=0o600)
    path.write_bytes(text)
    write(path, "c")
    assert any("record 3" in found.sentence for found in altered(path))
    assert records(path)[-1]["sequence"] == 5


def unacknowledged(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


@pytest.mark.parametrize("length", [1, 2, 30, 200, -2])
def test_part_of_a_record_after_a_crash_is_kept_and_named(path: Path, length: int) -> None:
    write(path, "a", "b")
    text = path.read_bytes().splitlines()[-1][:length]
    unacknowledged(path, text)
    write(path, "c")
    (found,) = checked(path)
    assert not found.altered
    assert text in path.read_bytes()
    (named,) = [record for record in records(path) if record["event"] == "torn"]
    assert (named["bytes"], named["sha256"]) == (len(text), digest(text))


def test_crash_while_a_part_is_named_is_named_too(path: Path) -> None:
    write(path, "a")
    unacknowledged(path, b'{"sequence":3,"ti\n{"sequence":3,"time"')
    write(path, "b")
    assert [found.altered for found in checked(path)] == [False, False]


def test_whole_record_that_was_not_acknowledged_stays_in_the_chain(path: Path) -> None:
    write(path, "a")
    state = path.with_name(".audit.jsonl.state")
    before = state.read_bytes()
    write(path, "b")
    state.write_bytes(before)
    os.truncate(path, path.stat().st_size - 1)
    write(path, "c")
    assert commands(path) == ["a", "b", "c"]
    assert checked(path) == []


@pytest.mark.parametrize("state", [b"", b"\0" * 128, b"1 2", b"\xff" * 128])
def test_lost_state_costs_no_chain(path: Path, state: bytes) -> None:
    write(path, "a")
    path.with_name(".audit.jsonl.state").write_bytes(state)
    write(path, "b")
    assert checked(path) == []


def test_part_of_a_record_is_no_proven_crash_without_the_state(path: Path) -> None:
    write(path, "a", "b")
    path.with_name(".audit.jsonl.state").unlink()
    os.truncate(path, path.stat().st_size - 30)
    write(path, "c")
    assert any("nothing says since when" in found.sentence for found in altered(path))


WRITER = r"""
import os, sys, threading
from pathlib import Path
from audit import Trail
from audit_log import FileLog
name, path, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
trail = Trail(FileLog(path), lambda _: None)
def work(thread):
    for number in range(10 ** 6 if threads == 1 else 15):
        command = f"{name}.{thread}.{number}"
        trail.append({"event": "intent", "command": command})
        os.write(1, f"{command}\n".encode())
workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
for worker in workers: worker.start()
for worker in workers: worker.join()
trail.close()
"""


@contextmanager
def writer(name: str, path: Path, threads: int) -> Iterator["subprocess.Popen[str]"]:
    """A process that writes records, and prints each command once its record is acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, name, str(path), str(threads)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_processes_and_threads_that_write_at_once_make_one_chain(path: Path) -> None:
    with writer("one", path, 8) as one, writer("two", path, 8) as two:
        said = [process.communicate(timeout=60)[0].split() for process in (one, two)]
    acknowledged = [command for lines in said for command in lines]
    assert len(acknowledged) == 2 * 8 * 15
    assert sorted(commands(path)) == sorted(acknowledged)
    assert checked(path) == []


def test_process_killed_at_any_moment_loses_nothing_that_it_acknowledged(path: Path) -> None:
    chance = random.Random(7)
    acknowledged: list[str] = []
    with ExitStack() as stack:
        for process in [stack.enter_context(writer(f"p{number}", path, 1)) for number in range(3)]:
            assert process.stdout is not None
            acknowledged += [process.stdout.readline().strip() for _ in range(chance.randrange(1, 60))]
            process.send_signal(signal.SIGKILL)
            acknowledged += process.stdout.read().split("\n")[:-1]
    write(path, "after")
    assert "" not in acknowledged
    assert set(acknowledged) < set(commands(path))
    assert altered(path) == []


def test_stopped_process_that_holds_the_lock_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "_LOCK_SECONDS", 0.05)
    with (
        closing(FileLog(path)) as log,
        closing(FileLog(path)) as other,
        other._alone(),
        pytest.raises(TimeoutError, match="another process"),
    ):
        log.write([{"event": "intent"}])


def test_full_disk_acknowledges_nothing_and_harms_no_chain(small_disk: Path) -> None:
    path = small_disk / "audit.jsonl"
    acknowledged, number = [], 0
    with closing(FileLog(path)) as log:
        with (small_disk / "ballast").open("wb") as ballast:
            ballast.write(b"x" * 180_000)
        with suppress(OSError):
            while number < 1000:
                log.write([{"event": "intent", "command": f"{number:0700d}"}])
                acknowledged.append(number)
                number += 1
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                log.write([{"event": "intent", "command": "x" * 5000}])
        (small_disk / "ballast").unlink()
        log.write([{"event": "intent", "command": "1000000"}])
    assert 0 < len(acknowledged) < 1000
    assert [int(command) for command in commands(path)] == [*acknowledged, 1_000_000]
    assert altered(path) == []


def test_disk_that_does_not_flush_acknowledges_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with closing(FileLog(path)) as log:
        log.write([{"event": "intent", "command": "a"}])
        state = path.with_name(".audit.jsonl.state").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            with pytest.raises(OSError, match="Input/output"):
                log.write([{"event": "intent", "command": "b"}])
        assert path.with_name(".audit.jsonl.state").read_bytes() == state
        log.write([{"event": "intent", "command": "c"}])
    assert altered(path) == []


def test_limit_of_file_size_acknowledges_nothing(path: Path) -> None:
    with closing(FileLog(path)) as log:
        log.write([{"event": "intent", "command": "a"}])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                log.write([{"event": "intent", "command": "b"}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.write([{"event": "intent", "command": "c"}])
    assert commands(path) == ["a", "c"]
    (found,) = checked(path)
    assert "crash" in found.sentence


def test_syslog_gets_a_datagram_for_each_record(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "log"))
        log = open_log(f"syslog:{tmp_path}/log")
        log.write([{"event": "intent", "command": "a"}, {"event": "outcome"}])
        received = [daemon.recv(10_000) for _ in range(2)]
        log.close()
    assert all(one.startswith(f"<86>ssh-mcp-server[{os.getpid()}]: {{".encode()) for one in received)
    first, second = (one.partition(b": ")[2] for one in received)
    assert json.loads(second)["previous"] == digest(first)


def test_syslog_that_went_away_is_an_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "log"))
        log = open_log(f"syslog:{tmp_path}/log")
    with closing(log), pytest.raises(ConnectionRefusedError):
        log.write([{"event": "intent"}])


def test_syslog_daemon_that_was_started_anew_gets_the_next_record(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "log"))
        log = open_log(f"syslog:{tmp_path}/log")
        log.write([{"event": "intent"}])
    with closing(log), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        (tmp_path / "log").unlink()
        daemon.bind(str(tmp_path / "log"))
        log.write([{"event": "outcome"}])
        assert b'"sequence":2' in daemon.recv(10_000)


def test_syslog_daemon_that_is_stopped_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "_TAKE_SECONDS", 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "log"))
        with closing(open_log(f"syslog:{tmp_path}/log")) as log:
            with pytest.raises(BlockingIOError):
                log.write([{"event": "intent"}] * 100_000)
            daemon.recv(10_000)
            log.write([{"event": "intent"}])


def test_pipe_that_nobody_reads_is_an_error_and_its_next_line_stands_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit_log, "_TAKE_SECONDS", 1)
    reading, writing = os.pipe()
    log = open_log(f"fd:{writing}")
    with pytest.raises(TimeoutError, match="nobody reads"):
        log.write([{"event": "intent", "command": "x" * 200_000}])
    part = os.read(reading, 200_000)
    log.write([{"event": "intent", "command": "a"}])
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        lines = (part + file.read()).splitlines()
    assert [record and record["command"] for record in map(parsed, lines)] == [None, "a"]


def test_descriptor_gets_a_line_for_each_record() -> None:
    reading, writing = os.pipe()
    log = open_log(f"fd:{writing}")
    assert isinstance(log, SentLog)
    thread = threading.Thread(target=log.write, args=([{"event": "intent", "command": "x" * 200_000}] * 2,))
    thread.start()
    with os.fdopen(reading, "rb") as file:
        lines = [file.readline(), file.readline()]
        thread.join()
    assert json.loads(lines[1])["previous"] == digest(lines[0][:-1])
    with pytest.raises(BrokenPipeError):
        log.write([{"event": "intent"}])
    os.close(writing)
