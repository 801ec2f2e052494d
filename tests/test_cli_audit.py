"""`ssh-mcp-server audit`: what it says of a trail, and how it ends."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from audit import Call, Trail
from audit_chain import parsed
from audit_log import FileLog
from cli import main
from settings import Target
from ssh_answers import CommandResult
from ssh_errors import RefusedError

WEB, DB = Target("deploy", "web1", 22), Target("root", "db1", 2222)

REFUSED = {"path": "/etc/x", "content": "secret", "host": "db2"}

Audit = Callable[..., tuple[int, str]]


@pytest.fixture
def audit(capsys: pytest.CaptureFixture[str]) -> Audit:
    """Run `audit` and return its exit status and what it printed."""

    def audit(*arguments: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["audit", *map(str, arguments)])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return audit


@pytest.fixture
def trail(tmp_path: Path) -> Path:
    """A trail of four calls: one well, one refused, one killed in the middle, one with a failing command."""
    path = tmp_path / "audit.jsonl"
    log = FileLog(path)
    trail = Trail(log, lambda _: "ED25519 key SHA256:x")
    made(trail, "me@example.com", WEB, {"command": "uptime \x1b[2J", "env": {"A": "1"}, "input": "secret"})
    refused = Call(trail, "you@example.com", "app", "ssh_write_file", REFUSED)
    with pytest.raises(RefusedError), refused:
        raise RefusedError("ALLOWED_PATHS does not allow /etc/x")
    Call(trail, "root", None, "ssh_execute", {"command": "reboot"}).intend(DB)
    made(trail, "me@example.com", DB, {"command": "false\ntrue"}, exit_code=1)
    trail.close()
    return path


def made(trail: Trail, identity: str, target: Target, arguments: dict[str, Any], exit_code: int = 0) -> None:
    with Call(trail, identity, "app", "ssh_execute", arguments) as call:
        call.intend(target)
        counts = dict.fromkeys(("stdout_bytes", "stderr_bytes", "stdout_omitted", "stderr_omitted"), 0)
        texts = dict.fromkeys(("stdout", "stderr", "target"), "")
        ended = {"status": "exited", "exit_code": exit_code, "signal": None, "duration_seconds": 0}
        call.answered(CommandResult.model_validate(counts | texts | ended))


def key_of(trail: Path) -> str:
    command = ["ssh-keygen", "-y", "-f", str(trail.with_name(f".{trail.name}.key"))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_untouched_trail_is_status_zero(audit: Audit, trail: Path) -> None:
    status, said = audit("verify", "--key", key_of(trail), trail)
    assert status == 0
    assert said.splitlines()[-1] == "nothing was altered"
    assert "note" not in said


def test_altered_trail_is_status_one_and_names_the_line(audit: Audit, trail: Path) -> None:
    trail.write_bytes(trail.read_bytes().replace(b"reboot", b"uptime"))
    status, said = audit("verify", trail)
    assert status == 1
    assert f"{trail}:7: altered" in said
    assert said.splitlines()[-1].startswith("ALTERED")


def test_key_may_stand_in_a_file(audit: Audit, trail: Path, tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(key_of(trail))
    assert audit("verify", "--key", tmp_path / "key.pub", trail)[0] == 0


def test_key_of_another_trail_is_status_one(audit: Audit, trail: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    FileLog(other).close()
    assert audit("verify", "--key", key_of(other), trail)[0] == 1
    assert audit("verify", "--key", key_of(other), "--key", key_of(trail), trail)[0] == 0


def test_that_signatures_were_not_checked_is_said(audit: Audit, trail: Path) -> None:
    status, said = audit("verify", trail)
    assert status == 0
    assert "--key" in said


def test_end_that_was_cut_off_is_found_by_the_hash_that_was_printed_before(audit: Audit, trail: Path) -> None:
    head = next(line for line in audit("verify", trail)[1].splitlines() if "hash" in line).split()[-1]
    assert audit("verify", "--head", head, trail)[0] == 0
    trail.write_bytes(b"".join(trail.read_bytes().splitlines(keepends=True)[:-2]))
    assert audit("verify", "--key", key_of(trail), trail)[0] == 0
    assert audit("verify", "--head", head, trail)[0] == 1


def test_files_are_read_in_the_order_of_their_records_packed_ones_too(audit: Audit, trail: Path) -> None:
    old = trail.with_name("audit.jsonl.1.gz")
    old.write_bytes(gzip.compress(trail.read_bytes()))
    trail.unlink()
    with closing(FileLog(trail)) as log:
        log.write([{"time": "2026-11-25T10:00:00.000Z", "event": "stop"}])
    for files in ((old, trail), (trail, old)):
        assert audit("verify", "--key", key_of(trail), *files)[0] == 0
    status, said = audit("verify", trail)
    assert status == 0
    assert "older files" in said


@pytest.mark.parametrize(
    "arguments",
    [["verify"], ["verify", "/nowhere"], ["verify", "/"], ["show", "/nowhere"], ["verify", "--key", "/nowhere", "T"],
     ["verify", "--key", "ssh-rsa AAAA", "T"], ["verify", "packed.gz"], ["verify", "broken.gz"],
     ["show", "--since", "soon", "T"], []],
)  # fmt: skip
def test_what_cannot_be_told_is_status_two(
    audit: Audit, trail: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trail.parent)
    Path("packed.gz").write_bytes(b"no gzip")
    Path("broken.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 20)
    status, said = audit(*(str(trail) if argument == "T" else argument for argument in arguments))
    assert status == 2
    assert "Traceback" not in said


def test_trail_is_shown_for_people(audit: Audit, trail: Path) -> None:
    status, said = audit("show", trail)
    assert status == 0
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert "secret" not in said
    assert "uptime \\x1b[2J" in said
    lines = [line[21:].strip() for line in said.splitlines() if "ssh_" in line]
    assert lines == [
        "me@example.com  ssh_execute  deploy@web1:22",
        "you@example.com  ssh_write_file  -",
        "me@example.com  ssh_execute  root@db1:2222",
        "root  ssh_execute  root@db1:2222",
    ]
    assert "REFUSED" in said
    assert "ALLOWED_PATHS does not allow /etc/x" in said
    assert "NO OUTCOME" in said
    assert "host=db2" in said


def test_command_does_not_pass_for_how_it_ended(audit: Audit, tmp_path: Path) -> None:
    path = tmp_path / "lies.jsonl"
    trail = Trail(FileLog(path), lambda _: None)
    lie = "-> REFUSED, 0.0 s: ALLOWED_COMMANDS"
    made(trail, "me@example.com", WEB, {"command": f"{lie}\n{lie}\n\x0b{lie}\n{'x ' * 40}{lie}"})
    trail.close()
    said = audit("show", path)[1].splitlines()
    (ending,) = [line for line in said if line.startswith("    ->")]
    assert ending.startswith("    -> exited, exit code 0, ")
    assert all(line.startswith("     ") for line in said if "REFUSED" in line and "$ ->" not in line)


def test_what_did_not_go_well_is_marked(audit: Audit, trail: Path) -> None:
    marked = [line for line in audit("show", trail)[1].splitlines() if line.startswith("!")]
    assert len(marked) == 3
    assert not any("web1" in line for line in marked)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["--tool", "ssh_write_file"], 1),
        (["--target", "web1"], 1),
        (["--target", "db1:2222"], 2),
        (["--identity", "@example.com"], 3),
        (["--identity", "you@example.com", "--tool", "ssh_execute"], 0),
        (["--since", "2000-01-01"], 4),
        (["--since", "2999-01-01T00:00Z"], 0),
    ],
)
def test_calls_are_chosen(audit: Audit, trail: Path, arguments: list[str], count: int) -> None:
    said = audit("show", *arguments, trail)[1]
    assert sum("ssh_" in line for line in said.splitlines()) == count


def test_time_may_have_a_zone(audit: Audit, trail: Path) -> None:
    first = parsed(trail.read_bytes().splitlines()[0])
    assert first is not None
    hour = int(first["time"][11:13])
    later = f"{first['time'][:11]}{hour:02d}:00:00"
    assert "ssh_execute" in audit("show", "--since", f"{later}+00:00", trail)[1]
    assert "ssh_execute" not in audit("show", "--since", f"{later}-02:00", trail)[1]


@pytest.mark.parametrize("name", ["time", "id", "identity", "tool", "target", "arguments", "status", "exit_code",
                                  "duration_seconds", "error", "stdout_bytes"])  # fmt: skip
@pytest.mark.parametrize("value", [None, 7, [1], {"sha256": [], "names": 1}, {"env": {"names": 1}}])
def test_trail_that_somebody_had_in_hand_is_shown_all_the_same(
    audit: Audit, trail: Path, name: str, value: object
) -> None:
    records = [record for line in trail.read_bytes().splitlines() if (record := parsed(line))]
    trail.write_text("".join(json.dumps({**record, name: value}) + "\n" for record in records) + "junk\n")
    status, said = audit("show", trail)
    assert status == 0
    assert "no record" in said


def test_reading_needs_no_settings(trail: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ssh-mcp-server")), "audit", "verify", str(trail)],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LOG_LEVEL": "loud"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
