"""Node sets: what they stand for, and what they must not be."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settings_values import host_token
from ssh_errors import ArgumentError
from ssh_nodes import MOST_NODES, Node, folded, nodes, unfolded


def hosts(*texts: str) -> list[str]:
    return [node.host for node in nodes(texts)]


def test_node_set_stands_for_its_names() -> None:
    assert hosts("web[01-03]") == ["web01", "web02", "web03"]
    assert hosts("web[1,3-4]", "db1") == ["web1", "web3", "web4", "db1"]
    assert hosts("r[1-2]n[1-2].example.com") == [f"r{r}n{n}.example.com" for r in (1, 2) for n in (1, 2)]
    assert hosts("10.0.[0-1].[7-8]") == ["10.0.0.7", "10.0.0.8", "10.0.1.7", "10.0.1.8"]
    assert hosts("node[0-8/4]") == ["node0", "node4", "node8"]


def test_user_and_port_hold_for_the_whole_set() -> None:
    assert nodes(["ops@web[1-2]:2222"]) == [Node("web1", "ops", 2222), Node("web2", "ops", 2222)]
    assert nodes(["a@b@web1"]) == [Node("web1", "a@b")]


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("::1", Node("::1")),
        ("[::1]", Node("::1")),
        ("[::1]:22", Node("::1", port=22)),
        ("root@[fe80::1%eth0]:22", Node("fe80::1%eth0", "root", 22)),
    ],
)
def test_addresses_in_brackets_are_no_node_sets(text: str, node: Node) -> None:
    assert nodes([text]) == [node]


def test_commas_outside_of_brackets_part_hosts() -> None:
    assert hosts("web[1,3],db1, ops1 ") == ["web1", "web3", "db1", "ops1"]


def test_each_host_is_named_once_in_the_order_of_the_call() -> None:
    assert hosts("b", "a[1-2]", "b", "a1") == ["b", "a1", "a2"]


@pytest.mark.parametrize(
    "text",
    [
        *("@web", "@*", "web1,@all", "@source:group", "*", "web*", "web[1-3]*", "a?"),
        *("a!b", "a&b", "a^b", "a b", "web[1-3]!web2", "web[1-3]&web[2-5]", "web[1-3]^web1"),
        *("$(id)", "`id`", "a;id", "a|b", "a\nb", "-oProxyCommand=id", "../a", "a/b", "web[1-3]/x"),
        *(
            "web[",
            "web]",
            "web[]",
            "web[a-c]",
            "web[1-]",
            "web[-3]",
            "web[3-1]",
            "web[1-3",
            "web[[1]]",
            "web[1..3]",
        ),
        *("web:0", "web:65536", "web:x", "web[1-2]:", "web:", "@", "u@", "-u@web", "web[1-3/0]", "web[٣]"),
    ],
)
def test_what_names_no_host_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="nothing was run"):
        nodes([text])


@pytest.mark.parametrize("texts", [[], [""], [" , "]])
def test_no_host_at_all_is_refused(texts: list[str]) -> None:
    with pytest.raises(ArgumentError):
        nodes(texts)


@pytest.mark.parametrize(
    "text",
    [
        "a[0-999999999]",
        "a[0-99]b[0-99]c[0-99]d[0-99]e[0-99]",
        "a" + "[1-9]" * 40,
        f"a[1-{MOST_NODES + 1}]",
        f"a[1-{MOST_NODES}],b",
    ],
)
def test_more_than_a_call_may_reach_is_refused_before_it_is_expanded(text: str) -> None:
    began = time.thread_time()
    with pytest.raises(ArgumentError, match=f"one call reaches {MOST_NODES} at most"):
        nodes([text])
    assert time.thread_time() - began < 1


def test_what_is_longer_than_any_list_of_hosts_is_refused() -> None:
    with pytest.raises(ArgumentError, match="is longer than"):
        nodes(["a" * 200_000])


def test_as_many_as_a_call_may_reach_are_expanded() -> None:
    assert len(nodes([f"a[1-{MOST_NODES}]"])) == MOST_NODES


def test_files_and_programs_of_this_machine_are_not_asked(tmp_path: Path) -> None:
    """ClusterShell would read groups from its configuration and run the upcalls that it names."""
    (tmp_path / "groups.conf").write_text(
        f"[Main]\ndefault: own\n[own]\nmap: touch {tmp_path}/asked; echo web1\nall: touch {tmp_path}/asked; echo web1\n"
    )
    program = (
        "from ssh_nodes import *\n"
        "print(folded(nodes(['web[1-3]', 'db1'])))\n"
        "for text in ('@x', '@*', 'web[1-2],@x', '@own:x'):\n"
        "    try: nodes([text])\n"
        "    except ArgumentError: pass\n"
        "    else: raise SystemExit('expanded')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env={"CLUSTERSHELL_CFGDIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("db1,web[1-3]\n", 0), done.stderr
    assert not (tmp_path / "asked").exists()


def test_names_fold_as_clush_folds_them() -> None:
    assert folded(nodes(["web[01-17,19-20]"])) == "web[01-17,19-20]"
    assert folded(nodes(["u@web[1-2]:22", "web[1-2]", "[::1]:22"])) == "u@web[1-2]:22,web[1-2],[::1]:22"


def test_hosts_that_fold_badly_are_folded_at_once() -> None:
    """ClusterShell compares each with each, and that again and again: 15 s for these, with nobody to cancel it."""
    some = {Node(f"10.{n * 7919 % 251}.{n * 104729 % 241}.{n * 1299709 % 239}") for n in range(1000)}
    began = time.thread_time()
    text = folded(some)
    assert time.thread_time() - began < 2
    assert set(nodes([text])) == some


def test_what_folds_into_more_than_a_call_may_name_is_unfolded_again() -> None:
    """The names of a fleet in the background come back in its job_id, once its jobs have been started."""
    some = nodes([f"{'x' * 27}[1-2]" * 9])
    text = folded(some)
    with pytest.raises(ArgumentError, match="is longer than"):
        nodes([text])
    assert set(unfolded(text)) == set(some)


def test_racks_still_fold_into_two_brackets() -> None:
    racks = nodes(["rack[1-20]n[01-16]", "db1"])
    assert folded(racks) == "db1,rack[1-20]n[01-16]"


NAMES = st.from_regex(r"[a-z0-9]{1,4}([-._]?[a-z0-9]{1,4}){0,3}", fullmatch=True).map(host_token)
ADDRESSES = st.ip_addresses().map(str)
NODES = st.builds(
    Node,
    st.one_of(NAMES, ADDRESSES),
    st.one_of(st.none(), st.sampled_from(["root", "a@b", "x.y"])),
    st.one_of(st.none(), st.integers(1, 65535)),
)


@given(st.lists(NODES, min_size=1, max_size=12))
def test_what_is_folded_names_the_same_hosts_again(some: list[Node]) -> None:
    assert set(nodes([folded(some)])) == set(some)


@given(st.text(max_size=40))
def test_any_text_names_hosts_or_is_refused(text: str) -> None:
    try:
        found = nodes([text])
    except ArgumentError:
        return
    for node in found:
        assert host_token(node.host) == node.host
