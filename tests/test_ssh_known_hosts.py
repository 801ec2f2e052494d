"""known_hosts, compared with what ssh-keygen says of the same file."""

import base64
import fcntl
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ssh_known_hosts
from conftest import Server, keygen, program
from ssh_errors import HostKeyError
from ssh_host_keys import HostKey
from ssh_known_hosts import KnownAs, KnownHosts, UnknownHostKeyError


def key(path: Path) -> HostKey:
    kind, blob, *_ = path.with_name(path.name + ".pub").read_text().split()
    return HostKey(kind, base64.b64decode(blob))


def line(names: str, shown: HostKey) -> str:
    return f"{names} {shown.type} {base64.b64encode(shown.blob).decode()} comment\n"


def blob(*strings: bytes) -> bytes:
    return b"".join(len(string).to_bytes(4) + string for string in strings)


def fingerprint(path: Path) -> str:
    done = subprocess.run(
        [program("ssh-keygen", "openssh-client"), "-lf", path], capture_output=True, text=True, check=True
    )
    return done.stdout.split()[1]


def is_known(known: KnownHosts, host: KnownAs, shown: HostKey) -> bool:
    try:
        known.verify(host, shown)
    except UnknownHostKeyError:
        return False
    return True


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("keys")
    return [keygen(folder / "one"), keygen(folder / "two"), keygen(folder / "three", "-t", "ecdsa")]


@pytest.mark.parametrize(
    ("names", "host", "port"),
    [
        ("web1", "web1", 22),
        ("WEB1", "web1", 22),
        ("web1,10.0.0.1", "10.0.0.1", 22),
        ("[web1]:2222", "web1", 2222),
        ("web1", "web2", 22),
        ("*.example.com", "a.example.com", 22),
        ("*.example.com", "example.com", 22),
        ("web?", "web1", 22),
        ("web?", "web12", 22),
        ("*,!web1", "web1", 22),
        ("*,!web1", "web2", 22),
        ("!web1", "web2", 22),
        ("[web*]:2222", "web7", 2222),
        ("[web1]:2222", "web1", 22),
        ("#web1", "web1", 22),
        ("[!w]eb1", "xeb1", 22),
        ("::1", "::1", 22),
    ],
)
@pytest.mark.parametrize("hashed", [False, True])
def test_names_match_as_ssh_keygen_says(
    tmp_path: Path, keys: list[Path], names: str, host: str, port: int, hashed: bool
) -> None:
    path = tmp_path / "known_hosts"
    path.write_text("\n# comment\n" + line(names, key(keys[0])))
    keygen_program = program("ssh-keygen", "openssh-client")
    if hashed and not set(names) & set("*?!#"):
        subprocess.run([keygen_program, "-H", "-f", path], check=True, capture_output=True)
        assert names not in path.read_text()
    path.write_text("garbage\n" + path.read_text())
    asked = host if port == 22 else f"[{host}]:{port}"
    found = (
        subprocess.run([keygen_program, "-F", asked, "-f", path], capture_output=True, check=False).returncode
        == 0
    )
    known = KnownHosts(path)
    if found:
        known.verify(KnownAs(host, port), key(keys[0]))
        assert known.algorithms(KnownAs(host, port))[0] == "ssh-ed25519"
    else:
        with pytest.raises(UnknownHostKeyError):
            known.verify(KnownAs(host, port), key(keys[0]))


def test_entry_without_port_serves_any_port(tmp_path: Path, keys: list[Path]) -> None:
    (tmp_path / "known").write_text(line("web1", key(keys[0])))
    KnownHosts(tmp_path / "known").verify(KnownAs("web1", 2222), key(keys[0]))


def test_unknown_key_is_named_as_openssh_names_it(tmp_path: Path, keys: list[Path]) -> None:
    with pytest.raises(UnknownHostKeyError) as raised:
        KnownHosts(tmp_path / "none").verify(KnownAs("web1", 2222), key(keys[0]))
    text = str(raised.value)
    assert f"ED25519 key {fingerprint(keys[0])}" in text
    assert "ssh-keyscan -p 2222 web1" in text


@pytest.mark.parametrize("other", [1, 2])
def test_changed_key_shows_both_fingerprints_and_the_line(
    tmp_path: Path, keys: list[Path], other: int
) -> None:
    (tmp_path / "known").write_text("# comment\n" + line("web1", key(keys[0])))
    with pytest.raises(HostKeyError) as raised:
        KnownHosts(tmp_path / "known").verify(KnownAs("web1", 22), key(keys[other]))
    text = str(raised.value)
    assert not isinstance(raised.value, UnknownHostKeyError)
    assert "changed" in text
    assert fingerprint(keys[0]) in text
    assert fingerprint(keys[other]) in text
    assert "line 2" in text
    assert 'ssh-keygen -R "web1"' in text


def test_one_of_several_keys_is_enough(tmp_path: Path, keys: list[Path]) -> None:
    (tmp_path / "known").write_text(line("web1", key(keys[0])) + line("web1", key(keys[2])))
    known = KnownHosts(tmp_path / "known")
    known.verify(KnownAs("web1", 22), key(keys[2]))
    assert known.algorithms(KnownAs("web1", 22))[:2] == ["ssh-ed25519", "ecdsa-sha2-nistp256"]


@pytest.mark.parametrize("names", ["*", "web1", "other"])
def test_revoked_key_is_refused_whoever_it_was_revoked_for(
    tmp_path: Path, keys: list[Path], names: str
) -> None:
    (tmp_path / "known").write_text(line("web1", key(keys[0])) + "@revoked " + line(names, key(keys[0])))
    with pytest.raises(HostKeyError, match="revoked"):
        KnownHosts(tmp_path / "known").verify(KnownAs("web1", 22), key(keys[0]))


def test_authority_of_certificates_vouches_for_no_plain_key(tmp_path: Path, keys: list[Path]) -> None:
    (tmp_path / "known").write_text("@cert-authority " + line("*", key(keys[0])))
    with pytest.raises(UnknownHostKeyError):
        KnownHosts(tmp_path / "known").verify(KnownAs("web1", 22), key(keys[0]))


def test_recorded_key_is_found_by_ssh_keygen(tmp_path: Path, keys: list[Path]) -> None:
    path = tmp_path / "new" / "known_hosts"
    known = KnownHosts(path)
    known.add(KnownAs("web1", 22), key(keys[0]))
    known.add(KnownAs("::1", 2222), key(keys[1]))
    for asked in ("web1", "[::1]:2222"):
        subprocess.run(["ssh-keygen", "-F", asked, "-f", path], check=True, capture_output=True)
    known.verify(KnownAs("::1", 2222), key(keys[1]))
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_recording_keeps_a_last_line_without_newline(tmp_path: Path, keys: list[Path]) -> None:
    path = tmp_path / "known"
    path.write_text(line("web1", key(keys[0])).rstrip("\n"))
    known = KnownHosts(path)
    known.add(KnownAs("web2", 22), key(keys[1]))
    known.verify(KnownAs("web1", 22), key(keys[0]))
    known.verify(KnownAs("web2", 22), key(keys[1]))


def test_file_that_cannot_be_written_is_told(tmp_path: Path, keys: list[Path]) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(HostKeyError, match="cannot be recorded"):
        KnownHosts(tmp_path / "folder").add(KnownAs("web1", 22), key(keys[0]))


def test_file_that_cannot_be_read_is_told(tmp_path: Path, keys: list[Path]) -> None:
    with pytest.raises(HostKeyError, match="SSH_KNOWN_HOSTS"):
        KnownHosts(tmp_path).verify(KnownAs("web1", 22), key(keys[0]))


pieces = st.text(alphabet="ab*?.", min_size=1, max_size=4)
patterns = st.builds(
    lambda negated, name, port: ("!" if negated else "") + (f"[{name}]:{port}" if port else name),
    st.booleans(),
    pieces,
    st.sampled_from([None, 22, 2222]),
)


@settings(deadline=None)
@given(
    st.lists(patterns, min_size=1, max_size=3), st.text(alphabet="ab.", min_size=1, max_size=4), st.booleans()
)
def test_any_names_match_as_ssh_keygen_says(
    tmp_path_factory: pytest.TempPathFactory, keys: list[Path], listed: list[str], host: str, usual: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any_known_hosts"
    path.write_text(line(",".join(listed), key(keys[0])))
    port = 22 if usual else 2222

    def found(asked: str) -> bool:
        command = [program("ssh-keygen", "openssh-client"), "-F", asked, "-f", str(path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    wanted = found(host) if usual else found(f"[{host}]:2222") or found(host)
    assert is_known(KnownHosts(path), KnownAs(host, port), key(keys[0])) == wanted


def test_other_key_of_the_entry_without_port_is_unknown_as_openssh_says(
    tmp_path: Path, keys: list[Path]
) -> None:
    # sshconnect.c, check_host_key(), HOST_NEW: "checking without port identifier" can only accept.
    (tmp_path / "known").write_text(line("web1", key(keys[0])))
    with pytest.raises(UnknownHostKeyError):
        KnownHosts(tmp_path / "known").verify(KnownAs("web1", 2222), key(keys[1]))


def test_other_key_of_the_entry_with_port_is_changed(tmp_path: Path, keys: list[Path]) -> None:
    (tmp_path / "known").write_text(line("[web1]:2222", key(keys[0])) + line("web1", key(keys[1])))
    with pytest.raises(HostKeyError, match="changed"):
        KnownHosts(tmp_path / "known").verify(KnownAs("web1", 2222), key(keys[1]))


@pytest.mark.parametrize("separator", ["\v", "\f", "\x1c", "\x85", "\u2028"])
def test_only_a_newline_ends_a_line(tmp_path: Path, keys: list[Path], separator: str) -> None:
    hidden = line("web1", key(keys[1]))
    (tmp_path / "known").write_text(line("web2", key(keys[0])).rstrip("\n") + separator + hidden)
    with pytest.raises(UnknownHostKeyError):
        KnownHosts(tmp_path / "known").verify(KnownAs("web1", 22), key(keys[1]))


@pytest.mark.parametrize("kind", ["ssh-rsa", "SSH-ED25519"])
@pytest.mark.parametrize("whole", [False, True])
def test_line_whose_key_is_none_is_passed_over(
    tmp_path: Path, keys: list[Path], kind: str, whole: bool
) -> None:
    broken = HostKey(kind, key(keys[0]).blob if whole else b"\0\0\0")
    (tmp_path / "known").write_text(line("web1", broken))
    known = KnownHosts(tmp_path / "known")
    with pytest.raises(UnknownHostKeyError):
        known.verify(KnownAs("web1", 22), key(keys[1]))


@pytest.mark.parametrize("port", [22, 2222])
def test_advice_about_a_changed_key_removes_it(tmp_path: Path, keys: list[Path], port: int) -> None:
    path = tmp_path / "known hosts"
    known = KnownHosts(path)
    known.add(KnownAs("web1", port), key(keys[0]))
    with pytest.raises(HostKeyError) as raised:
        known.verify(KnownAs("web1", port), key(keys[1]))
    command = shlex.split(str(raised.value).partition("then: ")[2])
    # Without -f ssh-keygen would change the file of whoever runs the tests.
    assert command[:2] == ["ssh-keygen", "-R"]
    assert command[-2:] == ["-f", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    assert not is_known(known, KnownAs("web1", port), key(keys[0]))


def test_recording_keeps_what_the_file_holds(tmp_path: Path, keys: list[Path]) -> None:
    path = tmp_path / "known"
    before = "# mine\ngarbage\n" + line("web1", key(keys[0]))
    path.write_text(before)
    path.chmod(0o644)
    KnownHosts(path).add(KnownAs("web2", 22), key(keys[1]))
    assert path.read_text().startswith(before)
    assert path.read_text().count("\n") == before.count("\n") + 1
    assert path.stat().st_mode & 0o777 == 0o644


SECURITY_KEYS = [
    HostKey("sk-ssh-ed25519@openssh.com", blob(b"sk-ssh-ed25519@openssh.com", b"k" * 32, b"ssh:")),
    HostKey(
        "sk-ecdsa-sha2-nistp256@openssh.com",
        blob(b"sk-ecdsa-sha2-nistp256@openssh.com", b"nistp256", b"\4" + b"k" * 64, b"ssh:"),
    ),
    HostKey("ssh-dss", blob(b"ssh-dss", b"p", b"q", b"g", b"y")),
]


@pytest.mark.parametrize("unused", SECURITY_KEYS, ids=lambda unused: unused.type)
def test_key_of_a_type_that_is_not_used_makes_another_a_changed_one(
    tmp_path: Path, keys: list[Path], unused: HostKey
) -> None:
    (tmp_path / "known").write_text(line("web1", unused))
    known = KnownHosts(tmp_path / "known")
    assert known.algorithms(KnownAs("web1", 22))[0] == "ssh-ed25519"
    with pytest.raises(HostKeyError, match=r"changed.*of a type that is not used here") as raised:
        known.verify(KnownAs("web1", 22), key(keys[0]))
    assert not isinstance(raised.value, UnknownHostKeyError)


def test_authority_of_a_type_that_is_not_used_is_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "known").write_text("@cert-authority " + line("*", SECURITY_KEYS[0]))
    assert len(KnownHosts(tmp_path / "known").algorithms(KnownAs("web1", 22))) == 6


def test_all_files_are_read_and_the_first_is_written(tmp_path: Path, keys: list[Path]) -> None:
    first, second, missing = tmp_path / "first", tmp_path / "second", tmp_path / "missing"
    second.write_text(line("web1", key(keys[0])) + "@revoked " + line("*", key(keys[2])))
    known = KnownHosts(first, second, missing)
    known.verify(KnownAs("web1", 22), key(keys[0]))
    with pytest.raises(HostKeyError, match=f"{second} marks as @revoked"):
        known.verify(KnownAs("web2", 22), key(keys[2]))
    with pytest.raises(UnknownHostKeyError, match=f"not in {first} or {second} or {missing};.*>> {first}"):
        known.verify(KnownAs("web2", 22), key(keys[1]))
    before = second.read_bytes()
    known.add(KnownAs("web2", 22), key(keys[1]))
    assert first.read_text() == f"web2 {key(keys[1]).text}\n"
    assert second.read_bytes() == before
    assert not missing.exists()
    with pytest.raises(HostKeyError, match=f"changed.*{second} line 1"):
        known.verify(KnownAs("web1", 22), key(keys[1]))


def test_alias_stands_for_host_and_port(tmp_path: Path, keys: list[Path]) -> None:
    (tmp_path / "known").write_text(line("cluster", key(keys[0])))
    known = KnownHosts(tmp_path / "known")
    known.verify(KnownAs("web1", 2222, "Cluster"), key(keys[0]))
    with pytest.raises(UnknownHostKeyError, match="other is not in") as raised:
        known.verify(KnownAs("web1", 2222, "other"), key(keys[0]))
    assert "ssh-keyscan -p 2222 web1 | sed" in str(raised.value)


def test_advice_for_an_alias_records_the_alias(tmp_path: Path, keys: list[Path], sshd: Server) -> None:
    known, host = KnownHosts(tmp_path / "known hosts"), KnownAs("127.0.0.1", sshd.port, "alias")
    with pytest.raises(UnknownHostKeyError) as raised:
        known.verify(host, key(keys[0]))
    command = str(raised.value).partition("add the key: ")[2]
    subprocess.run(command, shell=True, check=True, capture_output=True)
    known.verify(host, key(sshd.folder / "host_key"))


def test_key_that_another_process_recorded_meanwhile_is_not_contradicted(
    tmp_path: Path, keys: list[Path]
) -> None:
    known, host = KnownHosts(tmp_path / "known"), KnownAs("web1", 22)
    known.add(host, key(keys[0]))
    known.add(host, key(keys[0]))
    with pytest.raises(HostKeyError, match="changed"):
        known.add(host, key(keys[1]))
    assert (tmp_path / "known").read_text() == f"web1 {key(keys[0]).text}\n"


def test_file_that_stays_locked_is_told(
    tmp_path: Path, keys: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_known_hosts, "_LOCK_SECONDS", 0.1)
    with (tmp_path / "known").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HostKeyError, match="locked"):
            KnownHosts(tmp_path / "known").add(KnownAs("web1", 22), key(keys[0]))


def test_full_disk_is_told(keys: list[Path], small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 240 * 1024)
    path = small_disk / "known"
    path.write_bytes(b"#" * 8191)
    with suppress(OSError), (small_disk / "rest").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    known = KnownHosts(path)
    with pytest.raises(HostKeyError, match="No space left"):
        known.add(KnownAs("web1", 22), key(keys[2]))
    (small_disk / "filler").unlink()
    known.add(KnownAs("web1", 22), key(keys[0]))
    known.verify(KnownAs("web1", 22), key(keys[0]))


def test_salt_that_is_no_base64_matches_nothing(tmp_path: Path, keys: list[Path]) -> None:
    (tmp_path / "known").write_text(
        "".join(line(names, key(keys[0])) for names in ("|1|", "|1|!|x", "|1|ab", "|1|é|x"))
    )
    assert not is_known(KnownHosts(tmp_path / "known"), KnownAs("web1", 22), key(keys[0]))
