"""The window of lines, against a naive model."""

import hashlib
import re

from hypothesis import given
from hypothesis import strategies as st

from ssh_lines import Lines, tail_start

contents = st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\xc3\xa9", b"\xff"]), max_size=40).map(
    b"".join
)


@given(contents, st.integers(1, 50), st.integers(1, 12), st.integers(1, 12), st.integers(4, 40))
def test_window_is_what_the_words_say(
    content: bytes, chunk: int, start_line: int, max_lines: int, max_bytes: int
) -> None:
    lines = re.findall(rb"[^\n]*\n|[^\n]+\Z", content)
    taken = Lines(start_line, max_lines, max_bytes)
    at_end = True
    for at in range(0, len(content), chunk):
        if not taken.take(content[at : at + chunk]):
            at_end = False
            break
    window = taken.window(at_end=at_end)
    wanted = lines[start_line - 1 : start_line - 1 + max_lines]
    fitting = [line for index, line in enumerate(wanted) if sum(map(len, wanted[: index + 1])) <= max_bytes]
    after = lines[start_line - 1 + max(len(fitting), window.cut_line) :]
    assert window.start_line == start_line
    if wanted and not fitting:
        assert window.cut_line
        assert wanted[0].startswith(window.content)
        assert max_bytes - 4 < len(window.content) <= max_bytes
        assert window.end_line == start_line
        assert window.more
    else:
        assert not window.cut_line
        assert window.content == b"".join(fitting)
        assert window.end_line == start_line + len(fitting) - 1
        if at_end:
            assert window.more == bool(after)
        else:
            assert after
            assert window.more
    assert window.total_lines == (len(lines) if at_end else None)
    assert window.sha256 == (hashlib.sha256(content).hexdigest() if at_end else None)


@given(contents, st.integers(1, 10))
def test_last_lines_begin_where_they_begin(content: bytes, count: int) -> None:
    lines = re.findall(rb"[^\n]*\n|[^\n]+\Z", content)
    start = tail_start(content, count)
    if len(lines) > count:
        assert start is not None
        assert content[start:] == b"".join(lines[-count:])
    else:
        assert start is None


@given(contents, st.lists(st.integers(0, 9), max_size=30), st.integers(1, 6))
def test_uneven_and_empty_chunks_change_nothing(content: bytes, sizes: list[int], start_line: int) -> None:
    whole, pieces = (Lines(start_line, 1000, 1000) for _ in range(2))
    whole.take(content)
    rest = content
    for size in [*sizes, len(content), 0]:
        pieces.take(rest[:size])
        rest = rest[size:]
    assert pieces.window(at_end=True) == whole.window(at_end=True)


@given(
    st.text(alphabet="aé€😀", min_size=1, max_size=40),
    st.integers(4, 40),
    st.sampled_from(["", "\n", "\nb\n"]),
)
def test_line_is_not_cut_inside_a_character(line: str, max_bytes: int, after: str) -> None:
    taken = Lines(1, 10, max_bytes)
    taken.take((line + after).encode())
    window = taken.window(at_end=True)
    assert window.cut_line == (len((line + after[:1]).encode()) > max_bytes)
    assert (line + after).startswith(window.content.decode())


short_lines = st.lists(st.sampled_from([b"\n", b"a\n", b"bc\r\n"]), max_size=30).map(b"".join)


@given(short_lines, st.sampled_from([b"", b"end"]), st.integers(1, 5), st.integers(4, 20), st.integers(1, 30))
def test_windows_one_after_the_other_are_the_whole(
    begin: bytes, last: bytes, max_lines: int, max_bytes: int, chunk: int
) -> None:
    content, shown, line, more = begin + last, b"", 1, True
    while more:
        taken = Lines(line, max_lines, max_bytes)
        needed = all(taken.take(content[at : at + chunk]) for at in range(0, len(content), chunk))
        window = taken.window(at_end=needed)
        assert window.content or not window.more
        shown, line, more = shown + window.content, window.end_line + 1, window.more
    assert shown == content
