"""How the outcomes of many targets are told in few words."""

import re
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settings import Target
from ssh_errors import ArgumentError
from ssh_fold import Member, Part, State, answer, cursor_of, errors, fair_shares, groups, offsets
from ssh_nodes import Node, nodes
from ssh_output import Kept

BUDGET = 1000


def member(number: int) -> Member:
    return Member(Node(f"web{number}"), Target("root", f"web{number}", 22))


def kept(data: bytes) -> Kept:
    stream = Kept(BUDGET)
    stream.add(data)
    return stream


def part(number: int, out: bytes = b"", err: bytes = b"", exit_code: int = 0) -> Part:
    sizes = len(out), len(err)
    return Part(member(number), "exited", exit_code, None, kept(out), kept(err), sizes, 0.1 * number)


def test_same_outcomes_stand_together_and_others_apart() -> None:
    parts = [part(number, b"up\n", exit_code=number == 18) for number in range(1, 21)]
    first, second = groups(parts, BUDGET)
    assert (first.hosts, first.count, first.exit_code) == ("web[1-17,19-20]", 19, 0)
    assert (second.hosts, second.count, second.exit_code) == ("web18", 1, 1)
    assert first.duration_seconds == 2.0


def test_equal_streams_are_equal_however_they_came_in() -> None:
    data = b"x" * 5 * BUDGET
    pieces = kept(b"")
    for at in range(0, len(data), 7):
        pieces.add(data[at : at + 7])
    whole = part(1, data)
    assert len(groups([whole, replace(part(2, data), out=pieces)], BUDGET)) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from([b"", b"a", b"b" * 50, b"c" * 900, b"d" * 3000]), st.integers(0, 2)),
        min_size=1,
        max_size=60,
    )
)
def test_every_target_is_told_once_with_its_own_outcome(outcomes: list[tuple[bytes, int]]) -> None:
    parts = [part(number, out, exit_code=code) for number, (out, code) in enumerate(outcomes, 1)]
    told = {
        node.host: (group.exit_code, group.stdout_bytes)
        for group in groups(parts, BUDGET)
        for node in nodes([group.hosts])
    }
    assert told == {f"web{number}": (code, len(out)) for number, (out, code) in enumerate(outcomes, 1)}
    assert sum(group.count for group in groups(parts, BUDGET)) == len(parts)


@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=30), st.integers(1, 4000))
def test_output_limit_holds_for_the_whole_answer_and_every_byte_is_counted(
    outputs: list[bytes], budget: int
) -> None:
    outputs = [re.sub(rb"[^ -~]", b".", data) for data in outputs]
    shown = 0
    for group in groups([part(number, data) for number, data in enumerate(outputs)], budget):
        marks = re.findall(r"\n\[\.\.\. \d+ bytes omitted \.\.\.\]\n", group.stdout)
        size = len(group.stdout) - sum(map(len, marks))
        assert size + group.stdout_omitted == group.stdout_bytes
        shown += size
    assert shown <= budget


@given(st.lists(st.integers(0, 10_000), max_size=50), st.integers(0, 20_000))
def test_shares_are_fair(needs: list[int], budget: int) -> None:
    shares = fair_shares(budget, needs)
    assert sum(shares) <= budget
    assert all(share <= need for share, need in zip(shares, needs, strict=True))
    cut = [share for share, need in zip(shares, needs, strict=True) if share < need]
    if cut:
        assert sum(shares) > budget - len(needs)
        assert max(shares) <= min(cut) + 1


def test_same_failure_is_told_once_without_the_names() -> None:
    failed = [
        (
            member(number),
            f"root@web{number}:22 cannot be reached at any of its addresses "
            f"(10.0.{number // 250}.{number % 250}: no answer)",
        )
        for number in range(1, 300)
    ]
    (error,) = errors(failed)
    assert (error.hosts, error.count) == ("web[1-299]", 299)
    assert error.message == "this host cannot be reached at any of its addresses (its address: no answer)"


def test_how_often_a_host_failed_does_not_part_it_from_others() -> None:
    message = "{} does not answer (3 times in a row; it is tried again in {} s; nothing was run)"
    failed = [(member(number), message.format(member(number).target, number)) for number in (7, 8)]
    (error,) = errors(failed)
    assert (
        error.message
        == "this host does not answer (3 times in a row; it is tried again in 7 s; nothing was run)"
    )


def test_failure_of_one_host_keeps_its_name() -> None:
    (error,) = errors([(member(1), "root@web1:22 is unknown")])
    assert error.message == "root@web1:22 is unknown"


def test_text_is_one_paragraph_for_five_hundred_hosts() -> None:
    states = [State(member(number), part(number, b"up 3 days\n")) for number in range(500)]
    text = answer(states, 30_000, 1.5).text()
    assert text == "web[0-499] (500): exit code 0\nup 3 days\n[ended everywhere · 1.50 s]"


def test_what_has_not_begun_is_told() -> None:
    states = [State(member(1), part(1)), State(member(2)), State(member(3), error="it is down")]
    told = answer(states, BUDGET, 1)
    assert (told.status, told.running, told.waiting) == ("running", None, "web2")
    assert "not begun on web2" in told.text()
    assert "web3 (1): it is down" in told.text()


def test_output_cannot_pass_for_control_characters() -> None:
    states = [State(member(1), part(1, b"\x1b[2J\n", b"oops\n"))]
    assert (
        answer(states, BUDGET, 1).text().startswith("web1 (1): exit code 0\n\\x1b[2J\n[stderr]\noops\n[ended")
    )


OFFSETS = st.one_of(st.none(), st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)))


@given(st.lists(OFFSETS, min_size=1, max_size=50))
def test_cursor_tells_how_far_each_target_was_told(told: list[tuple[int, int] | None]) -> None:
    assert offsets(cursor_of(told), len(told)) == told


def test_cursor_of_many_equal_targets_is_short() -> None:
    assert len(cursor_of([(1234, 0)] * 1000)) < 80


@pytest.mark.parametrize(
    "text", ["", "x", "0.0", "é", "eJw" * 9, cursor_of([(0, 0)] * 2), cursor_of([None] * 100_000)]
)
def test_cursor_that_no_answer_gave_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="cursor is none"):
        offsets(text, 3)


@given(st.text(max_size=60))
def test_any_other_text_is_refused_as_a_cursor(text: str) -> None:
    with suppress(ArgumentError):
        assert len(offsets(text, 2)) == 2
