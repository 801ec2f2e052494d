"""known_hosts, compared with what ssh itself makes of the same files and the same server.

`ssh` reaches its sshd through a ProxyCommand, so that the server may have any name and port. It stops before a login:
"Permission denied" then says that the host key was accepted.

What differs on purpose, and is kept out of the comparison:

- `@revoked` holds for every host here, whatever names stand on the line.
- The key types of lines without a port count for the order in which algorithms are asked for, on any port.
- A last line without a newline is ended before another is recorded. OpenSSH 9.2 spoils both.
"""

import base64
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import keygen, program
from ssh_errors import HostKeyError
from ssh_host_keys import HostKey
from ssh_known_hosts import KnownAs, KnownHosts, UnknownHostKeyError

CERTIFICATE = "-cert-v01@openssh.com"


def public(path: Path) -> HostKey:
    kind, text, *_ = path.with_name(f"{path.name}.pub").read_text().split()
    return HostKey(kind, base64.b64decode(text))


@dataclass
class Shown:
    """A server: its keys, and the certificates of some of them."""

    folder: Path
    keys: list[Path]
    certificates: dict[Path, Path] = field(default_factory=dict)

    def config(self) -> Path:
        path = self.folder / "sshd_config"
        lines = ["PidFile none", "UsePAM no", *(f"HostKey {key}" for key in self.keys)]
        lines += [f"HostCertificate {certificate}" for certificate in self.certificates.values()]
        path.write_text("\n".join(lines) + "\n")
        return path

    def answer(self, algorithms: list[str]) -> tuple[HostKey, bytes | None]:
        """Return the key and the certificate that a client gets who asks for these (RFC 4253, 7.1)."""
        for algorithm in algorithms:
            kind = "ssh-rsa" if algorithm.startswith("rsa-") else algorithm.removesuffix(CERTIFICATE)
            for path in self.keys:
                if public(path).type != kind:
                    continue
                if not algorithm.endswith(CERTIFICATE):
                    return public(path), None
                if path in self.certificates:
                    return public(path), base64.b64decode(self.certificates[path].read_text().split()[1])
        raise AssertionError("nothing in common")

    def accepts(self, known: KnownHosts, host: KnownAs, *, new: bool = False) -> bool:
        """Whether we would connect."""
        key, certificate = self.answer(known.algorithms(host))
        try:
            known.verify(host, key, certificate)
        except UnknownHostKeyError:
            if not new:
                return False
            known.add(host, key)
        except HostKeyError:
            return False
        return True

    def accepted_by_ssh(self, files: list[Path], host: KnownAs, *options: str, new: bool = False) -> bool:
        """Whether ssh would."""
        command = [program("ssh", "openssh-client"), "-F", "none", "-p", str(host.port)]
        chosen = {
            "BatchMode": "yes",
            "PreferredAuthentications": "none",
            "StrictHostKeyChecking": "accept-new" if new else "yes",
            "GlobalKnownHostsFile": "none",
            "UserKnownHostsFile": " ".join(map(str, files)),
            "UpdateHostKeys": "no",
            "ProxyCommand": f"{program('sshd', 'openssh-server')} -i -f {self.folder}/sshd_config",
        }
        if host.alias:
            chosen["HostKeyAlias"] = host.alias
        for name, value in chosen.items():
            command += ["-o", f"{name}={value}"]
        done = subprocess.run(
            [*command, *options, host.host, "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        refused = "Host key verification failed" in done.stderr
        assert refused != ("Permission denied" in done.stderr), done.stderr
        return not refused


def sign(authority: Path, key: Path, *arguments: str) -> Path:
    """Make a certificate for a host's key, unless the arguments say otherwise, and return its path."""
    kind = [] if "-user" in arguments else ["-h"]
    arguments = tuple(argument for argument in arguments if argument != "-user")
    subprocess.run(
        ["ssh-keygen", "-q", "-s", authority, *kind, "-I", "test", *arguments, f"{key}.pub"], check=True
    )
    return key.with_name(f"{key.name}-cert.pub")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Key pairs: three of a server, a stranger's, and authorities."""
    folder = tmp_path_factory.mktemp("keys")
    kinds = {"ed25519": ["-t", "ed25519"], "ecdsa": ["-t", "ecdsa"], "rsa": ["-t", "rsa", "-b", "2048"]}
    pairs = {kind: keygen(folder / kind, *arguments) for kind, arguments in kinds.items()}
    pairs |= {f"{kind}_authority": keygen(folder / f"{kind}_ca", *kinds[kind]) for kind in kinds}
    pairs["stranger"] = keygen(folder / "stranger")
    Path("/run/sshd").mkdir(exist_ok=True)
    return pairs


@pytest.fixture
def server(tmp_path: Path, keys: dict[str, Path]) -> Callable[..., Shown]:
    """Make a server with copies of the named keys, each with a certificate if there are arguments for one."""

    def make(*names: str, authority: str = "ed25519_authority", arguments: list[str] | None = None) -> Shown:
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        shown = Shown(folder, [folder / name for name in names])
        for path in shown.keys:
            path.write_bytes(keys[path.name].read_bytes())
            path.chmod(0o600)
            path.with_name(f"{path.name}.pub").write_text(f"{public(keys[path.name]).text}\n")
            if arguments is not None:
                shown.certificates[path] = sign(keys[authority], path, *arguments)
        shown.config()
        return shown

    return make


HOSTS = [
    KnownAs("web1", 22),
    KnownAs("web1", 2222),
    KnownAs("WEB1", 22),
    KnownAs("web1.example.com", 22),
    KnownAs("10.0.0.1", 2222),
    KnownAs("::1", 22),
    KnownAs("web1", 2222, "Alias"),
    KnownAs("web1", 22, "web2"),
]
CERTIFIED = "web1,web2,::1,alias"
NAMES = [
    "web1",
    "Web1,other",
    "[web1]:2222",
    "web*",
    "web?,alias",
    "*",
    "*,!web1",
    "!web2,*",
    "*.example.com,10.0.0.?,[10.0.0.*]:2222",
    "::1,[::1]:2222",
    "[*]:2222",
    "alias",
    "x" * 1022 + ",*",
    "x" * 1023 + ",*",
    "#web1",
]
LINES = [
    "",
    "# web1 comment",
    "garbage",
    "@unknown web1 ssh-ed25519 AAAA",
    "web1 ssh-ed25519 AAAA",
    " ",
    "web1",
]


def files_of_one_case(dice: random.Random, keys: dict[str, Path]) -> list[str]:
    """Return the texts of known_hosts files whose lines are likely to matter."""
    texts = []
    for _ in range(dice.choice([1, 1, 2])):
        lines = []
        for _ in range(dice.randint(1, 3)):
            marker = dice.choices(["", "@cert-authority ", "@revoked "], [8, 4, 1])[0]
            name = dice.choice([name for name in keys if ("authority" in name) == (marker[1:2] == "c")])
            names = "*" if marker == "@revoked " else dice.choice(NAMES)
            text = public(keys[name]).text
            text = dice.choice(
                [text, text, text, text.replace(" ", "\t"), text[:-8], text.replace("ssh-", "")]
            )
            comment = dice.choice(["", " comment", " # comment", " " + "long " * 20_000])
            lines.append(f"{dice.choice(['', '', ' '])}{marker}{names} {text}{comment}")
        lines.insert(dice.randint(0, len(lines)), dice.choice(LINES))
        end = dice.choice(["\n", "\n", "\r\n"])
        texts.append(end.join(lines) + dice.choice([end, ""]))
    return texts


def test_files_mean_what_they_mean_to_ssh(
    tmp_path: Path, keys: dict[str, Path], server: Callable[..., Shown]
) -> None:
    dice = random.Random(7)
    servers = [
        server("ed25519", "ecdsa", "rsa"),
        server("ecdsa", arguments=["-n", CERTIFIED]),
        server("rsa", "ed25519", authority="rsa_authority", arguments=["-n", CERTIFIED]),
        server("rsa", authority="ecdsa_authority", arguments=[]),
    ]

    def compare(number: int, texts: list[str], shown: Shown, host: KnownAs) -> tuple[bool, list[str]]:
        """Return whether ssh accepts the server, and in which ways we differ."""
        new = number % 4 == 0
        if new:
            texts[0] = texts[0].removesuffix("\n") + "\n"
        verdicts, files = [], []
        for side in ("ours", "ssh"):
            paths = [tmp_path / f"{number}-{side}-{place}" for place in range(len(texts))]
            for path, text in zip(paths, texts, strict=True):
                path.write_bytes(text.encode())
            known = KnownHosts(*paths)
            order = f"HostKeyAlgorithms={','.join(known.algorithms(host))}"
            options = ["-o", order] if host.port != 22 else []
            verdicts.append(
                shown.accepts(known, host, new=new)
                if side == "ours"
                else shown.accepted_by_ssh(paths, host, *options, new=new)
            )
            files.append([path.read_bytes() for path in paths])
        differs = ["verdict"] * (verdicts[0] != verdicts[1]) + ["file"] * (files[0] != files[1])
        return verdicts[1], [f"{number} {host} {kind}" for kind in differs]

    cases = [
        (number, files_of_one_case(dice, keys), dice.choice(servers), dice.choice(HOSTS))
        for number in range(160)
    ]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda case: compare(*case), cases))
    differences = [difference for _, found in results for difference in found]
    assert not differences, "\n".join(differences)
    accepted = sum(verdict for verdict, _ in results)
    assert 40 <= accepted <= 120


def test_certificates_are_asked_for_where_an_authority_is_known_then_the_known_types(
    tmp_path: Path, keys: dict[str, Path]
) -> None:
    known = tmp_path / "known"
    known.write_text(f"web1 {public(keys['rsa']).text}\n")
    plain = KnownHosts(known).algorithms(KnownAs("web1", 22))
    assert plain[:3] == ["rsa-sha2-512", "rsa-sha2-256", "ssh-ed25519"]
    assert len(plain) == 6
    known.write_text(known.read_text() + known_by(keys["ed25519_authority"], "web1"))
    asked = KnownHosts(known).algorithms(KnownAs("web1", 22))
    assert asked[6:] == plain
    assert {name.removesuffix(CERTIFICATE) for name in asked[:6]} == set(plain)
    assert all(name.endswith(CERTIFICATE) for name in asked[:6])
    assert KnownHosts(known).algorithms(KnownAs("web2", 22))[0] == "ssh-ed25519"


def known_by(authority: Path, names: str = "*") -> str:
    return f"@cert-authority {names} {public(authority).text}\n"


@pytest.mark.parametrize("authority", ["ed25519_authority", "ecdsa_authority", "rsa_authority"])
@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_certificate_of_any_type_by_any_authority_is_accepted_as_by_ssh(
    tmp_path: Path, keys: dict[str, Path], server: Callable[..., Shown], kind: str, authority: str
) -> None:
    shown = server(kind, authority=authority, arguments=["-n", "web1"])
    (tmp_path / "known").write_text(known_by(keys[authority]))
    host = KnownAs("web1", 2222)
    assert shown.accepts(KnownHosts(tmp_path / "known"), host)
    assert shown.accepted_by_ssh([tmp_path / "known"], host)


CERTIFICATES = {
    "any host": ([], "web1", None),
    "a list": (["-n", "web2,web1"], "web1", None),
    "upper case asked": (["-n", "web1"], "WEB1", None),
    "upper case listed": (["-n", "WEB1"], "web1", "does not name"),
    "another host": (["-n", "web2"], "web1", "does not name"),
    "a wildcard": (["-n", "web*"], "web1", "does not name"),
    "a port": (["-n", "[web1]:2222"], "web1", "does not name"),
    "still valid": (["-V", "-1d:+1d"], "web1", None),
    "expired": (["-V", "20200101:20210101"], "web1", "expired on 20"),
    "not yet valid": (["-V", "+1d:+2d"], "web1", "not valid yet"),
    "for ever": (["-V", "always:forever"], "web1", None),
    "a user's": (["-user", "-n", "web1"], "web1", "for a user"),
    "a critical option": (["-O", "critical:x@example.com=y"], "web1", "critical option"),
    "an extension": (["-O", "extension:x@example.com=y"], "web1", None),
}


@pytest.mark.parametrize("case", CERTIFICATES)
def test_certificate_serves_a_host_as_it_does_for_ssh(
    tmp_path: Path, keys: dict[str, Path], server: Callable[..., Shown], case: str
) -> None:
    arguments, name, fault = CERTIFICATES[case]
    shown, host, known = server("ed25519", arguments=arguments), KnownAs(name, 2222), tmp_path / "known"
    known.write_text(known_by(keys["ed25519_authority"]))
    key, certificate = shown.answer(KnownHosts(known).algorithms(host))
    assert certificate is not None
    if fault is None:
        KnownHosts(known).verify(host, key, certificate)
    else:
        with pytest.raises(UnknownHostKeyError, match=f"its certificate .*{fault}") as raised:
            KnownHosts(known).verify(host, key, certificate)
        assert key.fingerprint in str(raised.value)
    assert shown.accepted_by_ssh([known], host) is (fault is None)

    known.write_text(known.read_text() + f"[web1]:2222 {key.text}\n")
    KnownHosts(known).verify(host, key, certificate)
    assert shown.accepted_by_ssh([known], host)


def test_rsa_authority_that_signs_with_sha1_is_refused_as_by_ssh(
    tmp_path: Path, keys: dict[str, Path], server: Callable[..., Shown]
) -> None:
    shown = server("ed25519", authority="rsa_authority", arguments=["-t", "ssh-rsa"])
    (tmp_path / "known").write_text(known_by(keys["rsa_authority"]))
    known, host = KnownHosts(tmp_path / "known"), KnownAs("web1", 22)
    with pytest.raises(UnknownHostKeyError, match="SHA-1"):
        known.verify(host, *shown.answer(known.algorithms(host)))
    assert not shown.accepted_by_ssh([tmp_path / "known"], host)


@pytest.mark.parametrize(
    ("names", "accepted"), [("web1", True), ("[web1]:2222", True), ("web2", False), ("*,!*web1*", False)]
)
def test_authority_serves_the_hosts_that_its_line_names(
    tmp_path: Path, keys: dict[str, Path], server: Callable[..., Shown], names: str, accepted: bool
) -> None:
    shown, host, known = server("ed25519", arguments=[]), KnownAs("web1", 2222), tmp_path / "known"
    known.write_text(known_by(keys["ed25519_authority"], names))
    assert shown.accepts(KnownHosts(known), host) is accepted
    assert shown.accepted_by_ssh([known], host) is accepted


@pytest.mark.parametrize("revoked", ["ed25519_authority", "ed25519"])
def test_revoked_authority_or_key_is_refused_as_by_ssh(
    tmp_path: Path, keys: dict[str, Path], server: Callable[..., Shown], revoked: str
) -> None:
    shown, host, known = server("ed25519", arguments=[]), KnownAs("web1", 22), tmp_path / "known"
    known.write_text(
        known_by(keys["ed25519_authority"])
        + f"web1 {public(keys['ed25519']).text}\n@revoked * {public(keys[revoked]).text}\n"
    )
    with pytest.raises(HostKeyError, match="revoked"):
        KnownHosts(known).verify(host, *shown.answer(KnownHosts(known).algorithms(host)))
    assert not shown.accepted_by_ssh([known], host)


@pytest.mark.parametrize("names", ["web2", "*,!*web1*"])
def test_authority_of_other_hosts_is_refused_where_another_one_is_known(
    tmp_path: Path, keys: dict[str, Path], server: Callable[..., Shown], names: str
) -> None:
    shown, host, known = server("ed25519", arguments=[]), KnownAs("web1", 22), tmp_path / "known"
    known.write_text(known_by(keys["rsa_authority"]) + known_by(keys["ed25519_authority"], names))
    with pytest.raises(UnknownHostKeyError, match="by an authority that is not known for it"):
        KnownHosts(known).verify(host, *shown.answer(KnownHosts(known).algorithms(host)))
    assert not shown.accepted_by_ssh([known], host)


@pytest.mark.parametrize(
    ("length", "end", "accepted"), [(1022, "\n", True), (1023, "\n", False), (1, "\r\n", True)]
)
def test_long_pattern_and_line_end_of_windows_are_read_as_by_ssh(
    tmp_path: Path, keys: dict[str, Path], server: Callable[..., Shown], length: int, end: str, accepted: bool
) -> None:
    shown, host, known = server("ed25519"), KnownAs("web1", 22), tmp_path / "known"
    known.write_bytes(f"{'x' * length},web1 {public(keys['ed25519']).text}{end}".encode())
    assert shown.accepts(KnownHosts(known), host) is accepted
    assert shown.accepted_by_ssh([known], host) is accepted


def test_certificate_for_another_key_than_signed_the_exchange_is_refused(
    tmp_path: Path, keys: dict[str, Path], server: Callable[..., Shown]
) -> None:
    shown, host, known = server("ed25519", arguments=[]), KnownAs("web1", 22), tmp_path / "known"
    known.write_text(known_by(keys["ed25519_authority"]))
    _, certificate = shown.answer(KnownHosts(known).algorithms(host))
    with pytest.raises(UnknownHostKeyError, match="for another key"):
        KnownHosts(known).verify(host, public(keys["stranger"]), certificate)


def test_broken_certificate_leaves_the_plain_key(tmp_path: Path, keys: dict[str, Path]) -> None:
    host, known = KnownAs("web1", 22), tmp_path / "known"
    known.write_text(known_by(keys["ed25519_authority"]))
    with pytest.raises(UnknownHostKeyError, match="its certificate is broken"):
        KnownHosts(known).verify(host, public(keys["ed25519"]), b"broken")
    known.write_text(f"web1 {public(keys['ed25519']).text}\n")
    KnownHosts(known).verify(host, public(keys["ed25519"]), b"broken")


def test_revoked_certificate_revokes_its_key_as_for_ssh(
    tmp_path: Path, keys: dict[str, Path], server: Callable[..., Shown]
) -> None:
    shown, host, known = server("ed25519", arguments=[]), KnownAs("web1", 22), tmp_path / "known"
    (certificate,) = shown.certificates.values()
    known.write_text(f"web1 {public(keys['ed25519']).text}\n@revoked * {certificate.read_text()}")
    with pytest.raises(HostKeyError, match="revoked"):
        KnownHosts(known).verify(host, public(keys["ed25519"]))
    assert not shown.accepted_by_ssh([known], host)


@pytest.mark.parametrize("hashed", [False, True])
def test_new_key_is_recorded_as_by_ssh(tmp_path: Path, server: Callable[..., Shown], hashed: bool) -> None:
    shown = server("ed25519")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    option = f"HashKnownHosts={'yes' if hashed else 'no'}"
    for host in HOSTS[1::2]:
        assert shown.accepts(KnownHosts(ours, hash_names=hashed), host, new=True)
        assert shown.accepted_by_ssh([theirs], host, "-o", option, new=True)
        assert shown.accepted_by_ssh([ours], host)
        assert shown.accepts(KnownHosts(theirs), host)
    assert ("web1" in ours.read_text()) is not hashed
    assert hashed or ours.read_text() == theirs.read_text()
    assert ours.read_text().count("\n") == theirs.read_text().count("\n")


RECORD = """
import sys
from pathlib import Path
from ssh_host_keys import read_key
from ssh_known_hosts import KnownAs, KnownHosts

known, process, key = KnownHosts(Path(sys.argv[1])), sys.argv[2], read_key(*sys.argv[3:])
for number in range(3):
    known.add(KnownAs(f"own{number}-{process}", 22), key)
    known.add(KnownAs(f"common{number}", 22), key)
"""


def test_lines_of_twenty_processes_and_of_ssh_stay_whole(
    tmp_path: Path, server: Callable[..., Shown]
) -> None:
    """Each process records hosts of its own and three that all of them meet; ssh records others meanwhile."""
    shown, path = server("ed25519"), tmp_path / "known"
    key = public(shown.keys[0])
    path.write_text("# a last line without a newline")
    KnownHosts(path).add(KnownAs("first", 22), key)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RECORD, path, str(number), *key.text.split()],
            cwd=Path(__file__).parents[1],
        )
        for number in range(20)
    ]
    by_ssh: list[str] = []
    while any(process.poll() is None for process in processes):
        by_ssh.append(f"ssh{len(by_ssh)}")
        assert shown.accepted_by_ssh([path], KnownAs(by_ssh[-1], 22), new=True)
    assert [process.wait() for process in processes] == [0] * 20
    wanted = {"first", *by_ssh, *(f"common{number}" for number in range(3))}
    wanted |= {f"own{number}-{process}" for number in range(3) for process in range(20)}
    first, *lines = path.read_text().splitlines()
    assert first == "# a last line without a newline"
    assert sorted(lines) == sorted(f"{name} {key.text}" for name in wanted)
