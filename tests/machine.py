"""A throwaway machine: this one's files under an overlay that is forgotten, its processes and network its own.

With systemd as its first process it is what a unit wants; without, what a container's build steps want. It needs root
and the right to mount. Nothing that happens in it changes the machine that the tests run on: kernel settings are
read-only there, and capabilities that reach beyond it are dropped.
"""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import program, wait_for

# In namespaces of its own: $1 is an empty folder, $2 the clone (which may be a mount), the rest the first process
_BOOT = """
set -eu
disk=$1 root=$1/root clone=$2
shift 2
mount --make-rprivate /
mount -t tmpfs tmpfs "$disk"
mkdir "$disk/upper" "$disk/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$disk/upper,workdir=$disk/work" "$root"
cd "$root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do
    touch "dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/pts dev/shm
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
ip link set lo up
mkdir -p "$root$clone"
mount --bind "$clone" "$root$clone"
mount -o remount,bind,ro "$root$clone"
# services of the machine that the tests run on stay there
rm -rf etc/systemd/system/*.wants etc/machine-id usr/sbin/policy-rc.d
: > etc/machine-id
mkdir -p "$disk/root/.old"
pivot_root . .old
cd /
umount -l .old
exec env -i container=throwaway PATH=/usr/sbin:/usr/bin:/sbin:/bin setpriv \\
    --bounding-set -sys_module,-sys_time,-sys_boot,-syslog,-sys_rawio,-mac_admin,-mac_override "$@"
"""
# Its processes have a cgroup of their own, so that they can be told from others and ended together
_IN_CGROUP = """
set -eu
mount -t cgroup2 cgroup2 "$1"
mkdir "$1/$2"
echo 0 > "$1/$2/cgroup.procs"
shift 2
exec unshare --mount --uts --ipc --net --pid --cgroup --fork --kill-child sh -c "$@"
"""
_END_CGROUP = 'mount -t cgroup2 cgroup2 "$1" && find "$1/$2" -depth -type d -exec rmdir {} +'

_CLONE = Path(__file__).parents[1]

SLEEP = ["/bin/sleep", "infinity"]
SYSTEMD = ["/lib/systemd/systemd", "--system", "--unit=basic.target", "--log-target=journal"]


class Machine:
    """A running machine. Paths in `path` are seen from outside."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def path(self, inside: str) -> Path:
        return Path(f"/proc/{self._pid}/root") / inside.lstrip("/")

    def run(
        self, command: str, *, network: bool = False, cwd: str = "/", **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command line there, with the network of the machine outside if it has to download something."""
        return subprocess.run(
            self.command(f"cd {shlex.quote(cwd)} && {command}", network=network),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            env=_environment() | variables,
        )

    def command(self, line: str, *, network: bool = False) -> list[str]:
        """Return the arguments of a process that runs a command line there."""
        namespaces = ["--mount", "--uts", "--ipc", "--pid", "--cgroup", *([] if network else ["--net"])]
        return ["nsenter", "--target", str(self._pid), *namespaces, "bash", "-c", line]


def _environment() -> dict[str, str]:
    kept = ("PIP_", "UV_", "SSL_")
    return {name: value for name, value in os.environ.items() if name.startswith(kept)} | {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
    }


@contextmanager
def machine(first_process: list[str]) -> Iterator[Machine]:
    """Run a machine until the end of the context."""
    assert os.getuid() == 0, "this test mounts file systems: run it as root"
    program("nsenter", "util-linux")
    folder = Path(tempfile.mkdtemp(prefix="ssh-mcp-machine-"))
    name = folder.name
    for needed in (folder / "cgroup", folder / "disk"):
        needed.mkdir()
    in_cgroup = ["unshare", "--mount", "sh", "-c", _IN_CGROUP, "sh", str(folder / "cgroup"), name]
    with (folder / "log").open("wb") as log:
        outer = subprocess.Popen(
            [*in_cgroup, _BOOT, "sh", str(folder / "disk"), str(_CLONE), *first_process],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    def first() -> int | None:
        assert outer.poll() is None, (folder / "log").read_text()
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        for pid in map(int, children):
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended since
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(first_process[0].encode() + b"\0"):
                    return pid
        return None

    try:
        wait_for(first, 60)
        pid = first()
        assert pid is not None
        yield Machine(pid)
    finally:
        outer.send_signal(signal.SIGKILL)
        outer.wait()
        ending = ["unshare", "--mount", "sh", "-c", _END_CGROUP, "sh", str(folder / "cgroup"), name]
        wait_for(lambda: subprocess.run(ending, capture_output=True, check=False).returncode == 0, 60)
        shutil.rmtree(folder)
