"""The OpenSSH client of this machine and our reader of its configuration, in one home directory."""

import os
import subprocess
from pathlib import Path

import pytest

from conftest import program
from ssh_config import HostConfig, SshConfig
from ssh_config_match import Local


class Home:
    """A home directory for both readers: OpenSSH learns of it through an account database of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ssh = folder / ".ssh"
        self.ssh.mkdir(mode=0o700)
        self.config = self.ssh / "config"
        self.local = Local.now()
        self.local = Local(self.local.user, str(folder), self.local.uid, self.local.hostname)
        others = [
            line
            for line in Path("/etc/passwd").read_text().splitlines()
            if not line.startswith(f"{self.local.user}:")
        ]
        own = f"{self.local.user}:x:{os.getuid()}:{os.getgid()}::{folder}:/bin/sh"
        (folder / "passwd").write_text("\n".join([own, *others]) + "\n")
        self.environment = os.environ | {
            "HOME": str(folder),
            "LD_PRELOAD": "libnss_wrapper.so",
            "NSS_WRAPPER_PASSWD": str(folder / "passwd"),
            "NSS_WRAPPER_GROUP": "/etc/group",
        }

    def write(self, text: str, name: str = "config") -> Path:
        path = self.ssh / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o600)
        return path

    def read(self, host: str = "web", user: str | None = None, port: int | None = None) -> HostConfig:
        return SshConfig(self.config, local=lambda: self.local).lookup(host, user, port)

    def ssh_g(self, host: str, user: str | None, port: int | None) -> dict[str, list[str]] | None:
        """Return what `ssh -G` prints, by keyword; None when it refuses the config."""
        done = self._ssh("-G", host, user, port)
        if done.returncode:
            return None
        answer: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            keyword, _, value = line.partition(" ")
            answer.setdefault(keyword.lower(), []).append(value)
        return answer

    def ssh_uses(self, host: str, user: str | None, port: int | None) -> dict[str, list[str]]:
        """Return the files that `ssh -v` says it uses, and the proxy command it runs: `false`, if there is none."""
        direct = self.ssh_g(host, user, port) or {}
        options = ["-v"] if "proxycommand" in direct else ["-v", "-oProxyCommand=false"]
        said = self._ssh(*options, host, user, port).stderr.splitlines()

        def what(begin: str) -> list[str]:
            return [
                line.removeprefix(begin).partition(" type ")[0].replace("\\\\", "\\")
                for line in said
                if line.startswith(begin)
            ]

        files = what("debug1: identity file ")
        return {
            "identityfile": [file for file in files if not file.endswith("-cert")],
            "certificatefile": what("debug1: certificate file "),
            "proxycommand": what("debug1: Executing proxy command: exec ")
            if "proxycommand" in direct
            else [],
        }

    def _ssh(self, *options: str | int | None) -> "subprocess.CompletedProcess[str]":
        *flags, host, user, port = options
        command = [program("ssh", "openssh-client"), "-F", str(self.config), *map(str, flags)]
        command += ["-l", str(user)] if user else []
        command += ["-p", str(port)] if port else []
        return subprocess.run(
            [*command, str(host)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/sh")
    monkeypatch.setenv("COLOUR", "blue")
    monkeypatch.delenv("NOTHING", raising=False)
    return Home(tmp_path)
