"""docs/deploy.md, command by command on a throwaway machine with systemd: from a clone to a call through nginx.

What cannot be run there stands in STAND_INS, with the reason and what takes its place.
"""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import program, wait_for
from front import DEPLOY
from machine import SYSTEMD, Machine, machine
from tls import certificates

HERE = Path(__file__).parent
ROOT = HERE.parent
HOWTO = (ROOT / "docs" / "deploy.md").read_text()
UNIT = DEPLOY / "ssh-mcp-server.service"
SETTINGS = "/etc/ssh-mcp-server/env"


def chapters() -> dict[str, str]:
    """Return the text by its headings, in order."""
    parts = re.split(r"^## (.*)\n", HOWTO, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands(text: str) -> list[str]:
    return [block.rstrip("\n") for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]


def of_caddy(command: str) -> bool:
    """Whether a command belongs to the other of two ways to TLS."""
    return "caddy" in command.lower()


@dataclass
class Walk:
    """The way through the text: a machine, and what was said on it."""

    machine: Machine
    said: dict[str, str] = field(default_factory=dict)
    """What each command printed."""
    answers: list[str] = field(default_factory=list)
    """What the tools answered to the person who connected."""

    def go(self, chapter: str) -> None:
        """Run the commands of a chapter."""
        for command in commands(chapters()[chapter]):
            if not of_caddy(command):
                self.obey(command)

    def obey(self, command: str) -> None:
        """Run a command, which must succeed, or what stands in for it."""
        if command in STAND_INS:
            self.said[command] = ""
            STAND_INS[command](self)
        else:
            downloads = command.startswith("apt-get") or "./bootstrap" in command
            self.said[command] = self.run(command, network=downloads)

    def run(self, command: str, *, network: bool = False, cwd: str = "/") -> str:
        done = self.machine.run(command, network=network, cwd=cwd)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}{self.log()}"
        return done.stdout

    def output_of(self, beginning: str) -> str:
        """Return what the one command printed that begins like that."""
        (said,) = (said for command, said in self.said.items() if command.startswith(beginning))
        return said

    def connect(self, *lines: str) -> None:
        """Do what a person and ChatGPT do: log in, and have command lines run."""
        said = self.run(f"{sys.executable} {HERE}/connector.py /srv/connector {shlex.join(lines)}")
        self.answers = said.split("\0")[:-1]

    def log(self) -> str:
        return self.machine.run("journalctl --no-pager -o cat -u ssh-mcp-server").stdout

    def unit(self, name: str) -> str:
        """Return a property of the service."""
        return self.run(f"systemctl show --value --property {name} ssh-mcp-server").strip()

    def wait_until_it_answers(self) -> None:
        self.obey("curl -fsS --retry 60 --retry-delay 1 --retry-connrefused http://127.0.0.1:3003/health")


def fill_in(walk: Walk) -> None:
    """Write what the text says into the settings: where a name stands without a value, or else at the end."""
    path = walk.machine.path(SETTINGS)
    text = path.read_text()
    (block,) = re.findall(r"```ini\n(.*?)```", HOWTO, re.DOTALL)
    for line in block.splitlines():
        empty = f"\n{line.partition('=')[0]}=\n"
        text = text.replace(empty, f"\n{line}\n") if empty in text else f"{text}{line}\n"
    path.write_text(text)


def certify(walk: Walk) -> None:
    """Put a certificate of the tests' CA where certbot puts its."""
    live = "/etc/letsencrypt/live/mcp.example.com"
    walk.run(
        f"mkdir -p {live} && cp cert.pem {live}/fullchain.pem && cp key.pem {live}/privkey.pem",
        cwd="/srv/connector",
    )


CHECK = f"sudo -u ssh-mcp-server /opt/ssh-mcp-server/.venv/bin/ssh-mcp-server --env-file {SETTINGS} check"


def look(walk: Walk) -> None:
    """Run the check, to which Google cannot be reached there."""
    walk.said[CHECK] = walk.machine.run(CHECK).stdout


STAND_INS: dict[str, Callable[[Walk], object]] = {
    # asks a person
    "editor /etc/ssh-mcp-server/env": fill_in,
    # the machine has no network to shut out
    "ufw allow 80,443/tcp": lambda _: None,
    # nginx is there as this machine has it, and certbot is of no use
    "apt-get install -y nginx certbot python3-certbot-nginx": lambda walk: walk.run(
        "apt-get install --simulate nginx certbot python3-certbot-nginx && systemctl start nginx"
    ),
    # fails without Google
    CHECK: look,
    # needs a public name, and Let's Encrypt
    'certbot certonly --nginx --deploy-hook "systemctl reload nginx" -d mcp.example.com': certify,
}


def commit_what_stands_here(walk: Walk) -> None:
    """Make the repository that is cloned, and its first commit."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    origin = walk.machine.path("/srv/origin")
    for name in filter(None, os.fsdecode(listed).split("\0")):
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, origin / name)
    walk.run("git init -q -b main", cwd="/srv/origin")
    commit(walk, "what is installed first")


def commit(walk: Walk, message: str) -> None:
    walk.run(
        "git add --all && git -c user.name=Test -c user.email=test@example.com commit -q --allow-empty "
        f"-m {shlex.quote(message)}",
        cwd="/srv/origin",
    )


def prepare(walk: Walk) -> None:
    """Provide what the text takes for granted: DNS, the host with its account, the repository, an empty nginx."""
    wait_for(lambda: walk.machine.run("systemctl is-active basic.target").returncode == 0, 60)
    with walk.machine.path("/etc/hosts").open("a") as hosts:
        hosts.write("127.0.0.1 mcp.example.com web1.example.com\n")
    walk.run("useradd --create-home --shell /bin/sh deploy && ssh-keygen -A")
    walk.run("systemctl start systemd-user-sessions ssh")
    walk.run("rm -f /etc/nginx/sites-enabled/*")
    walk.run(
        "git config --system url.file:///srv/origin.insteadOf https://git.example.com/you/ssh-mcp-server"
    )
    commit_what_stands_here(walk)
    authority = walk.machine.path("/srv/connector")
    authority.mkdir()
    certificates(authority, "mcp.example.com")
    walk.run("cp /srv/connector/ca.pem /usr/local/share/ca-certificates/tests.crt && update-ca-certificates")


def go_all_the_way(walk: Walk) -> None:
    go, authorized = walk.go, "/home/deploy/.ssh/authorized_keys"
    go("1. Account and program")
    key, line, *rest = commands(chapters()["2. Its SSH key"])
    walk.obey(key)
    walk.obey(line)
    walk.run("install -d -o deploy -g deploy -m 700 /home/deploy/.ssh")
    walk.machine.path(authorized).write_text(walk.said[line])
    for command in rest:
        walk.obey(command)
    go("3. The client at Google")
    go("4. Settings")
    go("5. The service")
    go("6. TLS")
    go("7. Connect")
    walk.connect("df -P /", "touch /tmp/harm")
    commit(walk, "an upgrade")
    go("Later")
    go("When it does not work")


@pytest.fixture(scope="module")
def walk() -> Iterator[Walk]:
    """The whole way, gone once. The tests behind may stop and start services, and leave them running."""
    for name, package in (("nginx", "nginx"), ("caddy", "caddy"), ("sshd", "openssh-server")):
        program(name, package)
    with machine(SYSTEMD) as vps:
        walk = Walk(vps)
        prepare(walk)
        go_all_the_way(walk)
        walk.wait_until_it_answers()
        yield walk


def test_each_command_stands_on_one_line() -> None:
    assert [command for command in commands(HOWTO) if "\n" in command] == []


def test_every_command_was_run_or_is_on_the_list_of_those_that_cannot_be(walk: Walk) -> None:
    assert set(walk.said) == {command for command in commands(HOWTO) if not of_caddy(command)}
    assert set(STAND_INS) < set(walk.said)


def test_key_can_do_nothing_but_run_commands_and_move_files(walk: Walk) -> None:
    assert walk.output_of('sed "s/^/restrict').startswith("restrict ssh-ed25519 ")
    assert "(deploy)" in walk.output_of("sudo -u ssh-mcp-server ssh -o")


def test_fingerprint_that_is_shown_is_that_of_the_host(walk: Walk) -> None:
    true = walk.run("ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").split()[1]
    assert true in walk.output_of("ssh-keyscan")


def test_nobody_else_can_read_settings_keys_state_and_trail(walk: Walk) -> None:
    account = int(walk.run("id -u ssh-mcp-server"))
    for name in ("etc/ssh-mcp-server", "var/lib/ssh-mcp-server", "var/log/ssh-mcp-server"):
        status = walk.machine.path(name).stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (account, 0o700), name


def test_account_owns_nothing_of_the_program(walk: Walk) -> None:
    # uv leaves its empty lock file open to all
    others = "find /opt/ssh-mcp-server -not -name .lock -not -type l '(' -not -user root -o -perm /022 ')'"
    assert walk.run(others) == ""


def test_steps_for_chatgpt_name_the_server(walk: Walk) -> None:
    assert "https://mcp.example.com/sse" in walk.output_of(
        "sudo -u ssh-mcp-server /opt/ssh-mcp-server/.venv/bin/ssh-mcp-server --env-file /etc/ssh-mcp-server/env config"
    )


def test_who_connects_can_look_and_not_touch(walk: Walk) -> None:
    disks, touched = walk.answers
    assert "deploy@web1.example.com:22" in disks
    assert "ALLOWED_COMMANDS does not allow" in touched
    assert not walk.machine.path("/tmp/harm").exists()


def test_trail_tells_who_did_what(walk: Walk) -> None:
    shown = walk.output_of("/opt/ssh-mcp-server/.venv/bin/ssh-mcp-server audit show")
    assert "you@gmail.com  ssh_execute  deploy@web1.example.com:22" in shown
    assert "REFUSED" in shown


def test_check_finds_the_way_to_the_host(walk: Walk) -> None:
    assert "deploy@web1.example.com" in walk.said[CHECK]


def test_upgrade_takes_what_is_new(walk: Walk) -> None:
    assert walk.run("git -C /opt/ssh-mcp-server log -1 --format=%s").strip() == "an upgrade"


def test_systemd_finds_the_unit_sound_and_well_shut(walk: Walk) -> None:
    """At most 2.5 of 10, as `systemd-analyze security` counts what a service could do."""
    installed = f"/etc/systemd/system/{UNIT.name}"
    assert walk.machine.path(installed).read_text() == UNIT.read_text()
    assert walk.machine.run(f"systemd-analyze verify {installed}").stderr == ""
    walk.run("systemd-analyze security --threshold=25 ssh-mcp-server")
    walk.run(f"systemd-analyze security --offline=true --threshold=25 {installed}")


def test_service_has_no_privilege_and_a_filter_on_system_calls(walk: Walk) -> None:
    status = walk.machine.path(f"/proc/{walk.unit('MainPID')}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize("folder", ["/etc", "/opt/ssh-mcp-server", "/usr", "/var", "/var/lib"])
def test_service_sees_that_folder_as_read_only(folder: str, walk: Walk) -> None:
    inside = f"nsenter --target {walk.unit('MainPID')} --mount touch {folder}/x"
    assert "Read-only file system" in walk.machine.run(inside).stderr


@pytest.mark.parametrize("folder", ["/home/deploy", "/root/.ssh", "/run/user/0"])
def test_service_does_not_see_what_belongs_to_others(folder: str, walk: Walk) -> None:
    walk.run(f"mkdir -p {folder}")
    inside = f"nsenter --target {walk.unit('MainPID')} --mount ls {folder}"
    assert walk.machine.run(inside).returncode != 0


def test_service_comes_back_when_it_was_killed(walk: Walk) -> None:
    before = walk.unit("MainPID")
    walk.run(f"kill -KILL {before}")
    wait_for(lambda: walk.unit("MainPID") not in ("0", before), 60)
    walk.wait_until_it_answers()


def test_wrong_setting_is_named_and_not_tried_again(walk: Walk) -> None:
    settings = walk.machine.path(SETTINGS)
    text = settings.read_text()
    try:
        settings.write_text(f"{text}SSH_IDLE_SECONDS=soon\n")
        walk.run("systemctl restart ssh-mcp-server")
        wait_for(lambda: walk.unit("ActiveState") == "failed", 60)
        assert walk.unit("NRestarts") == "0"
        wait_for(lambda: "SSH_IDLE_SECONDS is 'soon'" in walk.log())  # the journal may be behind
    finally:
        settings.write_text(text)
        walk.run("systemctl reset-failed ssh-mcp-server && systemctl restart ssh-mcp-server")
    walk.wait_until_it_answers()


def test_line_that_systemd_would_pass_over_stops_the_start(walk: Walk) -> None:
    settings = walk.machine.path(SETTINGS)
    text = settings.read_text()
    try:
        settings.write_text(f"{text}ALLOWED_PATHS /srv\n")
        walk.run("systemctl restart ssh-mcp-server")
        wait_for(lambda: walk.unit("ActiveState") == "failed", 60)
        wait_for(lambda: "cannot be understood in line" in walk.log())  # the journal may be behind
    finally:
        settings.write_text(text)
        walk.run("systemctl reset-failed ssh-mcp-server && systemctl restart ssh-mcp-server")
    walk.wait_until_it_answers()


def test_caddy_takes_the_place_of_nginx(walk: Walk) -> None:
    install, *rest = [command for command in commands(HOWTO) if of_caddy(command)]
    walk.obey(install)
    walk.run("systemctl stop nginx && systemctl start caddy")
    for command in rest:
        walk.obey(command)
    where = "curl -sS -o /dev/null -w '%{http_code} %{redirect_url}' http://mcp.example.com/mcp"
    wait_for(lambda: walk.machine.run(where).stdout == "308 https://mcp.example.com/mcp")
