"""What calls may name, run and touch."""

import itertools
import os
import string
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from settings import Settings, SettingsError, Target
from ssh_errors import ArgumentError, RefusedError
from ssh_policy import (
    AllowedCommands,
    AllowedPaths,
    Reach,
    below,
    is_hidden,
    is_within,
    no_running,
    no_writing,
)
from ssh_words import MOST_CHARACTERS


def reach(allowed: str | None = None, **values: Any) -> Reach:
    base: dict[str, Any] = {
        "ssh_default_host": "web1",
        "ssh_default_user": "deploy",
        "ssh_default_port": 2222,
    }
    return Reach(Settings(**(base | values), ssh_allowed_hosts=allowed))


def test_default_target_is_used_when_a_call_names_none() -> None:
    assert reach().target(None, None, None) == Target("deploy", "web1", 2222)


def test_only_the_default_target_is_allowed_by_default() -> None:
    assert reach().target("WEB1", "deploy", 2222).host == "web1"
    for named in (("web2", None, None), (None, "root", None), (None, None, 22)):
        with pytest.raises(RefusedError, match="SSH_ALLOWED_HOSTS"):
            reach().target(*named)


@pytest.mark.parametrize(
    ("allowed", "named", "fits"),
    [
        ("web2", ("web2", None, None), True),
        ("web2", (None, None, None), False),
        ("web2", ("web2", "root", None), False),
        ("web2", ("web2", None, 22), False),
        ("root@web2", ("web2", "root", None), True),
        ("root@web2", ("web2", None, None), False),
        ("web2:22", ("web2", None, 22), True),
        ("*@web2", ("web2", "anyone", None), True),
        ("web*", ("web77", None, None), True),
        ("web?", ("web77", None, None), False),
        ("*.example.com", ("a.b.example.com", None, None), True),
        ("*.example.com", ("example.com.evil.net", None, None), False),
        ("*", ("anything", None, None), True),
        ("*", ("anything", "root", None), False),
        ("*", ("anything", None, 22), False),
        ("*@*:*", ("anything", "root", 1), True),
        ("[::1]:22", ("::1", None, 22), True),
        ("::1", ("0:0::1", None, None), True),
        ("10.0.0.*", ("10.0.0.7", None, None), True),
        ("Web2.Example.COM", ("wEB2.example.com", None, None), True),
        (" a , b ,", ("b", None, None), True),
        ("[a-z]eb2", ("web2", None, None), False),
    ],
)
def test_patterns(allowed: str, named: tuple[Any, Any, Any], fits: bool) -> None:
    try:
        policy = reach(allowed)
    except SettingsError:
        assert not fits
        return
    if fits:
        policy.target(*named)
    else:
        with pytest.raises(RefusedError):
            policy.target(*named)


@pytest.mark.parametrize(
    ("host", "usual"),
    [
        ("10.0.0.05", "10.0.0.5"),
        ("10.0.5", "10.0.0.5"),
        ("0xa.0.0.5", "10.0.0.5"),
        ("167772165", "10.0.0.5"),
        ("::ffff:10.0.0.5", "10.0.0.5"),
        ("10.0.0.5.", "10.0.0.5"),
        ("web2.", "web2"),
    ],
)
def test_host_is_not_given_another_account_by_another_spelling(tmp_path: Path, host: str, usual: str) -> None:
    config = tmp_path / "config"
    config.write_text("Host 10.0.0.5 web2\n User guest\n")
    config.chmod(0o600)
    assert str(reach("*", ssh_config=config).target(usual, None, None)).startswith("guest@")
    with pytest.raises(ArgumentError, match=f"name {usual}$"):
        reach("*", ssh_config=config).target(host, None, None)
    assert reach(f"*,{host}", ssh_config=config).target(host, None, None)
    assert reach("*", ssh_config=config, ssh_default_host=host).target(None, None, None)


@pytest.mark.parametrize(
    "host", ["-oX", "a b", "a;b", "a\nb", "a\0", "$(id)", "a/b", ".a", "a" * 254, "é", "a@b"]
)
def test_what_is_no_host_is_an_error(host: str) -> None:
    with pytest.raises(ArgumentError):
        reach("*@*:*").target(host, None, None)


@pytest.mark.parametrize("user", ["-l", "a b", "a;b", "a\nb", "a\0", "$x", "a" * 65, "é", "a:b"])
def test_what_is_no_user_is_an_error(user: str) -> None:
    with pytest.raises(ArgumentError):
        reach("*@*:*").target("web1", user, None)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_what_is_no_port_is_an_error(port: int) -> None:
    with pytest.raises(ArgumentError):
        reach("*@*:*").target("web1", None, port)


def test_no_host_at_all_names_the_setting() -> None:
    with pytest.raises(ArgumentError, match="SSH_DEFAULT_HOST"):
        reach(ssh_default_host=None).target(None, None, None)


@pytest.mark.parametrize("allowed", ["a b", "a;b", "@", "user@", "a:b:c", "a:ssh", "-x", "us er@a"])
def test_bad_pattern_stops_the_start(allowed: str) -> None:
    with pytest.raises(SettingsError, match="SSH_ALLOWED_HOSTS"):
        reach(allowed)


HARMLESS = set(string.ascii_letters + string.digits + "._-@+:")


@given(st.text(max_size=20), st.text(max_size=20))
def test_only_harmless_characters_get_through(host: str, user: str) -> None:
    try:
        target = reach("*@*:*").target(host, user, None)
    except ArgumentError:
        return
    assert set(target.host + target.user) <= HARMLESS
    assert not target.host.startswith("-")
    assert not target.user.startswith("-")


def test_empty_names_are_none() -> None:
    assert reach().target("", "", None) == Target("deploy", "web1", 2222)


@pytest.mark.parametrize("zone", ["$(id)", ";id", "a b", "a\nb", "a\0", "-x", "\x1b[2J", "a/../b"])
def test_what_is_no_zone_of_an_address_is_an_error(zone: str) -> None:
    with pytest.raises(ArgumentError):
        reach("*@*:*").target(f"fe80::1%{zone}", None, None)


@pytest.mark.parametrize("host", ["a" * 254, "a " * 2000])
def test_error_about_a_long_name_still_says_what_to_give(host: str) -> None:
    with pytest.raises(ArgumentError, match="a host name or an IP address") as raised:
        reach().target(host, None, None)
    assert len(str(raised.value)) <= 1000


@pytest.mark.parametrize("allowed", ["a:0", "a:65536", "a:٢٢", "[::1", "[::1]22"])
def test_pattern_that_cannot_be_meant_stops_the_start(allowed: str) -> None:
    with pytest.raises(SettingsError, match="SSH_ALLOWED_HOSTS"):
        reach(allowed)


def test_one_bad_pattern_among_good_ones_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="'b c'"):
        reach("a,b c,d")


fragments = st.sampled_from(
    [
        "fe80::1",
        "%",
        "::",
        "[",
        "]",
        "10.0.0.1",
        "web1",
        "-",
        ".",
        "@",
        ":",
        "*",
        "$(id)",
        " ",
        "\n",
        "\0",
        "é",
    ]
)
names = st.builds(
    str.__add__, st.sampled_from(["", "fe80::1%", "[", "-"]), st.lists(fragments, max_size=3).map("".join)
)


@given(names, st.just("me") | names)
@example("fe80::1%$(id)", "me")
def test_only_harmless_pieces_get_through(host: str, user: str) -> None:
    try:
        target = reach("*@*:*").target(host, user, None)
    except ArgumentError:
        return
    assert set(target.host + target.user) <= HARMLESS | {"%"}
    assert not target.host.startswith(("-", "."))
    assert not target.user.startswith("-")


# Paths


@pytest.mark.parametrize(
    ("path", "folder", "within"),
    [
        (b"/srv", b"/srv", True),
        (b"/srv/a", b"/srv", True),
        (b"/srv/a/", b"/srv/", True),
        (b"//srv//a", b"/srv", True),
        (b"/srv/..a", b"/srv", True),
        (b"/srv/...", b"/srv", True),
        (b"/srv/\xff", b"/srv", True),
        (b"/a", b"/", True),
        (b"/", b"/", True),
        (b"/srv2", b"/srv", False),
        (b"/srv-a/x", b"/srv", False),
        (b"/sr", b"/srv", False),
        (b"/", b"/srv", False),
        (b"/SRV/a", b"/srv", False),
        (b"/x/srv/a", b"/srv", False),
        (b"/srv/../etc", b"/srv", False),
        (b"/srv/..", b"/srv", False),
        (b"/srv/./a", b"/srv", False),
        (b"/srv/a/../../srv/b", b"/srv", False),
        (b"srv/a", b"/srv", False),
        (b"srv/a", b"srv", False),
        (b"", b"/", False),
        (b"/srv/a\0", b"/srv", False),
        (b"/srv (deleted)", b"/srv", False),
        (b"pipe:[1]", b"/", False),
        (b"/srv/a", b"", False),
        (b"/srv/a", b"/srv/..", False),
    ],
)
def test_path_lies_in_a_folder_by_its_components(path: bytes, folder: bytes, within: bool) -> None:
    assert is_within(path, folder) is within


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        (b"/home/u/.bashrc", True),
        (b"/home/u/.ssh/authorized_keys", True),
        (b"/home/u/.config/fish/config.fish", True),
        (b"/home/u//.profile", True),
        (b"/home/u/...", True),
        (b"/HOME/U/.bashrc", True),
        (b"/home/u/.", False),
        (b"/home/u", False),
        (b"/home/u/notes/.hidden", False),
        (b"/home/u/a.b", False),
        (b"/home/u2/.bashrc", False),
        (b"/home/.u", False),
        (b"/srv/.env", False),
    ],
)
def test_hidden_is_what_begins_with_a_dot_directly_in_the_folder(path: bytes, hidden: bool) -> None:
    assert is_hidden(path, b"/home/u") is hidden


_NAMES = st.binary(min_size=1, max_size=6).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
_PATHS = st.lists(_NAMES | st.sampled_from([b"a", b"b", b"ab", b".a"]), max_size=5).map(
    lambda parts: b"/" + b"/".join(parts)
)


@given(_PATHS, _PATHS)
def test_what_lies_within_is_what_the_folder_leads_to(path: bytes, folder: bytes) -> None:
    inside = PurePosixPath(os.fsdecode(path)).is_relative_to(PurePosixPath(os.fsdecode(folder)))
    assert is_within(path, folder) is inside


@given(_PATHS, st.lists(_NAMES, min_size=1, max_size=4), st.sampled_from([b"/", b"//", b"/./", b"/../"]))
def test_detours_lead_nowhere(folder: bytes, parts: list[bytes], joint: bytes) -> None:
    path = folder.rstrip(b"/") + joint + joint.join(parts)
    assert is_within(path, folder) is (joint.strip(b"/") == b"")


@given(_PATHS, st.lists(_NAMES, min_size=1, max_size=4))
def test_way_from_a_folder_names_every_step_and_ends_at_the_path(folder: bytes, parts: list[bytes]) -> None:
    path = folder.rstrip(b"/") + b"/" + b"/".join(parts)
    steps = below(path, folder)
    assert len(steps) == len(parts)
    assert steps[-1] == path
    assert all(later.startswith(earlier + b"/") for earlier, later in itertools.pairwise(steps))


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (None, ()),
        ("/srv", (b"/srv",)),
        (" /srv : ~/notes :", (b"/srv", b"notes")),
        ("~", (b".",)),
        ("~/", (b".",)),
        ("notes:.", (b"notes", b".")),
        ("/srv/with space:/é", (b"/srv/with space", "/é".encode())),
        ("/a~b", (b"/a~b",)),
    ],
)
def test_entries_begin_at_the_root_or_at_the_login_directory(
    text: str | None, entries: tuple[bytes, ...]
) -> None:
    allowed = AllowedPaths(Settings(allowed_paths=text))
    assert allowed.entries == entries
    assert not allowed.guards_logins


@pytest.mark.parametrize("paths", [None, "/srv"])
@pytest.mark.parametrize("commands", [None, "ls"])
def test_logins_are_guarded_where_commands_and_paths_are_both_limited(
    paths: str | None, commands: str | None
) -> None:
    current = Settings(allowed_paths=paths).model_copy(update={"allowed_commands": commands})
    assert AllowedPaths(current).guards_logins is (paths is not None and commands is not None)


def allowed(prefixes: str | None) -> AllowedCommands:
    return AllowedCommands(Settings(allowed_commands=prefixes))


def test_without_a_list_any_command_line_goes_as_it_is() -> None:
    line = "for i in *; do echo $i >x; done & #"
    assert allowed(None).approved(line, {"A": "b"}) == line


@pytest.mark.parametrize(
    ("line", "rebuilt"),
    [
        ("ls", "'ls'"),
        ("ls -l /tmp", "'ls' '-l' '/tmp'"),
        ("git log -1", "'git' 'log' '-1'"),
        ("git   'log'", "'git' 'log'"),
        ("systemctl status nginx", "'systemctl' 'status' 'nginx'"),
        ("ls|cat -n && ls; cat || ls", "'ls' | 'cat' '-n' && 'ls' ; 'cat' || 'ls'"),
        ('cat "it\'s"', "'cat' 'it'\\''s'"),
        ("cat ''", "'cat' ''"),
        ("\\l\\s \\$x", "'ls' '$x'"),
        ("'my tool' x", "'my tool' 'x'"),
    ],
)
def test_what_is_allowed_is_rebuilt_with_each_word_quoted(line: str, rebuilt: str) -> None:
    assert allowed("ls, cat,git log,\tsystemctl  'status' ,my\\ tool").approved(line) == rebuilt


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("touch /tmp/x", "touch /tmp/x"),
        ("git push", "git push"),
        ("git", "'git'"),
        ("git -c x log", "git -c x log"),
        ("git 'log x'", "git log x"),
        ("/bin/ls", "/bin/ls"),
        ("./ls", "./ls"),
        ("LS", "LS"),
        ("lsx", "lsx"),
        ("'ls '", "'ls '"),
        ("'ls -l'", "ls -l"),
        ("'' ls", "ls"),
        ("ls; touch x", "touch x"),
        ("ls | touch x", "touch x"),
        ("ls && touch x", "touch x"),
        ("touch x || ls", "touch x"),
        ("exec ls", "exec ls"),
        ("'A=b' ls", "A=b ls"),
    ],
)
def test_command_that_begins_with_no_allowed_prefix_is_refused(line: str, part: str) -> None:
    with pytest.raises(RefusedError) as raised:
        allowed("ls,cat,git log").approved(line)
    assert "ALLOWED_COMMANDS" in str(raised.value)
    assert part in str(raised.value)
    assert "ls,cat,git log" in str(raised.value)


def test_refusal_says_which_part_of_a_line_cannot_be_read_and_why() -> None:
    with pytest.raises(RefusedError, match=r"ALLOWED_COMMANDS .*'\*\.log'.*single quotes"):
        allowed("ls").approved("ls *.log")


def test_variables_are_refused_while_a_list_is_set() -> None:
    with pytest.raises(RefusedError, match=r"^env .*ALLOWED_COMMANDS"):
        allowed("ls").approved("ls", {"LD_PRELOAD": "/tmp/x"})
    assert allowed("ls").approved("ls", {}) == "'ls'"


@pytest.mark.parametrize("line", ["touch " + "a" * 5000, "ls " * 5000 + "$", "a" * (MOST_CHARACTERS + 1)])
def test_refusal_of_a_long_line_fits_an_error(line: str) -> None:
    with pytest.raises(RefusedError, match="ALLOWED_COMMANDS") as raised:
        allowed("ls," * 5000 + "ls").approved(line)
    assert len(str(raised.value)) <= 1000


@pytest.mark.parametrize(
    "prefixes",
    [
        *(",", "ls,", ",ls", "ls,,cat", " ", "ls,  ,cat", "'a,b'"),
        *("ls;cat", "ls|cat", "ls;", "ls >x", "A=b ls", "if", "# ls"),
        *("ls *", "$SHELL", "~/bin/x", "'ls", "ls\ncat", "\ud800"),
    ],
)
def test_list_that_cannot_be_read_stops_the_start(prefixes: str) -> None:
    with pytest.raises(SettingsError, match=r"^ALLOWED_COMMANDS holds ") as raised:
        allowed(prefixes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("read_only", "commands", "runs", "writes"),
    [
        (False, None, True, True),
        (True, None, False, False),
        (False, "ls", True, False),
        (True, "ls", True, False),
    ],
)
def test_what_the_settings_leave(read_only: bool, commands: str | None, runs: bool, writes: bool) -> None:
    settings = Settings(read_only=read_only, allowed_commands=commands)
    assert (no_running(settings) is None, no_writing(settings) is None) == (runs, writes)


def test_what_is_refused_names_the_setting() -> None:
    for why in (no_running(Settings(read_only=True)), no_writing(Settings(read_only=True))):
        assert "READ_ONLY" in (why or "")
    assert "ALLOWED_PATHS" in (no_writing(Settings(allowed_commands="ls")) or "")
