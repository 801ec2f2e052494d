"""What is found in a trail that somebody has had in hand."""

import json
from collections.abc import Callable, Iterable
from itertools import permutations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit_chain import BEGINNING, Check, Finding, Head, Record, digest, linked, parsed

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key()


def record(event: str, **more: object) -> Record:
    return {"time": "2026-11-25T10:00:00.000Z", "event": event, **more}


def written(count: int = 8, at_once: int = 2) -> list[bytes]:
    """The lines of a trail: `count` records, of which so many were written together."""
    head, lines = BEGINNING, list[bytes]()
    records = [record("file"), *(record("intent", command=f"echo {n}") for n in range(count - 1))]
    while records:
        batch, records = records[:at_once], records[at_once:]
        new = linked(head, batch, KEY)
        for line in new:
            head = head.then(line)
        lines += [line + b"\n" for line in new]
    return lines


def findings(lines: Iterable[bytes], *, key: bool = False, head: str | None = None) -> list[Finding]:
    return list(Check([PUBLIC] if key else [], head).run([("trail", lines)]))


def altered(lines: Iterable[bytes], *, key: bool = False, head: str | None = None) -> list[Finding]:
    return [found for found in findings(lines, key=key, head=head) if found.altered]


def made_anew(lines: list[bytes], start: int, change: Callable[[Record], Record]) -> list[bytes]:
    """Change a record and link everything from there on anew, as one without the key can."""
    head = BEGINNING
    for line in lines[:start]:
        head = head.then(line.removesuffix(b"\n"))
    rest = []
    for number, line in enumerate(lines[start:]):
        old = parsed(line)
        assert old is not None
        kept = {k: v for k, v in old.items() if k not in ("sequence", "previous", "signature")}
        rest.append(change(kept) if number == 0 else kept)
    return lines[:start] + [line + b"\n" for line in linked(head, rest)]


def test_untouched_trail_is_whole() -> None:
    assert findings(written(), key=True, head=digest(written()[3][:-1])) == []


@pytest.mark.parametrize("number", range(7))
def test_each_altered_byte_of_a_record_before_the_last_is_found(number: int) -> None:
    lines = written()
    for at in range(len(lines[number]) - 1):
        line = bytearray(lines[number])
        line[at] ^= 0x01
        assert altered([*lines[:number], bytes(line), *lines[number + 1 :]]), (number, at)


@pytest.mark.parametrize("number", range(7))
def test_removed_record_before_the_last_is_found(number: int) -> None:
    lines = written()
    found = altered(lines[:number] + lines[number + 1 :])
    assert any("missing" in each.sentence or "beginning" in each.sentence for each in found)


@pytest.mark.parametrize("pair", list(permutations(range(8), 2)))
def test_moved_record_is_found(pair: tuple[int, int]) -> None:
    lines = written()
    lines.insert(pair[1], lines.pop(pair[0]))
    assert altered(lines)


@pytest.mark.parametrize("number", range(8))
def test_repeated_record_is_found(number: int) -> None:
    lines = written()
    assert altered([*lines[: number + 1], *lines[number:]])


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("what", [b"junk\n", b"\n", b"{}\n", b"[1]\n", b"\xff\n", b"[" * 100_000 + b"\n"])
def test_line_that_was_put_in_is_found(number: int, what: bytes) -> None:
    lines = written()
    (first, *_) = altered([*lines[:number], what, *lines[number:]])
    assert first.line == number + 1


def test_finding_names_the_line() -> None:
    lines = written()
    lines[3] = lines[3].replace(b"echo 2", b"echo 9")
    (found,) = altered(lines)
    assert (found.file, found.line) == ("trail", 4)
    assert "record 5" in found.sentence


@pytest.mark.parametrize("number", range(8))
def test_trail_made_anew_from_any_record_on_is_found_with_the_key_alone(number: int) -> None:
    forged = made_anew(written(), number, lambda old: {**old, "forged": True})
    assert altered(forged) == []
    assert altered(forged, key=True)


@pytest.mark.parametrize("number", range(8))
def test_signature_of_another_record_or_key_does_not_pass(number: int) -> None:
    forged = made_anew(written(), number, lambda old: {**old, "forged": True})
    last = parsed(written()[-1])
    assert last is not None
    end = forged[-1].removesuffix(b"}\n")
    replayed = end + b',"signature":"' + last["signature"].encode() + b'"}\n'
    assert altered([*forged[:-1], replayed], key=True)
    head = BEGINNING
    for line in forged[:-1]:
        head = head.then(line[:-1])
    (mine,) = linked(head, [record("intent")], Ed25519PrivateKey.generate())
    assert altered([*forged[:-1], mine + b"\n"], key=True)


@pytest.mark.parametrize("signature", ["x", "", "AAAA", 7, None, ["x"]])
def test_signature_that_is_none_is_found(signature: object) -> None:
    lines = written()
    last = parsed(lines[-1])
    assert last is not None
    text = json.dumps({**last, "signature": signature}, separators=(",", ":"))
    assert altered([*lines[:-1], text.encode() + b"\n"], key=True)


def test_signature_among_the_arguments_is_none() -> None:
    lines = [
        line + b"\n"
        for line in linked(BEGINNING, [record("file"), record("x", arguments={"a": 1, "signature": "x"})])
    ]
    assert ["no signature" in found.sentence for found in altered(lines, key=True)] == [True, True]
    signed = linked(BEGINNING, [record("file", arguments={"a": 1, "signature": "x"})], KEY)
    assert altered([signed[0] + b"\n"], key=True) == []


@pytest.mark.parametrize("left", range(1, 8))
def test_end_that_was_cut_off_is_found_by_a_hash_noted_before(left: int) -> None:
    lines = written()
    noted = digest(lines[-1][:-1])
    (found,) = altered(lines[:left], head=noted)
    assert noted in found.sentence
    assert altered(lines, head=noted) == []


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_record_that_somebody_added_is_found_with_the_key_also_when_the_server_went_on_from_it(
    at_once: int,
) -> None:
    lines = written(at_once=at_once)
    (added,) = linked(headed(lines), [record("intent", command="forged")])
    (after,) = linked(headed(lines).then(added), [record("intent")], KEY)
    (found,) = altered([*lines, added + b"\n", after + b"\n"], key=True)
    assert found.line == 9
    assert "no signature" in found.sentence


@pytest.mark.parametrize("more", [b',"event":"outcome"}', b',"signature":""}', b" }", b"} "])
def test_last_record_to_which_something_was_added_is_found_with_the_key(more: bytes) -> None:
    lines = written()
    grown = lines[-1].removesuffix(b"}\n") + more + b"\n"
    assert parsed(grown) is not None
    assert altered([*lines[:-1], grown], key=True)


def test_every_part_of_a_last_line_is_found() -> None:
    lines = written()
    for length in range(1, len(lines[-1]) - 1):
        assert altered([*lines[:-1], lines[-1][:length]]), length


def test_trail_without_a_record_is_found() -> None:
    assert altered([])


def torn(part: bytes, head: Head) -> list[bytes]:
    note = record("torn", bytes=len(part), sha256=digest(part))
    return [part + b"\n", *(line + b"\n" for line in linked(head, [note, record("intent")], KEY))]


def headed(lines: list[bytes]) -> Head:
    return Head(len(lines), digest(lines[-1][:-1]))


@pytest.mark.parametrize("part", [b'{"sequence":9,"ti', b"\0\0\0", b'{"a"\n{"b"', b"{"])
def test_part_that_a_crash_left_is_no_alteration_once_the_server_named_it(part: bytes) -> None:
    lines = written()
    found = findings([*lines, *torn(part, headed(lines))], key=True)
    assert [(each.line, each.altered) for each in found] == [(9, False)]
    assert "crash" in found[0].sentence


def test_part_of_a_record_that_nothing_names_is_an_alteration() -> None:
    lines = written()
    assert altered([*lines, *torn(b'{"part', headed(lines))[1:]])
    assert altered([*lines, b'{"other\n', *torn(b'{"part', headed(lines))[1:]])
    assert altered([*lines, *torn(b'{"part', headed(lines[:-1]))])


def test_damage_that_the_server_found_is_told() -> None:
    lines = written()
    (line,) = linked(headed(lines), [record("damaged", error="the file was cut")])
    (found,) = altered([*lines, line + b"\n"])
    assert "the file was cut" in found.sentence


def test_files_of_a_trail_are_one_chain() -> None:
    one = written()
    two = [line + b"\n" for line in linked(headed(one), [record("file"), record("intent")], KEY)]
    assert list(Check([PUBLIC]).run([("a", one), ("b", two)])) == []
    (note,) = Check([PUBLIC]).run([("b", two)])
    assert not note.altered
    assert "begins with record 9" in note.sentence
    for broken in ([("b", two), ("a", one)], [("a", one[:-1]), ("b", two)], [("a", one), ("b", two[1:])]):
        assert any(found.altered for found in Check().run(broken))


@pytest.mark.parametrize(
    "text", ["\x1b[31m", "\n", "\x7f", "\x9b", "\u202e", "\u2028", "\ud800", "\0", '"\\']
)
def test_line_obeys_no_character_and_keeps_the_truth(text: str) -> None:
    (line,) = linked(BEGINNING, [record("intent", command=f"é{text}")])
    kept = parsed(line)
    assert kept is not None
    assert kept["command"] == f"é{text}"
    assert line.decode().isprintable()
    assert "é" in line.decode()
