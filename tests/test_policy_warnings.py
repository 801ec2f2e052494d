"""Which limits are said to limit less than they seem to."""

import pytest
from pydantic import SecretStr

from settings import Settings
from ssh_policy import warnings


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("find", "find can be told to run anything; leave it out"),
        ("find /var/log -name", "leave it out"),
        ("tar -tf", "leave it out"),
        ("ssh web2 uptime", "leave it out"),
        ("less /var/log/syslog", "leave it out"),
        ("vim", "leave it out"),
        ("sed -n", "leave it out"),
        ("sort", "leave it out"),
        ("env", "env runs any command that follows; name that command too"),
        ("/usr/bin/env", "name that command too"),
        ("sudo", "name that command too"),
        ("sudo -n", "name that command too"),
        ("env LC_ALL=C", "name that command too"),
        ("timeout 5", "name that command too"),
        ("nice -n 10", "name that command too"),
        ("nohup", "name that command too"),
        ("xargs -0", "name that command too"),
        ("busybox", "name that command too"),
        ("busybox sh", "sh runs any program that it is given; name a script too"),
        ("sudo -u web timeout 5 env", "name that command too"),
        ("sudo -u web find", "leave it out"),
        ("sudo git", "name that too"),
        ("sudo -n python3", "name a script too"),
        ("awk", "name a script too"),
        ("bash", "name a script too"),
        ("/bin/sh -c", "name a script too"),
        ("python3.11", "python runs any program that it is given; name a script too"),
        ("perl -ne", "name a script too"),
        (".", "name a script too"),
        ("git", "git can be told to run anything before its subcommand; name that too"),
        ("git -C /srv/app", "name that too"),
        ("sudo -u web", "name that command too"),
        ("xargs -I X", "name that command too"),
        ("tee", "tee can write any file, such as one that a login reads; leave it out"),
        ("'/usr/bin/cp' -a", "leave it out"),
    ],
)
def test_prefix_that_gives_everything_away_is_warned_of(prefix: str, remedy: str) -> None:
    (sentence,) = warnings(Settings(allowed_commands=f"ls,{prefix},git log"))
    assert sentence.startswith(f"ALLOWED_COMMANDS holds {prefix.replace(chr(39), '')!r}, and ")
    assert sentence.endswith(remedy)


@pytest.mark.parametrize(
    "commands",
    [
        None,
        "ls,cat,git log",
        "systemctl status,journalctl -u nginx,/bin/ls,df,tail,docker ps",
        "git --no-pager log,git -C /srv/app log,sudo systemctl restart mysql,sudo -n cat find",
        "env LC_ALL=C ls,timeout 5 df,nice -n 10 du,sudo systemctl status,sudo -u web git log",
        "python3 /opt/report.py,sh /opt/report.sh,awk '{ print $1 }'",
    ],
)
def test_nothing_is_warned_of_where_nothing_is_known(commands: str | None) -> None:
    assert warnings(Settings(allowed_commands=commands)) == []


def test_each_prefix_is_warned_of() -> None:
    assert len(warnings(Settings(allowed_commands="find,ls,ssh,awk"))) == 3


@pytest.mark.parametrize(
    ("commands", "read_only", "warned"), [(None, False, True), ("ls", False, False), (None, True, False)]
)
def test_limited_paths_are_warned_of_where_any_command_may_be_run(
    commands: str | None, read_only: bool, warned: bool
) -> None:
    said = warnings(Settings(allowed_paths="/srv", allowed_commands=commands, read_only=read_only))
    assert [sentence.split()[0] for sentence in said] == ["ALLOWED_PATHS"] * warned


@pytest.mark.parametrize("prefix", ["git log", "/usr/bin/git log", "sudo -u web git log"])
@pytest.mark.parametrize(
    ("paths", "read_only", "warned"), [("/srv", False, True), (None, False, False), ("/srv", True, False)]
)
def test_program_that_obeys_files_is_warned_of_where_files_may_be_written(
    prefix: str, paths: str | None, read_only: bool, warned: bool
) -> None:
    said = warnings(Settings(allowed_commands=f"ls,{prefix}", allowed_paths=paths, read_only=read_only))
    assert [sentence.partition(", and git runs what files")[0] for sentence in said] == [
        f"ALLOWED_COMMANDS holds {prefix!r}"
    ] * warned


@pytest.mark.parametrize(
    ("hosts", "sudo", "warned"),
    [("web*", True, True), ("web1,*@web2:*", True, False), ("web*", False, False), (None, True, False)],
)
def test_password_for_hosts_that_are_not_named_is_warned_of(
    hosts: str | None, sudo: bool, warned: bool
) -> None:
    current = Settings(ssh_allowed_hosts=hosts, ssh_sudo=sudo, ssh_sudo_password=SecretStr("hunter2"))
    said = warnings(current)
    assert [sentence.partition(", and")[0] for sentence in said] == [
        "SSH_ALLOWED_HOSTS holds 'web*'"
    ] * warned
    assert "hunter2" not in str(said)


def test_warning_of_a_long_prefix_is_short() -> None:
    (sentence,) = warnings(Settings(allowed_commands="find " + "x" * 5000))
    assert len(sentence) < 500
