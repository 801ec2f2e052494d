"""The edit engine, against a naive model of the contract's words."""

import re
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

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
    return text


def replace(old: str, new: str, **more: Any) -> Edit:
    return Edit(old_text=old, new_text=new, **more)


def lines(first: int, last: int | None, new: str) -> Edit:
    return Edit(start_line=first, end_line=last, new_text=new)


def insert(after: int, new: str) -> Edit:
    return Edit(operation="insert", start_line=after, new_text=new)


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
    ],
)
def test_each_kind_of_edit(before: str, edit: Edit, after: str) -> None:
    assert edited(before, edit) == after.encode()


def test_edits_speak_of_the_file_before_the_call() -> None:
    before = "a\nb\nc\nd\n"
    assert edited(before, insert(0, "top"), lines(4, None, "D"), replace("b", "a")) == b"top\na\na\nc\nD\n"


def test_inserts_at_one_place_keep_their_order() -> None:
    assert edited("a\nb\n", insert(1, "1"), insert(1, "2"), insert(1, "3")) == b"a\n1\n2\n3\nb\n"


def test_inserts_at_a_bare_end_are_joined_by_one_newline_each() -> None:
    assert edited("a", insert(-1, "x"), insert(-1, "y")) == b"a\nx\ny"
    assert edited("a\nb", delete(2), insert(-1, "x")) == b"a\nx"
    assert edited("a\n\nb", delete(3)) == b"a\n\n"


def test_bytes_of_any_encoding_are_kept() -> None:
    assert edited(b"caf\xe9 \xff\nb\n", replace("b", "x")) == b"caf\xe9 \xff\nx\n"
    assert edited(bytes(range(1, 256)), replace("ABC", "xyz")) == bytes(range(1, 256)).replace(b"ABC", b"xyz")


def test_two_encodings_are_not_mixed() -> None:
    assert "UTF-8" in refusal(b"caf\xe9\n", insert(0, "\u00fc"))


def test_binary_files_are_refused() -> None:
    assert "base64" in refusal(b"a\0b", replace("a", "b"))


@pytest.mark.parametrize(
    "edit",
    [
        Edit(),
        Edit(new_text="x"),
        Edit(old_text="a"),
        Edit(old_text="", new_text="x"),
        Edit(old_text="a", start_line=1, new_text="x"),
        Edit(end_line=1, new_text="x"),
        Edit(start_line=0, new_text="x"),
        Edit(start_line=3, new_text="x"),
        Edit(start_line=-3, new_text="x"),
        Edit(start_line=2, end_line=1, new_text="x"),
        Edit(start_line=1, end_line=9, new_text="x"),
        Edit(start_line=1, new_text="x", replace_all=True),
        Edit(operation="insert", new_text="x"),
        Edit(operation="insert", start_line=1),
        Edit(operation="insert", start_line=3, new_text="x"),
        Edit(operation="insert", start_line=-2, new_text="x"),
        Edit(operation="insert", start_line=1, end_line=1, new_text="x"),
        Edit(operation="insert", start_line=1, old_text="a", new_text="x"),
        Edit(operation="delete"),
        Edit(operation="delete", start_line=1, new_text="x"),
        Edit(old_text="a", new_text="\ud800"),
        Edit(old_text="a", new_text="\0"),
        Edit(old_text="a", new_text="a"),
    ],
)
def test_edits_that_make_no_sense_are_refused(edit: Edit) -> None:
    refusal("a\nb\n", edit)


def test_no_edits_are_refused() -> None:
    refusal("a")


def test_overlapping_edits_name_each_other() -> None:
    assert "edits 1 and 2 overlap" in refusal("a\nb\nc\n", lines(1, 2, "x"), replace("b", "y"))


def test_ambiguous_replace_names_the_lines() -> None:
    text = refusal("a\nb\na\nc\na\n", replace("a", "x"))
    assert "3 times" in text
    assert "lines 1, 3, 5" in text
    assert "replace_all" in text


def test_ambiguous_replace_names_at_most_ten_lines() -> None:
    text = refusal("a\n" * 5000, replace("a", "x"))
    assert "5000 times" in text
    assert "10, ..." in text


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


def test_edit_is_named_when_there_are_several() -> None:
    assert "edit 2" in refusal("a\nb\n", replace("a", "x"), replace("q", "y"))


def test_diff_is_unified() -> None:
    before = "".join(f"{number}\n" for number in range(1, 21))
    diff = apply_edits(before.encode(), [lines(10, None, "ten")], "/file").diff
    assert diff == ("--- /file\n+++ /file\n@@ -7,7 +7,7 @@\n 7\n 8\n 9\n-10\n+ten\n 11\n 12\n 13\n")


def test_diff_marks_a_missing_newline() -> None:
    diff = apply_edits(b"a", [replace("a", "b")], "/file").diff
    assert diff.endswith("@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+b\n\\ No newline at end of file\n")


def test_diff_shows_undecodable_bytes_as_replacement() -> None:
    assert "\ufffd" in apply_edits(b"\xe9 a\n", [replace("a", "b")], "/file").diff


def test_diff_is_bounded_and_says_so() -> None:
    diff = apply_edits(b"a\n" * 50_000, [replace("a", "b", replace_all=True)], "/file").diff
    assert len(diff) < 20_100
    assert re.search(r"\.\.\. \d+ more lines of diff\n$", diff)


def test_big_files_take_time_in_proportion() -> None:
    big = b"".join(b"line %d of the file\n" % number for number in range(400_000))
    started = time.monotonic()
    assert len(edited(big, lines(399_999, None, "x"), replace("line 7 of", "y"))) < len(big)
    assert "nearest" in refusal(big, replace("\n".join(f"line {n}  of the file" for n in range(100)), "x"))
    assert time.monotonic() - started < 30


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
    for _, (start, end, new, is_whole) in ordered:
        if start < done:
            return None
        result += text[done:start]
        if is_whole and new and result and not result.endswith("\n"):
            result += newline
        result += new
        done = max(done, end)
    result += text[done:]
    bare = text and not text.endswith("\n")
    if bare and any(whole and end == len(text) for _, end, _, whole in places) and result.endswith("\n"):
        stripped = re.sub(r"\r?\n\Z", "", result)
        result = stripped if stripped and not stripped.endswith("\n") else result
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
def test_engine_does_what_the_contract_says(content: bytes, edits: list[Edit]) -> None:
    expected = model(content, edits)
    try:
        result = apply_edits(content, edits, "/file")
    except EditError:
        assert expected is None
    else:
        assert result.content == expected
        assert result.edits_applied == len(edits)


def applied(before: list[str], diff: str) -> list[str]:
    """Apply a unified diff, demanding that its context and its numbers fit."""
    after: list[str] = []
    at, last = 0, ""
    for line in diff.splitlines(keepends=True)[2:]:
        if match := re.fullmatch(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@\n", line):
            start = int(match[1]) - (match[2] != "0")
            after += before[at:start]
            at = start
            assert len(after) == int(match[3]) - (match[4] != "0")
        elif line.startswith("\\"):
            if after and after[-1].endswith("\n") and last == "+":
                after[-1] = after[-1][:-1]
        else:
            last, body = line[0], line[1:]
            if last in " -":
                assert before[at].rstrip("\n") == body.rstrip("\n")
                at += 1
            if last == " ":
                after.append(before[at - 1])
            if last == "+":
                after.append(body)
    return after + before[at:]


plain_lines = st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=40)


@settings(max_examples=500, deadline=None)
@given(plain_lines, st.booleans(), st.lists(good_edits, min_size=1, max_size=4))
def test_diff_turns_the_old_text_into_the_new(body: list[str], ends: bool, edits: list[Edit]) -> None:
    content = "\n".join(body) + ("\n" if ends and body else "")
    try:
        result = apply_edits(content.encode(), edits, "/file")
    except EditError:
        return
    text = result.content.decode().replace("\r\n", "\n")
    if "\r" in result.content.decode():
        return
    assert "".join(applied(re.findall(r"[^\n]*\n|[^\n]+\Z", content), result.diff)) == text
