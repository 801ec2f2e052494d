"""The system report: the script on what is here, the parser on what was recorded elsewhere."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import program
from ssh_system import SCRIPT, CPUTimes, SystemInfo, parse

RECORDED = Path(__file__).parent / "recorded"


def look(shell: list[str], **environment: str) -> SystemInfo:
    done = subprocess.run(
        [*shell, "-c", SCRIPT], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return parse(done.stdout)[0]


def recorded(name: str) -> SystemInfo:
    return parse((RECORDED / name).read_text())[0]


@pytest.fixture
def busybox_only(tmp_path: Path) -> str:
    """A PATH with nothing but BusyBox on it."""
    busybox = program("busybox", "busybox")
    for applet in subprocess.run(
        [busybox, "--list"], capture_output=True, text=True, check=True
    ).stdout.split():
        (tmp_path / applet).symlink_to(busybox)
    return str(tmp_path)


def assert_tells_of_this_machine(info: SystemInfo) -> None:
    kernel = os.uname()
    assert info.hostname == kernel.nodename
    assert (info.os.kernel, info.os.architecture) == (kernel.release, kernel.machine)
    assert info.cpu.cores == os.cpu_count()
    assert info.cpu.usage_percent is not None
    assert 0 <= info.cpu.usage_percent <= 100
    assert info.memory is not None
    assert info.memory.total_bytes == int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < info.memory.used_bytes < info.memory.total_bytes
    assert info.uptime_seconds is not None
    assert abs(info.uptime_seconds - float(Path("/proc/uptime").read_text().split()[0])) < 60
    assert info.load_average is not None
    (root,) = [disk for disk in info.disks if disk.mount == "/"]
    status = os.statvfs("/")
    assert root.total_bytes == status.f_blocks * status.f_frsize
    assert root.filesystem


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "zsh", "ksh"])
def test_every_shell_runs_the_script(shell: str) -> None:
    assert_tells_of_this_machine(look([shell]))


def test_busybox_alone_is_enough(busybox_only: str) -> None:
    assert_tells_of_this_machine(look([f"{busybox_only}/sh"], PATH=busybox_only))


def test_thin_proc_gives_nulls(tmp_path: Path) -> None:
    info = look(["sh"], proc=str(tmp_path))
    assert (info.uptime_seconds, info.load_average, info.memory, info.swap) == (None, None, None, None)
    assert (info.cpu.cores, info.cpu.usage_percent) == (None, None)
    assert "/" in [disk.mount for disk in info.disks]
    assert info.text().startswith("host ")


def test_report_shows_how_full_things_are_in_80_columns() -> None:
    shown = recorded("macos-14.txt").text()
    assert "disk    [######----]  56 %  119 GiB of 228 GiB  /System/Volumes/Data (apfs)\n" in shown
    for name in ("macos-14.txt", "freebsd-14.txt", "openbsd-7.txt"):
        assert max(len(line) for line in recorded(name).text().split("\n")) <= 80


def test_missing_programs_give_nulls(tmp_path: Path) -> None:
    for name in ("cat", "grep"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    info = look(["/bin/sh"], PATH=str(tmp_path))
    assert (info.hostname, info.disks) == ("", [])


def test_macos_is_read() -> None:
    info = recorded("macos-14.txt")
    assert (info.os.name, info.os.version, info.os.kernel) == ("macOS", "14.6.1", "23.6.0")
    assert (info.cpu.model, info.cpu.cores, info.cpu.usage_percent) == ("Apple M2", 8, None)
    assert info.uptime_seconds == 1_732_400_000 - 1_732_000_000
    assert info.load_average == [1.53, 1.71, 1.8]
    assert info.memory is not None
    assert info.memory.total_bytes == 8_589_934_592
    assert info.memory.available_bytes == (10_000 + 20_000 + 500 + 250) * 16_384
    assert info.swap is not None
    assert (info.swap.total_bytes, info.swap.available_bytes) == (2 << 30, 1 << 30)
    assert [(disk.mount, disk.filesystem) for disk in info.disks] == [
        ("/", "apfs"),
        ("/System/Volumes/Data", "apfs"),
        ("/Volumes/My Disk", "hfs"),
    ]


def test_freebsd_is_read() -> None:
    info = recorded("freebsd-14.txt")
    assert (info.os.name, info.os.version) == ("FreeBSD", "14.1-RELEASE")
    assert (info.cpu.model, info.cpu.cores) == ("Intel(R) Xeon(R) CPU", 4)
    assert info.cpu.usage_percent == 10.0
    assert info.memory is not None
    assert info.memory.available_bytes == (1000 + 2000 + 3000) * 4096
    assert info.swap is not None
    assert (info.swap.total_bytes, info.swap.used_bytes) == (2097152 * 1024, 1024 * 1024)
    assert [(disk.mount, disk.filesystem) for disk in info.disks] == [("/", "zfs")]


def test_openbsd_is_read() -> None:
    info = recorded("openbsd-7.txt")
    assert (info.os.name, info.cpu.cores) == ("OpenBSD", 2)
    assert info.uptime_seconds == 400_000
    assert info.memory is not None
    assert info.memory.available_bytes == (5000 + 7000) * 4096
    assert info.swap is not None
    assert info.swap.total_bytes == 524288 * 1024
    assert [(disk.mount, disk.filesystem) for disk in info.disks] == [("/", "ffs")]


def linux(busy: int, idle: int) -> str:
    return f"@@ stat\ncpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 {busy} 0 0 {idle} 0 0 0 0 0 0\n"


def test_use_is_since_the_last_look() -> None:
    first, times = parse(linux(100, 900))
    second, _ = parse(linux(175, 925), times)
    assert (first.cpu.usage_percent, second.cpu.usage_percent) == (10.0, 75.0)


def test_use_after_a_restart_is_since_boot() -> None:
    info, _ = parse(linux(50, 50), CPUTimes(5000, 90_000))
    assert info.cpu.usage_percent == 50.0


def test_mount_points_with_spaces_and_pseudo_file_systems() -> None:
    info, _ = parse(
        "@@ mounts\n/dev/sda1 / ext4 rw 0 0\n/dev/sdb1 /my\\040disk xfs rw 0 0\ntmpfs /run tmpfs rw 0 0\n"
        "@@ df\nFilesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda1 100 40 60 40% /\n"
        "/dev/sdb1 200 0 200 0% /my disk\ntmpfs 10 0 10 0% /run\n"
    )
    assert [(disk.mount, disk.filesystem, disk.total_bytes) for disk in info.disks] == [
        ("/", "ext4", 102_400),
        ("/my disk", "xfs", 204_800),
    ]


def test_overlay_is_left_out_except_as_root() -> None:
    mounts = "@@ mounts\noverlay / overlay rw 0 0\noverlay /x overlay rw 0 0\n"
    info, _ = parse(f"{mounts}@@ df\noverlay 9 1 8 1% /\noverlay 9 1 8 1% /x\n")
    assert [disk.mount for disk in info.disks] == ["/"]


def test_script_fits_an_argument() -> None:
    assert len(SCRIPT) < 4096


here = subprocess.run(["sh", "-c", SCRIPT], capture_output=True, text=True, check=True).stdout


@given(st.data())
def test_garbled_output_is_no_exception(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([here, *(path.read_text() for path in sorted(RECORDED.glob("*.txt")))]))
    lines = whole.splitlines()
    for _ in range(data.draw(st.integers(1, 10))):
        index = data.draw(st.integers(0, len(lines) - 1))
        lines[index] = data.draw(
            st.sampled_from(["", lines[index][::-1], lines[index][:5]]) | st.text(max_size=30)
        )
    info, _ = parse("\n".join(lines))
    info.text()
    SystemInfo.model_validate(info.model_dump())


@given(st.text())
def test_any_text_is_no_exception(text: str) -> None:
    parse(text)[0].text()
