"""The edit engine, against a naive model of the contract's words."""

import json
import re
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ssh_edits import Edit, apply_edits
from ssh_errors import EditError


def edited(content: bytes | str, *edits: Edit) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return apply_edits(data, edits, "/file").content


def refusal(content: bytes | str, *edits: Edit) -> str:
    with pytest.raises(EditError) as raised:
        edited(content, *edits)
    text = str(raised.value)
    assert len(text) <= 1000
    assert "/file" in text
    text.encode()  # no lone surrogates
    return text


def replace(old: str, new: str, **more: Any) -> Edit:
    return Edit(old_text=old, new_text=new, **more)


def lines(first: int, last: int | None, new: str) -> Edit:
    return Edit(start_line=first, end_line=last, new_text=new)


def insert(after: int, new: str) -> Edit:
    return Edit(operation="insert", start_line=after, new_text=new)


def diff_of(content: bytes | str, *edits: Edit) -> str:
    data = content.encode() if isinstance(content, str) else content
    return apply_edits(data, edits, "/file").diff


def delete(first: int, last: int | None = None) -> Edit:
    return Edit(operation="delete", start_line=first, end_line=last)


@pytest.mark.parametrize(
    ("before", "edit", "after"),
    [
        ("a b c", replace("b", "B"), "a B c"),
        ("a b a", replace("a", "x", replace_all=True), "x b x"),
        ("a\nb\nc\n", replace("a\nb", "x"), "x\nc\n"),
        ("a\r\nb\r\nc", replace("a\nb", "x\ny\nz"), "x\r\ny\r\nz\r\nc"),
        ("a\r\nb\nc\n", replace("a\nb\nc", "1\n2\n3"), "1\r\n2\n3\n"),
        ("a\nb\nc\n", lines(2, None, "x"), "a\nx\nc\n"),
        ("a\nb\nc\n", lines(1, 2, "x\ny\nz\n"), "x\ny\nz\nc\n"),
        ("a\nb\nc\n", lines(2, 3, ""), "a\n"),
        ("a\nb\nc\n", lines(-1, None, "x"), "a\nb\nx\n"),
        ("a\nb\nc", lines(3, None, "x\n"), "a\nb\nx"),
        ("a\r\nb\r\n", lines(1, 1, "x\ny"), "x\r\ny\r\nb\r\n"),
        ("a\nb\n", insert(0, "x"), "x\na\nb\n"),
        ("a\nb\n", insert(1, "x\n"), "a\nx\nb\n"),
        ("a\nb\n", insert(-1, "x"), "a\nb\nx\n"),
        ("a\nb", insert(-1, "x\n"), "a\nb\nx"),
        ("a\nb", insert(2, "x"), "a\nb\nx"),
        ("", insert(0, "x\n"), "x\n"),
        ("", insert(-1, "x"), "x"),
        ("a\nb\nc\n", delete(2), "a\nc\n"),
        ("a\nb\nc", delete(3), "a\nb"),
        ("a\nb\nc\n", Edit(operation="delete", old_text="b\n"), "a\nc\n"),
        ("a\rb\n", lines(1, None, "x"), "x\n"),
        ("a\u2028b\nc\n", lines(2, None, "x"), "a\u2028b\nx\n"),
        ("\ufeffa\nb\n", lines(1, None, "x"), "\ufeffx\nb\n"),
        ("\ufeffa\nb\n", replace("a", "x"), "\ufeffx\nb\n"),
        ("\ufeffa\n", insert(0, "x"), "\ufeffx\na\n"),
        ("\ufeff", insert(-1, "x\n"), "\ufeffx\n"),
        ("aaa", replace("aa", "x", replace_all=True), "xa"),
        ("a\nb\n", delete(-1), "a\n"),
        ("a\nb\nc\n", delete(-2, -1), "a\n"),
        ("a\nb\n", lines(2, None, "x"), "a\nx\n"),
        ("a\r\nb\nc\n", lines(2, None, "x\r\ny"), "a\r\nx\ny\nc\n"),
        ("a\r\nb", insert(-1, "x\ny\n"), "a\r\nb\r\nx\r\ny"),
        ("a\r\nb\n", insert(0, "x\r\n"), "x\na\r\nb\n"),
        ("a\nb\n", replace("a\r\nb", "x"), "x\n"),
        ("a\nb", replace("b", "b\n"), "a\nb\n"),
        ("a\nb\n", replace("b\n", "b"), "a\nb"),
        ("a.c\nabc\n", replace("a.c", "x"), "x\nabc\n"),
        ("a\n", replace("a", r"\1\g<0>"), "\\1\\g<0>\n"),
        ("a", replace("a", ""), ""),
        ("a\n", delete(1), ""),
    ],
)
def test_each_kind_of_edit(before: str, edit: Edit, after: str) -> None:
    assert edited(before, edit) == after.encode()


def test_edits_speak_of_the_file_before_the_call() -> None:
    before = "a\nb\nc\nd\n"
    assert edited(before, insert(0, "top"), lines(4, None, "D"), replace("b", "a")) == b"top\na\na\nc\nD\n"


def test_inserts_at_one_place_keep_their_order() -> None:
    assert edited("a\nb\n", insert(1, "1"), insert(1, "2"), insert(1, "3")) == b"a\n1\n2\n3\nb\n"


@pytest.mark.parametrize(
    ("before", "edits", "after"),
    [
        ("a\nb", [insert(-1, "x"), insert(2, "y")], "a\nb\nx\ny"),
        ("a\nb", [lines(2, None, "x"), insert(-1, "y")], "a\nx\ny"),
        ("a\nb", [delete(2), insert(-1, "y\n")], "a\ny"),
        ("a\r\nb", [insert(-1, "x"), insert(-1, "y")], "a\r\nb\r\nx\r\ny"),
        ("", [insert(0, "x"), insert(-1, "y")], "x\ny"),
        ("a\nb\n", [replace("a\n", "A"), insert(1, "x")], "A\nx\nb\n"),
    ],
)
def test_whole_lines_that_meet_are_parted_by_one_newline(before: str, edits: list[Edit], after: str) -> None:
    assert edited(before, *edits) == after.encode()


@pytest.mark.parametrize(("edit", "after"), [(delete(3), "a\n\n"), (lines(3, None, "x\n\n"), "a\n\nx\n\n")])
def test_an_empty_line_left_last_is_not_lost_with_the_newline(edit: Edit, after: str) -> None:
    assert edited("a\n\nb", edit) == after.encode()


def test_edits_side_by_side_do_not_overlap() -> None:
    before = "a\nb\nc\n"
    assert edited(before, lines(2, None, "B"), insert(1, "x"), insert(2, "y"), delete(1)) == b"x\nB\ny\nc\n"
    assert edited("abc", replace("b", "2"), replace("a", "1"), replace("c", "3")) == b"123"


def test_bytes_of_any_encoding_are_kept() -> None:
    assert edited(b"caf\xe9 \xff\nb\n", replace("b", "x")) == b"caf\xe9 \xff\nx\n"
    assert edited(bytes(range(1, 256)), replace("ABC", "xyz")) == bytes(range(1, 256)).replace(b"ABC", b"xyz")


def test_two_encodings_are_not_mixed() -> None:
    assert "UTF-8" in refusal(b"caf\xe9\n", insert(0, "\u00fc"))
    assert edited("caf\u00e9\n", insert(0, "\u00fc")) == "\u00fc\ncaf\u00e9\n".encode()


def test_binary_files_are_refused() -> None:
    assert "base64" in refusal(b"a\0b", replace("a", "b"))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (Edit(), "either old_text or start_line"),
        (Edit(new_text="x"), "either old_text or start_line"),
        (Edit(old_text="a"), "replace needs new_text"),
        (Edit(start_line=1), "replace needs new_text"),
        (Edit(old_text="", new_text="x"), "old_text is empty"),
        (Edit(old_text="a", start_line=1, new_text="x"), "either old_text or start_line"),
        (Edit(old_text="a", end_line=1, new_text="x"), "either old_text or start_line"),
        (Edit(end_line=1, new_text="x"), "end_line needs start_line"),
        (Edit(start_line=0, new_text="x"), "the file has 2 lines"),
        (Edit(start_line=3, new_text="x"), "the file has 2 lines"),
        (Edit(start_line=-3, new_text="x"), "the file has 2 lines"),
        (Edit(start_line=1, end_line=0, new_text="x"), "the file has 2 lines"),
        (Edit(start_line=1, end_line=9, new_text="x"), "no line 9; the file has 2 lines"),
        (Edit(start_line=2, end_line=1, new_text="x"), "end_line 1 is before start_line 2"),
        (Edit(start_line=-1, end_line=-2, new_text="x"), "end_line -2 is before start_line -1"),
        (Edit(start_line=1, new_text="x", replace_all=True), "replace_all needs old_text"),
        (Edit(operation="insert", new_text="x"), "insert needs new_text and start_line"),
        (Edit(operation="insert", start_line=1), "insert needs new_text and start_line"),
        (Edit(operation="insert", start_line=3, new_text="x"), "the file has 2 lines"),
        (Edit(operation="insert", start_line=-2, new_text="x"), "the file has 2 lines"),
        (Edit(operation="insert", start_line=1, end_line=1, new_text="x"), "insert takes no"),
        (Edit(operation="insert", start_line=1, old_text="a", new_text="x"), "insert takes no"),
        (
            Edit(operation="insert", start_line=1, new_text="x", replace_all=True),
            "replace_all needs old_text",
        ),
        (Edit(operation="delete"), "either old_text or start_line"),
        (Edit(operation="delete", start_line=1, new_text="x"), "delete takes no new_text"),
        (Edit(operation="delete", old_text="a", new_text="x"), "delete takes no new_text"),
        (Edit(old_text="a", new_text="\ud800"), "no text file can"),
        (Edit(old_text="\udce9", new_text="x"), "no text file can"),
        (Edit(old_text="a", new_text="\0"), "no text file can"),
        (Edit(old_text="a", new_text="a"), "change nothing"),
        (Edit(start_line=1, new_text="a"), "change nothing"),
    ],
)
def test_edits_that_make_no_sense_are_refused(edit: Edit, sentence: str) -> None:
    assert sentence in refusal("a\nb\n", edit)


def test_escaped_bytes_cannot_be_named_by_lone_surrogates() -> None:
    assert "no text file can" in refusal(b"\xe9\n", replace("\udce9", "x"))


def test_no_edits_are_refused() -> None:
    assert "no edits were given" in refusal("a")


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        Edit.model_validate({"old_text": "a", "new_text": "b", "line": 1})


def test_schema_is_small() -> None:
    assert len(json.dumps(Edit.model_json_schema(), separators=(",", ":"))) < 900


def test_overlapping_edits_name_each_other() -> None:
    before = "a\nb\nc\n"
    assert "edits 1 and 2 overlap" in refusal(before, lines(1, 2, "x"), replace("b", "y"))
    assert "edits 2 and 3 overlap" in refusal(before, delete(3), replace("b", "y"), delete(1, 2))
    assert "edits 1 and 2 overlap" in refusal(before, lines(1, 2, "x"), insert(1, "y"))
    assert "edits 1 and 2 overlap" in refusal(before, delete(1), delete(1))


def test_ambiguous_replace_names_the_lines() -> None:
    assert "2 times (lines 1, 3)" in refusal("a\nb\na\n", replace("a", "x"))
    text = refusal("a\nb\na\nc\na\n", replace("a", "x"))
    assert "3 times" in text
    assert "lines 1, 3, 5" in text
    assert "replace_all" in text


def test_ambiguous_delete_names_a_line_once() -> None:
    assert "4 times (lines 1, 2)" in refusal("a a a\na\n", Edit(operation="delete", old_text="a"))


def test_ambiguous_replace_names_at_most_ten_lines() -> None:
    text = refusal("a\n" * 5000, replace("a", "x"))
    assert "5000 times (lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...)" in text


@pytest.mark.parametrize(
    ("before", "old", "hint"),
    [
        ("def f():\n\treturn 1\n", "def f():\n    return 1\n", "differs only in white space"),
        ("x = \u201chi\u201d\n", 'x = "hi"', "differs only in quotes"),
        ("one\nworker_processes  4;\nthree\n", "worker_processes 8;", "2|worker_processes  4;"),
        ("alpha\nbeta\n", "zzz qqq", "No line"),
    ],
)
def test_absent_text_is_answered_with_the_nearest_lines(before: str, old: str, hint: str) -> None:
    assert hint in refusal(before, replace(old, "x"))


def test_absent_text_is_answered_briefly_and_in_sound_text() -> None:
    text = refusal(b"caf\xe9 " + b"word " * 5000 + b"\nx\n", replace("cafe " + "word " * 5000, "x"))
    assert "1|caf\ufffd word" in text


def test_path_is_named_in_sound_text() -> None:
    with pytest.raises(EditError, match=re.escape("/f\ufffd: old_text is not in")):
        apply_edits(b"a", [replace("b", "c")], "/f\udce9")


def test_edit_is_named_when_there_are_several() -> None:
    assert "edit 2" in refusal("a\nb\n", replace("a", "x"), replace("q", "y"))


def test_diff_is_unified() -> None:
    before = "".join(f"{number}\n" for number in range(1, 21))
    assert diff_of(before, lines(10, None, "ten")) == (
        "--- /file\n+++ /file\n@@ -7,7 +7,7 @@\n 7\n 8\n 9\n-10\n+ten\n 11\n 12\n 13\n"
    )


def test_diff_parts_what_is_far_apart() -> None:
    before = "".join(f"{number}\n" for number in range(1, 21))
    hunks = [
        line for line in diff_of(before, insert(2, "x"), delete(10), delete(17)).split("\n") if "@@" in line
    ]
    assert hunks == ["@@ -1,5 +1,6 @@", "@@ -7,14 +8,12 @@"]


def test_diff_shows_the_place_that_was_named_among_lines_alike() -> None:
    def body(*edits: Edit) -> str:
        return diff_of("a\n" * 9, *edits).removeprefix("--- /file\n+++ /file\n")

    assert body(delete(5)) == "@@ -2,7 +2,6 @@\n a\n a\n a\n-a\n a\n a\n a\n"
    assert body(insert(5, "a")) == "@@ -3,6 +3,7 @@\n a\n a\n a\n+a\n a\n a\n a\n"
    assert body(insert(-1, "a")) == "@@ -7,3 +7,4 @@\n a\n a\n a\n+a\n"
    assert body(delete(9)) == "@@ -6,4 +6,3 @@\n a\n a\n a\n-a\n"


def test_diff_shows_only_what_differs_within_an_edit() -> None:
    diff = diff_of("a\nb\nc\nd\ne\n", lines(1, 5, "a\nB\nc\nD\ne"))
    assert diff == "--- /file\n+++ /file\n@@ -1,5 +1,5 @@\n a\n-b\n+B\n c\n-d\n+D\n e\n"


def test_diff_shows_only_what_differs_in_a_thousand_places() -> None:
    diff = diff_of("a\nb\n" * 1000, replace("b", "c", replace_all=True))
    assert diff == "--- /file\n+++ /file\n@@ -1,2000 +1,2000 @@\n" + " a\n-b\n+c\n" * 1000


def test_diff_marks_a_missing_newline() -> None:
    no_newline = "\\ No newline at end of file\n"
    assert diff_of("a", replace("a", "b")).endswith(f"@@ -1 +1 @@\n-a\n{no_newline}+b\n{no_newline}")
    assert diff_of("a\nb", replace("a", "x")).endswith(f"@@ -1,2 +1,2 @@\n-a\n+x\n b\n{no_newline}")


def test_diff_of_an_empty_file_names_line_zero() -> None:
    assert diff_of("", insert(0, "x"), insert(0, "y\n")).endswith("\n@@ -0,0 +1,2 @@\n+x\n+y\n")
    assert diff_of("x\n", delete(1)).endswith("\n@@ -1 +0,0 @@\n-x\n")


def test_diff_shows_undecodable_bytes_as_replacement() -> None:
    assert "-\ufffd a\n+\ufffd b\n" in diff_of(b"\xe9 a\n", replace("a", "b"))


def test_diff_of_a_file_with_one_ending_does_not_show_it() -> None:
    assert diff_of("a\r\nb\r\n", lines(1, None, "x")).endswith("@@ -1,2 +1,2 @@\n-a\n+x\n b\n")


def test_diff_shows_a_change_of_the_ending() -> None:
    assert diff_of("a\r\nb\r\n", replace("a\r", "a")).endswith("@@ -1,2 +1,2 @@\n-a\\r\n+a\n b\\r\n")
    assert diff_of("a\r\n", replace("a\r", "a")).endswith("\n-a\\r\n+a\n")


def test_diff_shows_a_lone_carriage_return() -> None:
    diff = diff_of("a\rb\nc\r", replace("b", "x"))
    assert diff.endswith("@@ -1,2 +1,2 @@\n-a\\rb\n+a\\rx\n c\\r\n\\ No newline at end of file\n")


def test_diff_is_bounded_and_says_so() -> None:
    diff = diff_of("a\n" * 50_000, replace("a", "b", replace_all=True))
    shown, said = re.split(r"(?=\.\.\. )", diff)
    assert 19_990 < len(shown) <= 20_000
    assert said == f"... {100_003 - shown.count(chr(10))} more lines of diff\n"


def test_big_files_take_time_in_proportion() -> None:
    big = b"".join(b"line %d of the file\n" % number for number in range(400_000))
    started = time.process_time()
    assert len(edited(big, lines(399_999, None, "x"), replace("line 7 of", "y"))) < len(big)
    assert "nearest" in refusal(big, replace("\n".join(f"line {n}  of the file" for n in range(100)), "x"))
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "edits",
    [
        [replace("b", "c", replace_all=True)],
        [replace("a", "x", replace_all=True), replace("b", "c", replace_all=True)],
        [lines(1, 40_000, "a\nc\n" * 19_000)],
    ],
)
def test_a_diff_of_lines_alike_takes_time_in_proportion(edits: list[Edit]) -> None:
    started = time.process_time()
    assert "-b" in diff_of("a\nb\n" * 20_000, *edits)
    assert time.process_time() - started < 10


def test_a_search_for_empty_lines_takes_time_in_proportion() -> None:
    started = time.process_time()
    assert "not in the file" in refusal(("\n" * 999 + "a") * 500, replace("\n" * 1000, "x"))
    assert time.process_time() - started < 10


# A naive model: what the contract's words say, without regard to speed.


def model(content: bytes, edits: list[Edit]) -> bytes | None:
    """Return the new content, or None when the edits must be refused."""
    bom = b"\xef\xbb\xbf" if content.startswith(b"\xef\xbb\xbf") else b""
    text = content.removeprefix(bom).decode("utf-8", "surrogateescape")
    if "\0" in text:
        return None
    crlf, lf = text.count("\r\n"), text.count("\n") - text.count("\r\n")
    newline = "\r\n" if crlf > lf else "\n"
    split = re.findall(r"[^\n]*\n|[^\n]+\Z", text)
    at = [sum(map(len, split[:index])) for index in range(len(split) + 1)]
    places: list[tuple[int, int, str, bool]] = []
    for edit in edits:
        found = model_places(edit, text, split, at, newline)
        if found is None:
            return None
        places += found
    try:
        text.encode()
    except UnicodeEncodeError:
        if not all((edit.new_text or "").isascii() for edit in edits):
            return None
    ordered = sorted(enumerate(places), key=lambda item: (item[1][0], item[1][1], item[0]))
    result, done = "", 0
    for _, (start, end, new, whole) in ordered:
        if start < done:
            return None
        result += text[done:start]
        if whole and new and result and not result.endswith("\n"):
            result += newline
        result += new
        done = max(done, end)
    result += text[done:]
    bare = text and not text.endswith("\n")
    if bare and any(whole and end == len(text) for _, end, _, whole in places):
        last_line = result[result.rfind("\n", 0, -1) + 1 :]
        ending = re.search(r"\r?\n\Z", last_line)
        if ending and ending.start() > 0:
            result = result.removesuffix(ending[0])
    return None if result == text else bom + result.encode("utf-8", "surrogateescape")


def model_places(
    edit: Edit, text: str, split: list[str], at: list[int], newline: str
) -> list[tuple[int, int, str, bool]] | None:
    count = len(split)
    whole = re.sub("\r?\n", newline, edit.new_text or "")
    if whole and not whole.endswith("\n"):
        whole += newline
    if edit.operation == "insert":
        if (
            edit.new_text is None
            or edit.start_line is None
            or edit.old_text is not None
            or edit.end_line is not None
        ):
            return None
        after = count if edit.start_line == -1 else edit.start_line
        if edit.replace_all or not 0 <= after <= count:
            return None
        if not count:
            whole = re.sub("\r?\n", "\n", edit.new_text)
        return [(at[after], at[after], whole, True)]
    if edit.operation == "replace" and edit.new_text is None:
        return None
    if edit.operation == "delete" and edit.new_text:
        return None
    if edit.old_text is not None:
        if edit.old_text == "" or edit.start_line is not None or edit.end_line is not None:
            return None
        return model_texts(edit, text, newline)
    if edit.start_line is None or edit.replace_all:
        return None
    first, last = (
        number if number > 0 else count + 1 + number
        for number in (edit.start_line, edit.start_line if edit.end_line is None else edit.end_line)
    )
    if 0 in (edit.start_line, edit.end_line) or not 1 <= first <= last <= count:
        return None
    return [(at[first - 1], at[last], whole, True)]


def model_texts(edit: Edit, text: str, newline: str) -> list[tuple[int, int, str, bool]] | None:
    old = (edit.old_text or "").replace("\r\n", "\n")
    places, here = [], 0
    while here < len(text):
        end, endings = here, []
        for wanted in old:
            if wanted == "\n" and text.startswith("\r\n", end):
                endings.append("\r\n")
                end += 2
            elif text[end : end + 1] == wanted:
                if wanted == "\n":
                    endings.append("\n")
                end += 1
            else:
                break
        else:
            parts = re.split("\r?\n", edit.new_text or "")
            new = parts[0]
            for index, part in enumerate(parts[1:]):
                new += (endings[index] if index < len(endings) else newline) + part
            places.append((here, end, new, False))
            here = end
            continue
        here += 1
    if not places or (len(places) > 1 and not edit.replace_all):
        return None
    return places


words = st.lists(st.sampled_from(["a", "b", "\n", "\r\n", "\u00e9", " "]), max_size=6).map("".join)
contents = st.builds(
    lambda bom, parts: bom + b"".join(parts),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(st.sampled_from([b"a", b"b", b"\n", b"\r\n", b"\xc3\xa9", b"\xe9", b" ", b"\r"]), max_size=14),
)
some_edits = st.builds(
    Edit,
    operation=st.sampled_from(["replace", "insert", "delete"]),
    old_text=st.none() | words,
    new_text=st.none() | words,
    start_line=st.none() | st.integers(-3, 6),
    end_line=st.none() | st.integers(-2, 6),
    replace_all=st.booleans(),
)
good_edits = (
    st.builds(replace, words, words, replace_all=st.booleans())
    | st.builds(lines, st.integers(-3, 6), st.none() | st.integers(1, 6), words)
    | st.builds(insert, st.integers(-1, 6), words)
    | st.builds(delete, st.integers(-3, 6), st.none() | st.integers(1, 6))
)


@settings(max_examples=1500, deadline=None)
@given(contents, st.lists(some_edits | good_edits, min_size=1, max_size=3))
@example(b"a\r", [insert(-1, "x")])
@example(b"a\n\r", [lines(2, None, "\r\n")])
@example(b"\r\na", [delete(-1)])
def test_engine_does_what_the_contract_says(content: bytes, edits: list[Edit]) -> None:
    expected = model(content, edits)
    try:
        result = apply_edits(content, edits, "/file")
    except EditError:
        assert expected is None
    else:
        assert result.content == expected
        assert result.edits_applied == len(edits)


def applied(before: str, diff: str) -> str:
    """Apply a unified diff, demanding that its numbers, its context and its removed lines fit exactly."""
    old = re.findall(r"[^\n]*\n|[^\n]+\Z", before)
    entries = re.findall(r"([ +@-])([^\n]*\n)(\\ No newline at end of file\n)?", diff.split("\n", 2)[2])
    assert sum(len("".join(entry)) for entry in entries) == len(diff.split("\n", 2)[2])
    new: list[str] = []
    at = old_left = new_left = 0
    for sign, body, unended in entries:
        line = body[:-1] if unended else body
        if sign == "@":
            assert old_left == new_left == 0
            match = re.fullmatch(r"@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@\n", body)
            assert match
            old_left, new_left = int(match[2] or 1), int(match[4] or 1)
            new += old[at : int(match[1]) - (old_left > 0)]
            at = int(match[1]) - (old_left > 0)
            assert len(new) == int(match[3]) - (new_left > 0)
        if sign in " -":
            assert old[at] == line
            at += 1
            old_left -= 1
        if sign in " +":
            new.append(line)
            new_left -= 1
    assert old_left == new_left == 0
    return "".join(new + old[at:])


bodies = st.one_of(
    st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=40),
    st.lists(st.sampled_from(["a", "b"]), max_size=20).map(lambda body: [*map(str, range(30)), *body]),
)
far_edits = (
    good_edits
    | st.builds(lines, st.integers(1, 40), st.none() | st.integers(1, 40), words)
    | st.builds(insert, st.integers(-1, 40), words)
    | st.builds(delete, st.integers(-40, 40))
)


@settings(max_examples=600, deadline=None)
@given(bodies, st.booleans(), st.lists(far_edits, min_size=1, max_size=4))
@example([], False, [insert(0, "x"), insert(0, "y")])
@example([*"abcd"], False, [insert(3, ""), delete(-1)])
@example([*"abcd"], False, [delete(-2), delete(-1)])
@example([*"abcd"], True, [replace("d", "x"), insert(-1, "y")])
@example([*"abcdefghijkl"], True, [delete(12), insert(-1, "x")])
@example(["", "a"], False, [replace("a", "", replace_all=True), insert(-1, "x")])
def test_diff_turns_the_old_text_into_the_new(body: list[str], ends: bool, edits: list[Edit]) -> None:
    content = "\n".join(body) + ("\n" if ends and body else "")
    edits = [edit.model_copy(update={"new_text": (edit.new_text or "").replace("\r", "")}) for edit in edits]
    try:
        result = apply_edits(content.encode(), edits, "/file")
    except EditError:
        return  # refused as a whole: no diff to look at
    assert applied(content, result.diff) == result.content.decode()
