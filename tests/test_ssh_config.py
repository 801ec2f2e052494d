"""What our reader of the SSH config does that `ssh -G` does not tell of, or that differs from OpenSSH on purpose."""

import getpass
import os
import pwd
import shlex
import socket
import subprocess
from hashlib import sha1
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import marker, program, running, wait_for
from settings import Settings
from settings_values import host_token, user_token
from ssh_client import Home
from ssh_config import SshConfig
from ssh_config_keywords import ALIASES, PASSED_OVER, REFUSED
from ssh_config_match import Local
from ssh_config_values import ACTED_UPON, Hop
from ssh_errors import ArgumentError, ConfigError
from ssh_policy import Reach


def refusal(home: Home, text: str, host: str = "web") -> str:
    home.write(text)
    with pytest.raises(ConfigError) as raised:
        home.read(host)
    assert str(home.ssh) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("line", "harmless"),
    [
        ("BindAddress 10.0.0.1", None),
        ("BindInterface lo", None),
        ("CanonicalizeHostname always", "CanonicalizeHostname no"),
        ("CanonicalizePermittedCNAMEs *.a:*.b", "CanonicalizePermittedCNAMEs none"),
        ("CASignatureAlgorithms ssh-ed25519", "CASignatureAlgorithms +ssh-rsa"),
        ("CheckHostIP yes", "CheckHostIP no"),
        ("KnownHostsCommand /bin/true", "KnownHostsCommand none"),
        ("PKCS11Provider /lib/x.so", "PKCS11Provider none"),
        ("PreferredAuthentications password", "PreferredAuthentications password,publickey"),
        ("ProxyUseFdpass yes", "ProxyUseFdpass no"),
        ("PubkeyAcceptedKeyTypes ssh-ed25519", "PubkeyAcceptedAlgorithms ^ssh-ed25519"),
        ("PubkeyAuthentication no", "PubkeyAuthentication yes"),
        ("RefuseConnection go-away", None),
        ("RequiredRSASize 4096", "RequiredRSASize 1024"),
        ("RevokedHostKeys /etc/revoked", "RevokedHostKeys none"),
    ],
)
def test_keyword_that_matters_and_is_not_built_is_an_error_where_it_applies(
    home: Home, line: str, harmless: str | None
) -> None:
    assert "line 3: " in refusal(home, f"\nHost web\n {line}\n")
    home.write(f"Host db\n {line}\n")
    assert home.read().hostname == "web"
    if harmless is not None:
        home.write(f"{harmless}\n{line}\n")
        assert home.read().hostname == "web"


def test_every_keyword_of_ssh_is_accounted_for() -> None:
    """A keyword that a newer client prints is neither passed over nor refused before somebody has thought of it."""
    empty = [program("ssh", "openssh-client"), "-G", "-F", "none", "web"]
    printed = subprocess.run(
        empty, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    ).stdout
    keywords = {line.split()[0].lower() for line in printed.splitlines()}
    assert keywords - ACTED_UPON - PASSED_OVER.keys() - REFUSED.keys() == {"host"}


def test_no_keyword_is_in_two_tables() -> None:
    tables = [ACTED_UPON, set(PASSED_OVER), set(REFUSED), set(ALIASES)]
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Match tagged prod\n", "Match tagged is not known"),
        ("Match localnetwork 10.0.0.0/8\n", "Match localnetwork is not known"),
        ("Match version OpenSSH_9*\n", "Match version is not known"),
        ('Match exec "test \\"a\\" = a"\n', "backslash"),
        ("Include a\\*b\n", "backslash"),
        ("Include hosts/%h\n", "Include differently"),
        ("Include ${HOME}/hosts\n", "Include differently"),
        ("UserKnownHostsFile # mine\n", "no argument"),
        ('"Port 22\n', "quote is not closed"),
        ("Port 22\0\n", "NUL"),
        ("User a;b\n", "account name"),
        ("HostName a;b\n", "no host"),
        ("HostName -oProxyCommand=x\n", "no host"),
        ("ProxyJump a;b\n", "no jump host"),
        ("ProxyJump a@-b\n", "no jump host"),
        ("IdentityAgent %z\n", "%z means nothing"),
    ],
)
def test_what_is_refused_here_alone(home: Home, text: str, words: str) -> None:
    assert words in refusal(home, text)


def test_patterns_of_host_have_no_case(home: Home) -> None:
    home.write("Host Prod\n HostName real\n")
    assert home.read("prod").hostname == "real"


def test_agent_is_found_through_a_variable(home: Home) -> None:
    for value, agent in (
        ("SSH_AUTH_SOCK", None),
        ("$COLOUR", "blue"),
        ("$NOTHING", "none"),
        ("none", "none"),
    ):
        home.write(f"IdentityAgent {value}\n")
        assert home.read().identity_agent == agent


def test_account_without_a_name_reads_it_all_the_same(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(getpass, "getuser", nameless)
    home.write("Host web\n Port 2222\n")
    assert SshConfig(home.config).lookup("web", "me").port == 2222


def test_aliases_are_the_names_that_are_no_patterns(home: Home) -> None:
    home.write("Host inner web\n", "more")
    home.write("Host web *.example.com !db w?b Db\nInclude more\nMatch host x\n Include more\nHost last\n")
    assert SshConfig(home.config).aliases() == ["web", "Db", "inner", "last"]


def test_hash_of_a_connection_holds_its_jump_host(home: Home) -> None:
    home.write("ProxyJump a@b:1,c\nIdentityFile %C\nCertificateFile %j\n")
    text = f"{socket.gethostname()}web22{home.local.user}c"
    assert home.read().identity_files == (sha1(text.encode(), usedforsecurity=False).hexdigest(),)
    assert home.read().certificate_files == ("c",)


def test_comment_behind_a_jump_host_is_one(home: Home) -> None:
    home.write("ProxyJump a # b\n")
    assert home.read().proxy_jump == (Hop("a", None, None),)


@pytest.mark.parametrize("name", ["config", "part"])
def test_file_that_others_may_write_to_is_refused(home: Home, name: str) -> None:
    home.write("User ann\n", "part")
    home.write("Include part\n")
    assert home.read().user == "ann"
    for mode in (0o620, 0o602):
        (home.ssh / name).chmod(mode)
        with pytest.raises(ConfigError, match=f"{name}.*chmod go-w"):
            home.read()


def test_file_of_somebody_else_is_refused(home: Home) -> None:
    home.write("")
    os.chown(home.config, 4711, -1)
    with pytest.raises(ConfigError, match="others may change"):
        home.read()


def test_missing_file_is_an_error_unless_it_may_be_missing(home: Home) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        home.read()
    assert SshConfig(home.config, may_be_missing=True).lookup("web").hostname == "web"
    assert SshConfig(None).lookup("web").port == 22


def test_config_may_be_none(home: Home) -> None:
    home.write("Host web\n User bob\n")
    for none in ("none", os.devnull):
        settings = Settings(ssh_config=Path(none), ssh_allowed_hosts="*", ssh_default_user="ann")
        assert Reach(settings).target("web", None, None).user == "ann"
    assert (
        Reach(Settings(ssh_config=home.config, ssh_allowed_hosts="*")).target("web", None, None).user == "bob"
    )


def test_include_that_leads_nowhere_is_an_error(home: Home) -> None:
    (home.ssh / "part").symlink_to("gone")
    assert "leads nowhere" in refusal(home, "Include par*\n")


def test_exec_runs_only_when_its_answer_is_needed(home: Home) -> None:
    run = home.folder / "run"
    command = f'exec "echo >{run}"'
    home.write(f"Match all\n Match {command}\n", "part")
    for text in (
        f"Match host db {command}\n",
        f"Match !host web {command}\n",
        f"Match final host db {command}\n",
        "Host db\n Include part\n",
    ):
        home.write(text)
        home.read()
        assert not run.exists()
    SshConfig(home.write(f"Match {command}\n"), local=lambda: home.local).check()
    assert not run.exists()
    home.read()
    assert run.exists()


def test_exec_is_run_by_the_shell_of_the_user_without_stdin_and_secrets(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = home.folder / "shell"
    shell.write_text(f"#!/bin/sh\nenv >{home.folder}/env\n[ $1 = -c ] || exit 1\ncat\neval $2")
    shell.chmod(0o700)
    monkeypatch.setenv("SHELL", str(shell))
    monkeypatch.setenv("JWT_SECRET", "canary")
    home.write("Match exec true\n Port 5\n")
    assert home.read().port == 5
    assert "canary" not in (home.folder / "env").read_text()


def test_exec_that_does_not_end_is_ended_with_what_it_started(home: Home) -> None:
    sign = marker()
    home.write(f'Match exec "sleep 60{sign} & sleep 60{sign}"\n')
    config = SshConfig(home.config, exec_seconds=0.3, local=lambda: home.local)
    with pytest.raises(ConfigError, match="line 1: Match exec cannot be run: it takes too long"):
        config.lookup("web")
    wait_for(lambda: not running(f"60{sign}"))


ATTACKS = [
    "$(touch x)",
    "`touch x`",
    "a;touch x",
    "-oProxyCommand=touch",
    "a|touch x",
    "a\ntouch x",
    "a'b",
    "../x",
    "%h",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_call_names_never_becomes_a_command(home: Home, attack: str) -> None:
    """Whatever gets through as a token stands in `Match exec` and ProxyCommand as one word."""
    home.write('Match exec "printf %%s %n.%r >>out; test -n x"\nProxyCommand false %h %r %p\n')
    reach = Reach(Settings(ssh_allowed_hosts="*@*:*", ssh_config=home.config))
    for host, user in ((attack, None), ("web", attack)):
        with pytest.raises(ArgumentError):
            reach.target(host, user, None)
    assert not (home.folder / "out").exists()


@given(st.text(max_size=12), st.text(max_size=12))
@example("fe80::1%lo", "a@b+c")
def test_every_token_is_one_word_of_a_shell(host: str, user: str) -> None:
    for text, token in ((host, host_token), (user, user_token)):
        try:
            word = token(text)
        except ValueError:
            continue
        assert shlex.quote(word) == word
        assert not word.startswith("-")


def test_defaults_stand_where_the_config_says_nothing(home: Home) -> None:
    home.write('Match user ann exec "test %p = 2200"\n IdentityFile x\nHost db\n User bob\n Port 5\n')
    config = SshConfig(home.config, local=lambda: home.local)
    web = config.lookup("web", default_user="ann", default_port=2200)
    assert (web.user, web.port, web.identity_files) == ("ann", 2200, ("x",))
    db = config.lookup("db", default_user="ann", default_port=2200)
    assert (db.user, db.port) == ("bob", 5)


def test_answer_is_of_now(home: Home) -> None:
    home.write("Port 1\n")
    config = SshConfig(home.config)
    assert config.lookup("web").port == 1
    home.write("Port 2\n")
    assert config.lookup("web").port == 2


def test_process_whose_account_has_no_name_reads_the_config_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in containers that run as any number."""

    def no_entry(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert Local.now().user == ""
