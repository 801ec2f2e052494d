"""Real parts for the tests: an sshd of their own on loopback, with its own keys, configuration and accounts.

The accounts exist for that sshd alone (nss_wrapper): each is the user who runs the tests, with an empty home and a
login shell of its own. So no rc file of this machine is read, and no account of it is touched.
"""

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from settings import Settings, Target
from ssh_commands import Commands
from ssh_pool import Pool

pytest_plugins = ["checking", "oauth", "ssh_client"]
# plugins of those tests alone that use them: they take seconds to import
pytest.register_assert_rewrite("chromium", "cluster")
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the soak, which takes longest: behind all others it would keep two workers of three idle."""
    items.sort(key=lambda item: item.path.name != "test_soak.py")


def program(name: str, package: str) -> str:
    """Return a program's path, or fail with the command that installs it."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        pytest.fail(f"{name} is missing; run: apt-get install {package}")
    return path


def keygen(path: Path, *arguments: str) -> Path:
    """Make a key pair without a passphrase, unless the arguments give one."""
    command = ["ssh-keygen", "-q", "-f", str(path), *(arguments or ("-t", "ed25519"))]
    subprocess.run(command if "-N" in arguments else [*command, "-N", ""], check=True)
    return path


def _ports() -> Iterator[int]:
    """Yield ports below those that the system gives to connections that go out: each worker of xdist its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = range(15_000 + worker, 32_000, workers)
    yield from itertools.islice(itertools.cycle(ports), random.SystemRandom().randrange(len(ports)), None)


_port = _ports()


def free_port() -> int:
    """Return a port that nobody uses, nor is about to: it comes again after thousands of others only."""
    while True:
        port = next(_port)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def marker() -> str:
    """Return digits that no other process has in its arguments."""
    return f"{os.getpid()}{time.monotonic_ns()}"


def running(marker: str) -> bool:
    """Whether a process with the marker in its arguments runs."""
    return subprocess.run(["pgrep", "-f", marker], capture_output=True, check=False).returncode == 0


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    """Poll until the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@dataclass
class Server:
    """An sshd on loopback and what is needed to log in to it."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    config: Path

    @property
    def key(self) -> Path:
        return self.folder / "id"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def home(self) -> Path:
        """The login directory of `tester`."""
        return self.folder / "tester"

    @property
    def target(self) -> Target:
        return self.account("tester")

    def account(self, name: str) -> Target:
        return Target(name, "127.0.0.1", self.port)

    def settings(self, **changes: Any) -> Settings:
        values: dict[str, Any] = {
            "ssh_default_host": "127.0.0.1",
            "ssh_default_port": self.port,
            "ssh_default_user": "tester",
            "ssh_key_path": self.key,
            "ssh_known_hosts": self.known_hosts,
            "ssh_config": Path("none"),
        }
        return Settings(**(values | changes))

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables of a server process for which this is the default target."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "SSH_DEFAULT_HOST": "127.0.0.1",
            "SSH_DEFAULT_PORT": str(self.port),
            "SSH_DEFAULT_USER": "tester",
            "SSH_KEY_PATH": str(self.key),
            "SSH_KNOWN_HOSTS": str(self.known_hosts),
        }

    def trust(self) -> None:
        """Write the host key into known_hosts."""
        public = (self.folder / "host_key.pub").read_text().split()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public[0]} {public[1]}\n")

    def start(self) -> None:
        self.run([program("sshd", "openssh-server"), "-D", "-e", "-f", str(self.config)])

    def run(self, command: list[str]) -> None:
        """Start the server program and wait until it listens."""
        wrapper = {
            "LD_PRELOAD": "libnss_wrapper.so",
            "NSS_WRAPPER_PASSWD": str(self.folder / "passwd"),
            "NSS_WRAPPER_GROUP": str(self.folder / "group"),
        }
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, env=os.environ | wrapper)

        def listens() -> bool:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait_for(listens, 60)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def crash(self) -> None:
        """End the server and every connection of it at once; nobody gets in meanwhile."""
        self.process.send_signal(signal.SIGSTOP)
        self.cut()
        self.process.kill()
        self.process.wait()

    def session_pids(self) -> list[int]:
        """Return the process ids of the sshd processes that serve connections."""
        done = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in done.stdout.split()]

    def cut(self) -> None:
        """End every connection from the server's side."""
        done = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
        parents = {
            int(pid): int(parent) for pid, parent in (line.split() for line in done.stdout.splitlines())
        }
        doomed = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
            doomed |= more
        for pid in sorted(doomed - {self.process.pid}):  # parents first: they then tell of no death
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


SHELLS = {
    "tester": "bash",
    "dash": "dash",
    "ash": "busybox",
    "zsh": "zsh",
    "ksh": "ksh93",
    "fish": "fish",
    "tcsh": "tcsh",
}
"""The accounts of a test server and the packages that hold their login shells."""

ORDINARY_UID = 4242 if os.getuid() == 0 else os.getuid()
"""The user behind the account `ordinary`: not root, also when root runs the tests."""

DOMAIN_USERS_GID = 4343
"""The group `domain users` of the test servers, a name as Windows domains have them."""


def make_accounts(folder: Path) -> None:
    if not any(Path(lib).glob("**/libnss_wrapper.so") for lib in ("/usr/lib", "/usr/lib64")):
        pytest.fail("libnss_wrapper.so is missing; run: apt-get install libnss-wrapper")
    lines = Path("/etc/passwd").read_text().splitlines()
    for name, package in SHELLS.items():
        home = folder / name
        home.mkdir()
        if name == "ash":
            shell = str(folder / "ash.shell" / "ash")
            Path(shell).parent.mkdir()
            Path(shell).symlink_to(program("busybox", package))
        else:
            shell = program("bash" if name == "tester" else name, package)
        lines.append(f"{name}:*:{os.getuid()}:{os.getgid()}::{home}:{shell}")
    (folder / "ordinary").mkdir()
    os.chown(folder / "ordinary", ORDINARY_UID, -1)
    lines.append(f"ordinary:*:{ORDINARY_UID}:{ORDINARY_UID}::{folder}/ordinary:/bin/sh")
    (folder / "passwd").write_text("\n".join(lines) + "\n")
    groups = Path("/etc/group").read_text()
    (folder / "group").write_text(f"{groups}domain users:x:{DOMAIN_USERS_GID}:\n")


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users may pass through, as pytest's own may not be."""
    with tempfile.TemporaryDirectory(prefix="ssh-mcp-test-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


def make_server(folder: Path, *lines: str) -> Server:
    """Start an sshd with the default limits and the given lines of configuration before them."""
    folder.mkdir(parents=True, exist_ok=True)
    make_accounts(folder)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    keygen(folder / "host_key")
    keygen(folder / "id")
    (folder / "authorized_keys").write_text((folder / "id.pub").read_text())
    port = free_port()
    config = folder / "sshd_config"
    common = f"""
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/pid
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
"""
    if not any(line.startswith("Subsystem ") for line in lines):
        common += "Subsystem sftp internal-sftp\n"
    config.write_text("\n".join(lines) + common)
    server = Server(folder, port, None, config)  # type: ignore[arg-type]
    server.trust()
    server.start()
    return server


@pytest.fixture(scope="session")
def sshd() -> Iterator[Server]:
    """One sshd with OpenSSH's default limits for all tests that leave it as it is."""
    with open_folder() as folder:
        server = make_server(folder)
        yield server
        server.stop()


@pytest.fixture
def own_sshd(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Make sshds that a test may stop, restart and configure."""
    servers: list[Server] = []

    def make(*lines: str) -> Server:
        servers.append(make_server(tmp_path / f"sshd{len(servers)}", *lines))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def dropbear() -> Iterator[Server]:
    """A dropbear server with the same accounts."""
    with open_folder() as folder:
        server = make_dropbear(folder)
        yield server
        server.stop()


def make_dropbear(folder: Path) -> Server:
    make_accounts(folder)
    keygen(folder / "id")
    for name in ("tester", "ordinary"):
        keys = folder / name / ".ssh" / "authorized_keys"
        keys.parent.mkdir(mode=0o700)
        shutil.copy(folder / "id.pub", keys)
        if name == "ordinary":
            os.chown(keys.parent, ORDINARY_UID, -1)
            os.chown(keys, ORDINARY_UID, -1)
    server = Server(folder, free_port(), None, folder / "none")  # type: ignore[arg-type]
    key_program = program("dropbearkey", "dropbear-bin")
    subprocess.run([key_program, "-t", "ed25519", "-f", folder / "key"], check=True, capture_output=True)
    shown = subprocess.run(
        [key_program, "-y", "-f", folder / "key"], check=True, capture_output=True, text=True
    )
    (public,) = (line.split() for line in shown.stdout.splitlines() if line.startswith("ssh-"))
    server.known_hosts.write_text(f"[127.0.0.1]:{server.port} {public[0]} {public[1]}\n")
    command = [program("dropbear", "dropbear-bin"), "-F", "-E", "-r", str(folder / "key")]
    server.run([*command, "-p", f"127.0.0.1:{server.port}"])
    return server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    assert os.getuid() == 0, "this test mounts a tmpfs: run it as root"
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    yield disk
    wait_for(lambda: subprocess.run(["umount", str(disk)], capture_output=True).returncode == 0)


@pytest.fixture
def pool(sshd: Server) -> Iterator[Pool]:
    pool = Pool(sshd.settings())
    yield pool
    pool.close()


@pytest.fixture
def commands(sshd: Server, pool: Pool) -> Commands:
    return Commands(pool, sshd.settings())


def nobody_cancels() -> None:
    """The `cancelled` of a caller who stays."""
