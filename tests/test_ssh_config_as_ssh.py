"""What the SSH config makes of a host, compared with `ssh -G` of the OpenSSH client on this machine.

What `ssh -G` does not expand (IdentityFile, CertificateFile, ProxyCommand) is compared with what `ssh -v` says it uses.

What differs from OpenSSH on purpose, tested in `test_ssh_config.py`:

- Host patterns are compared without case: calls name hosts in lower case.
- A user name, a host and a jump host that are no tokens (`settings`) are refused.
- Files that others may write to are refused also when they are named, not only in their usual place; and by a group
  also where Debian's ssh finds nobody else in it.
- An unclosed quote in the keyword, a value that a flag does not know, a NUL byte: refused, never passed over.
- A backslash in Match or Include, and `%` or `${` in Include, is refused: versions of OpenSSH read it differently.
- `Match exec` in a file that is included where it cannot apply is not run.
- Keywords that are passed over are not looked at further; an unknown cipher is no error, since it is not offered.
- `~` and %d are the HOME of the environment, as everywhere in this server; OpenSSH asks the account database.
- %C holds the jump host (%j), as since OpenSSH 9.6.
- CanonicalizeHostname and other keywords of `ssh_config_keywords.REFUSED` are errors.
"""

import random
import subprocess

import pytest

from ssh_client import Home
from ssh_config import HostConfig
from ssh_config_values import Hop, assembled
from ssh_errors import ConfigError

UNTOLD = (("userknownhostsfile", "none"), ("globalknownhostsfile", "none"))


def as_ssh_prints(config: HostConfig, home: Home) -> dict[str, list[str]]:
    """Return a config in the words of `ssh -G`, with OpenSSH's defaults for what it does not say."""
    usual = [f"{home.ssh}/known_hosts {home.ssh}/known_hosts2"]
    everywhere = ["/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"]
    strictness = {"yes": "true", "no": "false", None: "ask"}
    strict = config.strict_host_key_checking
    return {
        "host": [config.named],
        "hostname": [config.hostname],
        "user": [config.user],
        "port": [str(config.port)],
        "addressfamily": [config.address_family],
        "identitiesonly": ["yes" if config.identities_only else "no"],
        "proxyjump": [",".join(map(as_hop, config.proxy_jump))] if config.proxy_jump else [],
        "connecttimeout": ["none" if config.connect_timeout is None else str(config.connect_timeout)],
        "serveraliveinterval": [str(config.server_alive_interval or 0)],
        "hostkeyalias": [config.host_key_alias] if config.host_key_alias else [],
        "stricthostkeychecking": [strictness.get(strict) or str(strict)],
        "hashknownhosts": ["yes" if config.hash_known_hosts else "no"],
        "userknownhostsfile": usual if config.user_known_hosts is None else files(config.user_known_hosts),
        "globalknownhostsfile": everywhere
        if config.global_known_hosts is None
        else files(config.global_known_hosts),
        "identityagent": [config.identity_agent] if config.identity_agent else [],
    }


def files(names: tuple[str, ...]) -> list[str]:
    return [" ".join(names)] if names else []


def as_hop(hop: Hop) -> str:
    numeric = ":" in hop.host or not set(hop.host) - set("0123456789.")
    host = f"[{hop.host}]" if numeric else hop.host
    return (f"{hop.user}@" if hop.user else "") + host + (f":{hop.port}" if hop.port else "")


def compare(home: Home, host: str, user: str | None = None, port: int | None = None) -> bool:
    """Compare both readers; return whether they could read the config."""
    theirs = home.ssh_g(host, user, port)
    try:
        ours = home.read(host, user, port)
    except ConfigError:
        if theirs is not None:
            raise
        return False
    assert theirs is not None, "only refused by ssh"
    theirs["proxyjump"] = [hops.replace("ssh://", "") for hops in theirs.get("proxyjump", [])]
    for keyword, values in as_ssh_prints(ours, home).items():
        told = [value for value in theirs.get(keyword, []) if (keyword, value) not in UNTOLD]
        assert values == told, keyword
    uses = home.ssh_uses(host, user, port)
    if ours.identity_files is not None:
        assert list(ours.identity_files) == uses["identityfile"]
    assert list(ours.certificate_files) == uses["certificatefile"]
    assert ([ours.proxy_command] if ours.proxy_command else []) == uses["proxycommand"]
    return True


class Writer:
    """Writes configurations from a grammar of what OpenSSH reads; one seed, one configuration."""

    HOSTS = ("web", "web1", "db", "a.example.com", "10.0.0.7", "::1")
    PATTERNS = (
        "web",
        "web*",
        "*",
        "w?b",
        "!web",
        "!db*",
        "*.example.com",
        "db",
        "10.0.*",
        "real-*",
        "::1",
        "[a-z]*",
    )
    USERS = ("deploy", "root", "me", "ann.b-c")

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.included: dict[str, str] = {}

    def config(self, depth: int = 0) -> str:
        pick = self.random
        lines = [self.option(depth) for _ in range(pick.randrange(3))]
        for _ in range(pick.randrange(1, 5)):
            lines.append(self.block())
            lines += [self.option(depth) for _ in range(pick.randrange(1, 6))]
        return "\n".join(lines) + pick.choice(["", "\n"])

    def block(self) -> str:
        pick = self.random
        if pick.random() < 0.55:
            return self.line("Host", " ".join(pick.choices(self.PATTERNS, k=pick.randrange(1, 4))))
        if pick.random() < 0.1:
            return self.line(
                "Match", pick.choice(["all", "final all", "canonical all", "!all", "!final all"])
            )
        return self.line("Match", " ".join(self.criterion() for _ in range(pick.randrange(1, 4))))

    def criterion(self) -> str:
        pick = self.random
        name = pick.choice(["host", "originalhost", "user", "localuser", "exec", "final", "canonical"])
        sign = pick.choice(["", "", "", "!"])
        if name in ("final", "canonical"):
            return sign + name
        if name == "exec":
            commands = (
                "true",
                "false",
                '"test %h = web"',
                '"test %n != db"',
                '"test %r = deploy -a %p = 22"',
            )
            return f"{sign}exec {pick.choice((*commands, chr(34) + 'test -n %k -a %L%l%d%u%i' + chr(34)))}"
        values = {
            "host": self.PATTERNS,
            "originalhost": self.PATTERNS,
            "user": (*self.USERS, "d*", "!root"),
            "localuser": ("root", "r*", "nobody", "!root,*"),
        }
        patterns = ",".join(pick.choices(values[name], k=pick.randrange(1, 3)))
        return f"{sign}{name}{pick.choice([' ', ' ', '='])}{patterns}"

    def option(self, depth: int) -> str:
        pick = self.random
        if depth < 3 and pick.random() < 0.08:
            name = f"part{len(self.included)}.conf"
            self.included[name] = ""
            self.included[name] = self.config(depth + 1)
            return self.line(
                "Include", pick.choice([name, f"~/.ssh/{name}", f"{name[:-5]}*", f"none.conf {name}"])
            )
        keyword = pick.choice(list(self.values()))
        return self.line(keyword, pick.choice(self.values()[keyword]))

    def values(self) -> dict[str, tuple[str, ...]]:
        tokens = "%L-%d-%h-%i-%k-%l-%n-%p-%r-%u-%%"
        paths = (
            "~/.ssh/id_%h",
            f"~/{tokens}",
            "/keys/${COLOUR}",
            '"/with space/id"',
            "none",
            "~daemon/id",
            "rel",
        )
        return {
            "HostName": (
                "real-1",
                "10.1.2.3",
                "REAL.example.com",
                "%h.example.com",
                "::1",
            ),
            "User": self.USERS,
            "Port": ("22", "2222", "ssh", "65535"),
            "IdentityFile": paths,
            "CertificateFile": paths[:4],
            "IdentitiesOnly": ("yes", "no", "true", "False"),
            "IdentityAgent": ("~/agent-%u", "none", "/run/${COLOUR}"),
            "ProxyJump": (
                "jump",
                "me@jump:2200",
                "a,b@c,d:1",
                "none",
                "ssh://x@y:9",
                "[::1]:4",
                "10.0.0.1",
                "NONE",
            ),
            "ProxyCommand": (
                "false %h %p %r %n %%",
                "none",
                "false '#' \"a b\"",
                "= false x",
                "false $HOME ${X}",
            ),
            "ConnectTimeout": ("5", "none", "1m30s", "2H", "1h1"),
            "ServerAliveInterval": ("0", "15", "1M", "none"),
            "HostKeyAlias": ("Alias", "other"),
            "UserKnownHostsFile": ("~/.ssh/kh", "none", f"/a ~/b /c/${{COLOUR}}/{tokens}", "/dev/null"),
            "GlobalKnownHostsFile": ("/etc/a /etc/b", "none", "~/c"),
            "StrictHostKeyChecking": ("yes", "no", "ask", "accept-new", "off", "Yes"),
            "HashKnownHosts": ("yes", "no"),
            "AddressFamily": ("any", "inet", "inet6"),
            "Ciphers": ("aes128-ctr", "+aes128-cbc", "-aes*", "^aes256-ctr"),
            "ForwardX11": ("yes",),
            "LocalForward": ("8080 localhost:80",),
            "SendEnv": ("LANG LC_*",),
            "PreferredAuthentications": ("publickey,password",),
            "IgnoreUnknown": ("UseKeychain,Unheard*",),
        }

    def line(self, keyword: str, value: str) -> str:
        """Write a line in one of the ways that mean the same."""
        pick = self.random
        keyword = pick.choice([keyword, keyword, keyword.lower(), keyword.upper()])
        between = pick.choice([" ", " ", " ", "  ", "\t", "=", " = ", "= "])
        if pick.random() < 0.1:
            keyword, between = f'"{keyword}"', " "
        raw = keyword.strip('"').lower() in ("proxycommand", "proxyjump", "match")
        if not raw and pick.random() < 0.1 and not set(" \"'") & set(value):
            value = pick.choice([f'"{value}"', f"'{value}'", value[:1] + f'"{value[1:]}"'])
        end = "" if raw else pick.choice(["", "", "", "  ", "\t", " # a comment", "\r", "\f"])
        noise = pick.choice(["", "", "", "", "# a comment\n", "\n", "   \t\n"])
        return f"{noise}{pick.choice(['', '  ', chr(9)])}{keyword}{between}{value}{end}"


@pytest.mark.parametrize("seed", range(200))
def test_generated_configs_mean_what_they_mean_to_ssh(home: Home, seed: int) -> None:
    writer = Writer(seed)
    home.write(writer.config())
    for name, text in writer.included.items():
        home.write(text, name)
    pick = writer.random
    user = pick.choice([None, None, None, "deploy"])
    compare(home, pick.choice(Writer.HOSTS), user, pick.choice([None, None, None, 2200]))


READ_ALIKE = {
    "nothing": "",
    "only comments": "# Host web\n   # User me\n",
    "first value wins": "Host web\n User one\nHost *\n User two\n Port 3\n",
    "files add up, each once": "IdentityFile a\nIdentityFile b\nIdentityFile a\nHost *\nIdentityFile c\n",
    "no file": "IdentityFile none\nCertificateFile ~/c\n",
    "negation before": "Host !web *\n Port 1\nHost !db\n Port 3\n",
    "negation behind": "Host * !web\n Port 2\nHost * !db\n Port 4\n",
    "equals and quotes": 'Host="web"\nPort = 2222\n"User" "ann"\nIdentityFile "/a b/c"\n',
    "single quotes": "IdentityFile '/a b/\"c'\n",
    "escapes": "IdentityFile a\\ b\\\"c\\'d\\\\e\\f\n",
    "escape in quotes": 'IdentityFile "a\\ b\\"c"\n',
    "quotes inside a word": "IdentityFile a'b c'd\"e f\"\n",
    "a hash inside a word": "IdentityFile a#b\n",
    "a hash behind": "IdentityFile a #b\n",
    "a hash in quotes": 'IdentityFile "#a"\n',
    "comment in a proxy command": "ProxyCommand false a # b\n",
    "quotes in a proxy command": "ProxyCommand false 'a b' \"%h\"\n",
    "no proxy": "ProxyCommand none\nProxyJump a\n",
    "no jump": "ProxyJump none\nProxyCommand false\n",
    "no jump, then another": "ProxyJump none\nProxyJump b\n",
    "no jump, then a command, then a jump": "ProxyJump none\nProxyCommand false\nProxyJump b\n",
    "jump before command": "ProxyJump a\nProxyCommand false\n",
    "command before jump": "ProxyCommand false\nProxyJump a\n",
    "jump hosts": "ProxyJump ann@a:1,[::1]:2,ssh://bob@c:3,d\n",
    "jump user with an at": "ProxyJump a@b@c:1\n",
    "no time is no value": "ConnectTimeout none\nConnectTimeout 5\nServerAliveInterval none\nServerAliveInterval 6\n",
    "times": "ConnectTimeout 1w2d3h4m5s\nServerAliveInterval 1h30\n",
    "port by name": "Port ssh\n",
    "host name twice": "HostName a.%h\nHostName b\n",
    "host name in capitals": "HostName WEB.Example.COM\n",
    "old form of an address": "HostName 127.1\n",
    "long form of an address": "HostName 0:0::1\n",
    "old form where it cannot be one": "AddressFamily inet6\nHostName 127.1\n",
    "host name by name": "Match host web\n Port 1\nHostName real\nMatch host real\n User ann\n",
    "original name": "HostName real\nMatch originalhost web\n HostKeyAlias k\n",
    "host name in final": "HostName real\nMatch final host real\n Port 7\nHost real\n User ann\n",
    "host name is fixed in final": "Match final\n HostName other\nHost web\n HostName real\n",
    "final negated": "Match !final\n Port 1\nMatch final\n Port 2\n User ann\n",
    "final where nothing applies": "Host db\n Match final\n Port 2\n",
    "canonical asks for no second reading": "HostName real\nMatch canonical\n Port 2\nHost real\n Port 3\n",
    "all": "Match all\n Port 2\n",
    "not all": "Match !all\n Port 2\n",
    "all behind one": "Match host db all\n Port 2\nMatch host web all\n Port 3\n",
    "user so far": "Match user ann\n Port 1\nUser ann\nMatch user ann\n User bob\n IdentityFile x\n",
    "lists of criteria": "Match host w*,!web\n Port 1\nMatch host db,w*\n Port 2\n",
    "criteria without case": "Match HOST WEB\n Port 2\n",
    "exec": 'Match exec "test %h.%n.%p.%r = web.web.22.root"\n Port 2\n',
    "exec after host name": 'HostName real\nPort 5\nMatch exec "test %h.%n.%p = real.web.5"\n User ann\n',
    "exec with an alias": 'HostKeyAlias Kay\nMatch exec "test %k = Kay"\n User ann\n',
    "exec negated": "Match !exec false\n Port 2\nMatch !exec true\n Port 3\n",
    "hash of the connection": "IdentityFile %C\nUser ann\nPort 7\nHostName real\nUserKnownHostsFile /k/%C\n",
    "alias in tokens": "HostKeyAlias Kay\nIdentityFile %k\n",
    "old keywords": "IdentityFile2 a\nDSAAuthentication yes\nProtocol 2\n",
    "known hosts": 'UserKnownHostsFile ~/a "b c" ~/d\nUserKnownHostsFile e\n',
    "no known hosts": "UserKnownHostsFile none\nGlobalKnownHostsFile none\n",
    "ignored": "IgnoreUnknown UseKeychain,Foo*\nIgnoreUnknown Bar\nUseKeychain yes\nFOOBAR 1 2\n",
    "include nothing": "Include nothing-*\nPort 2\n",
    "include in order": "Include part-*\n",
    "include where it applies": "Host db\n Include part-a\nHost web\n Include part-b\n Port 9\n",
    "include in a match": "Match user nobody\n Include part-a\nMatch user root\n Include part-b\n",
    "block of an include ends with it": "Host web\n Include part-c\n User ann\n",
    "carriage returns": "Host web\r\n Port 2\r\n",
    "nothing behind equals": "Host web\n Port=2\n User =ann\n",
    "keyword in pieces": 'P"or"t 2\n'.replace('"or"t', "ort"),
    "canonical off": "CanonicalizeHostname no\nCanonicalDomains example.com\nCanonicalizePermittedCNAMEs none\n",
}
PARTS = {
    "part-a": "Port 1\nUser a\n",
    "part-b": "Port 2\nHost web\nUser b\nMatch all\nHostKeyAlias b\n",
    "part-c": "Host db\n Port 3\n",
    "loop": "Include loop\n",
}


@pytest.mark.parametrize("text", READ_ALIKE.values(), ids=READ_ALIKE.keys())
def test_config_means_what_it_means_to_ssh(home: Home, text: str) -> None:
    for name, part in PARTS.items():
        home.write(part, name)
    home.write(text)
    for user, port in ((None, None), ("ann", 2200)):
        assert compare(home, "web", user, port)


REFUSED_ALIKE = {
    "unknown keyword": "Prot 22\n",
    "unknown keyword elsewhere": "Host db\n Prot 22\n",
    "unknown keyword not ignored": "Host db\n IgnoreUnknown Prot\nHost web\n Prot 22\n",
    "no argument": "Port\n",
    "empty argument": 'User ""\n',
    "two arguments": "User a b\n",
    "open quote": 'User "a\n',
    "open quote in a proxy command": "ProxyCommand 'a\n",
    "no port": "Port 70000\n",
    "no port elsewhere": "Host db\n Port x\n",
    "no flag": "IdentitiesOnly maybe\n",
    "no strictness": "StrictHostKeyChecking sometimes\n",
    "no family": "AddressFamily inet7\n",
    "no time": "ConnectTimeout 5x\n",
    "too long a time": "ConnectTimeout 99999999w\n",
    "no jump port": "ProxyJump a:0\n",
    "no jump host": "ProxyJump a,,b\n",
    "jump of a bare address": "ProxyJump ::1\n",
    "no jump user": "ProxyJump @a\n",
    "none among jumps": "UserKnownHostsFile a none\n",
    "empty pattern": 'Host web ""\n',
    "unknown criterion": "Match colour blue\n",
    "no criterion": 'Match ""\n',
    "criterion without argument": "Match host\n",
    "argument behind all": "Match all host web\n",
    "all behind two": "Match host web user root all\n",
    "token that is none": "IdentityFile %z\nUserKnownHostsFile %z\n",
    "token of another keyword": "HostName %p\n",
    "percent at the end": "HostName a%\n",
    "exec token that is none": "Match host db exec %z\n",
    "no such variable": "UserKnownHostsFile ${NOTHING}\n",
    "no such account": "UserKnownHostsFile ~nobody-at-all/x\n",
    "includes in a circle": "Include loop\n",
}


@pytest.mark.parametrize("text", REFUSED_ALIKE.values(), ids=REFUSED_ALIKE.keys())
def test_config_that_ssh_refuses_is_refused_with_its_line(home: Home, text: str) -> None:
    home.write(PARTS["loop"], "loop")
    home.write(text)
    assert home.ssh_g("web", None, None) is None
    with pytest.raises(ConfigError, match=r"SSH_CONFIG: .*(config|loop) line \d: ") as raised:
        home.read()
    assert len(str(raised.value)) < 400


def test_lists_of_algorithms_are_put_together_as_by_ssh(home: Home) -> None:
    home.write("")
    usual = home.ssh_g("web", None, None)
    assert usual is not None
    for keyword, query in (("ciphers", "cipher"), ("kexalgorithms", "kex"), ("macs", "mac")):
        every = subprocess.run(
            ["ssh", "-Q", query], capture_output=True, text=True, check=True
        ).stdout.split()
        (default,) = usual[keyword]
        for sign in ("", "+", "^", "-"):
            for names in (every[0], ",".join(every[2:4]), ",".join(reversed(every[:3])), "*256*,*512"):
                if "*" in names and sign != "-":
                    continue
                home.write(f"{keyword} {sign}{names}\n")
                theirs = home.ssh_g("web", None, None)
                assert theirs is not None
                spec = getattr(home.read(), {"kexalgorithms": "kex_algorithms"}.get(keyword, keyword))
                assert ",".join(assembled(spec, default.split(","), every)) == theirs[keyword][0]
