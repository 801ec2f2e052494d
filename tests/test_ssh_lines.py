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
