"""The Dockerfile, step by step on throwaway machines, and what it makes, run as the compose file says.

There is no Docker daemon here: base images and the isolation of a container are stood in for (dockerfile.py).
"""

import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import keygen, program, wait_for
from dockerfile import Stage, built
from front import DEPLOY

ROOT = DEPLOY.parent
DOCKERFILE = DEPLOY / "Dockerfile"
SETTINGS = {
    "PUBLIC_BASE_URL": "https://mcp.example.com",
    "GOOGLE_CLIENT_ID": "our-id-at-google",
    "GOOGLE_CLIENT_SECRET": "our-secret-at-google",
    "ALLOWED_EMAIL": "you@gmail.com",
    "SSH_DEFAULT_HOST": "web1.example.com",
    "SSH_DEFAULT_USER": "deploy",
    "SSH_KEY_PATH": "/etc/ssh-mcp-server/id_ed25519",
    "SSH_KNOWN_HOSTS": "/etc/ssh-mcp-server/known_hosts",
}


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    """The one service of the compose file, as docker-compose understands it."""
    command = [program("docker-compose", "docker-compose"), "--file", str(DEPLOY / "compose.yaml"), "config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    project = yaml.safe_load(done.stdout)
    service: dict[str, Any] = project["services"]["ssh-mcp-server"]
    return service | {"gateway": project["networks"]["front"]["ipam"]["config"][0]["gateway"]}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clone as Docker would be sent it, with a secret and a repository in it."""
    folder = tmp_path_factory.mktemp("context")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in [*filter(None, os.fsdecode(listed).split("\0"))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".env").write_text("JWT_SECRET=not for the image\n")
    (folder / "cli" / "__pycache__").mkdir()
    (folder / "cli" / "__pycache__" / "old.pyc").touch()
    return folder


@dataclass
class Container:
    """The image as it runs: its files read-only but for the volumes, nothing of root's left to its process."""

    image: Stage
    service: dict[str, Any]

    def line(self, arguments: list[str]) -> str:
        """Return the command line of a process in the container."""
        uid, _, gid = self.image.user.partition(":")
        variables = self.image.environment | self.service["environment"]
        set_all = [f"{name}={value}" for name, value in variables.items()]
        account = [f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        rights = ["--bounding-set=-all", "--no-new-privs"]
        return shlex.join(["env", "-i", *set_all, "setpriv", *account, *rights, *arguments])

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.image.machine.run(self.line(list(arguments)), cwd=self.image.folder)

    def healthy(self) -> bool:
        return self.run(*self.image.health).returncode == 0


@pytest.fixture(scope="module")
def container(
    context: Path, service: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    """A container whose process does not run yet."""
    folder = tmp_path_factory.mktemp("container")
    settings = SETTINGS | {
        name: secrets.token_hex(32) for name in ("JWT_SECRET", "SESSION_SECRET", "OAUTH_CODE_SECRET")
    }
    with built(context / "deploy" / "Dockerfile", context) as image:
        mounted = image.machine.path("/etc/ssh-mcp-server")
        mounted.mkdir()
        (mounted / "env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        shutil.move(keygen(folder / "key"), mounted / "id_ed25519")
        image.run(f"chown -R {image.user} /etc/ssh-mcp-server && chmod -R go= /etc/ssh-mcp-server")
        # Docker gives a new volume the owner and mode that its place has in the image
        image.run("mkdir /tmp/state && cp -a /var/lib/ssh-mcp-server /tmp/state")
        image.run("mount -o remount,ro / && mount --bind /tmp/state/ssh-mcp-server /var/lib/ssh-mcp-server")
        yield Container(image, service)


@pytest.fixture
def status(container: Container, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What the kernel says of its process, which runs and is healthy."""
    machine, image = container.image.machine, container.image
    line = container.line([*image.entrypoint, *image.arguments])
    with (tmp_path / "log").open("wb") as log:
        entered = subprocess.Popen(
            machine.command(f"cd {image.folder} && exec {line}"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    def healthy() -> bool:
        assert entered.poll() is None, (tmp_path / "log").read_text()
        return container.healthy()

    try:
        wait_for(healthy, 90)
        pid = machine.run("pgrep --uid ssh-mcp-server").stdout.strip()
        lines = machine.path(f"/proc/{pid}/status").read_text().splitlines()
        yield dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    finally:
        machine.run("pkill --uid ssh-mcp-server")
        entered.wait()


def test_linter_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_leaves_the_container_no_right_that_it_does_not_need(service: dict[str, Any]) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["mem_limit"] in ("2g", str(2 * 1024**3))  # as that version of docker-compose prints it
    assert service["pids_limit"] == 2048
    (port,) = service["ports"]
    assert str(port).startswith("127.0.0.1:3003:3003")


def test_compose_lets_the_server_believe_its_own_gateway_alone(service: dict[str, Any]) -> None:
    assert service["environment"]["FORWARDED_ALLOW_IPS"] == service["gateway"]


def test_server_is_healthy_without_a_right_and_with_its_files_read_only(
    container: Container, status: dict[str, str]
) -> None:
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert container.run("touch", "/srv/x").returncode != 0
    assert container.run("touch", "/var/lib/ssh-mcp-server/x").returncode == 0


def test_health_check_fails_when_nothing_answers(container: Container) -> None:
    assert not container.healthy()


def test_image_holds_no_secret_no_test_and_no_tool(container: Container) -> None:
    installed = container.image.machine.path("/srv/ssh-mcp-server")
    assert [path.name for path in installed.iterdir()] == [".venv"]
    names = {path.name for path in (installed / ".venv" / "bin").iterdir()}
    assert "ssh-mcp-server" in names
    assert names.isdisjoint({"pip", "uv", "pytest", "ruff"})
    assert not [*installed.rglob(".env")]
