"""What of much output is shown: nothing split, nothing miscounted."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssh_output import Kept, Shown, share, visible

streams = st.binary(max_size=200) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace"))
chunk_sizes = st.lists(st.integers(1, 50), min_size=1, max_size=20)


def kept(budget: int, data: bytes, sizes: list[int]) -> Kept:
    taken = Kept(budget)
    at = index = 0
    while at < len(data):
        size = sizes[index % len(sizes)]
        taken.add(data[at : at + size])
        at += size
        index += 1
    return taken


def parts(shown: Shown) -> list[str]:
    """Return the text, or the head and the tail of it."""
    return shown.text.split(f"\n[... {shown.omitted} bytes omitted ...]\n") if shown.omitted else [shown.text]


@given(streams, chunk_sizes, st.integers(4, 60), st.integers(4, 80))
def test_every_byte_is_shown_or_counted(data: bytes, sizes: list[int], budget: int, limit: int) -> None:
    taken = kept(budget, data, sizes)
    shown = taken.shown(limit)
    assert taken.total == len(data)
    if not shown.omitted:
        assert shown.text == data.decode("utf-8", "replace")
        return
    head, tail = parts(shown)
    left = next(n for n in range(len(data) + 1) if data[:n].decode("utf-8", "replace") == head)
    right = len(data) - shown.omitted - left
    assert left + right <= min(limit, budget)
    assert data[len(data) - right :].decode("utf-8", "replace") == tail


@given(st.text(alphabet="aé€😀\n", max_size=80), chunk_sizes, st.integers(4, 60))
def test_no_character_is_split(text: str, sizes: list[int], budget: int) -> None:
    shown = kept(budget, text.encode(), sizes).shown(budget)
    assert "\ufffd" not in shown.text
    pieces = parts(shown)
    assert text.startswith(pieces[0])
    assert text.endswith(pieces[-1])


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(10, 100))
def test_two_streams_share_one_budget(out: bytes, err: bytes, budget: int) -> None:
    shown = share(budget, kept(budget, out, [7]), kept(budget, err, [7]))
    assert len(out) - shown[0].omitted + len(err) - shown[1].omitted <= budget
    if len(out) + len(err) <= budget:
        assert not shown[0].omitted
        assert not shown[1].omitted


def test_small_stream_is_shown_whole_beside_a_big_one() -> None:
    out, err = share(1000, kept(1000, b"x" * 100_000, [4096]), kept(1000, b"the reason\n", [4096]))
    assert err == Shown("the reason\n", 0)
    assert 100_000 - out.omitted == 1000 - len("the reason\n")


def test_memory_is_bounded() -> None:
    taken = Kept(1000)
    for _ in range(1000):
        taken.add(b"x" * 10_000)
    assert len(taken._head) + len(taken._tail) <= 10_000
    assert taken.total == 10_000_000


@given(st.text())
def test_control_characters_are_made_visible(text: str) -> None:
    shown = visible(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert shown.count("\n") == text.count("\n")


def test_terminal_escapes_are_made_visible() -> None:
    assert visible("\x1b[31mred\x1b[0m\tand\r\n\x9b") == "\\x1b[31mred\\x1b[0m\tand\\x0d\n\\x9b"


@given(st.text(alphabet="aé€😀", max_size=40), chunk_sizes, st.integers(1, 12), st.integers(0, 12))
def test_no_character_is_split_however_small_the_limit(
    text: str, sizes: list[int], budget: int, limit: int
) -> None:
    data = text.encode()
    shown = kept(budget, data, sizes).shown(limit)
    assert "\ufffd" not in shown.text
    assert sum(len(part.encode()) for part in parts(shown)) + shown.omitted == len(data)
    assert len(data) - shown.omitted <= min(limit, budget)


@given(st.text(alphabet="aé€😀", max_size=80), st.text(alphabet="aé€😀", max_size=80), st.integers(1, 60))
def test_shares_are_heads_and_tails(out: str, err: str, budget: int) -> None:
    texts = [out, err]
    both = share(budget, kept(budget, out.encode(), [3]), kept(budget, err.encode(), [5]))
    for text, shown in zip(texts, both, strict=True):
        head, tail = (parts(shown)[0], parts(shown)[-1])
        assert text.startswith(head)
        assert text.endswith(tail)
        assert "\ufffd" not in shown.text
    assert sum(len(text.encode()) - shown.omitted for text, shown in zip(texts, both, strict=True)) <= budget


@given(st.lists(st.integers(0, 200), max_size=60), st.integers(1, 50))
def test_memory_is_bounded_whatever_the_chunks(sizes: list[int], budget: int) -> None:
    taken = Kept(budget)
    for size in sizes:
        taken.add(b"x" * size)
        assert len(taken._head) + len(taken._tail) <= 6 * budget
    assert taken.total == sum(sizes)


@given(st.text())
def test_visible_text_holds_no_control_character(text: str) -> None:
    assert {char for char in visible(text) if unicodedata.category(char) == "Cc"} <= {"\t", "\n"}


@pytest.mark.parametrize(
    ("hidden", "shown"),
    [
        ("\x1b", "\\x1b"),
        ("\x9b", "\\x9b"),
        ("\u202e", "\\u202e"),
        ("\u200f", "\\u200f"),
        ("\u061c", "\\u061c"),
        ("\u2028", "\\u2028"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_is_hidden_from_people_is_spelt_out(hidden: str, shown: str) -> None:
    assert visible(f"a{hidden}b") == f"a{shown}b"


@given(st.text(alphabet=st.characters(exclude_categories=["C", "Zl", "Zp"]) | st.sampled_from("\t\n")))
def test_text_without_controls_stays_as_it_is(text: str) -> None:
    assert visible(text) == text
