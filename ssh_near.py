"""Where in a text a passage was probably meant to be: for whoever quoted it not quite right.

Pure, and bounded: lines that stand in both vote for where the passage would begin, the rare ones first and the very
common ones only when there is no other; without any, the line most like its longest line is looked for among those
that share a word with it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

_SHOWN_CHARACTERS = 700
_CANDIDATES = 200
_COMMON = 10_000
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_WORD = re.compile(r"\w{3,}")


def nearest(text: str, starts: Sequence[int], passage: str) -> str:
    """Return a sentence with the nearest lines and their numbers, or one that says that nothing is near."""
    lines = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").split("\n")[: len(starts)]
    wanted = passage.removesuffix("\n").split("\n")
    begin = _by_votes(lines, wanted)
    if begin is None:
        begin = _by_likeness(lines, wanted)
    if begin is None:
        return "No line of the file is like it; read the file again."
    first = max(0, begin)
    place = lines[first : begin + len(wanted)]
    number = f"line {first + 1}" if len(place) == 1 else f"lines {first + 1}-{first + len(place)}"
    return f"The nearest is {number}{_difference(place, wanted)}:\n{_numbered(place, first)}"


def _by_votes(lines: Sequence[str], wanted: Sequence[str]) -> int | None:
    places: dict[str, list[int]] = {}
    for index, line in enumerate(wanted):
        if norm := _plain(line):
            places.setdefault(norm, []).append(index)
    found: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        if (norm := _plain(line)) in places:
            found.setdefault(norm, []).append(index)
    votes: Counter[int] = Counter()
    for norm, indexes in sorted(found.items(), key=lambda item: len(item[1]) * len(places[item[0]])):
        if votes and len(indexes) * len(places[norm]) > _COMMON:
            break
        votes.update(index - place for index in indexes[:_COMMON] for place in places[norm])
    if not votes:
        return None
    most = max(votes.values())
    return min(start for start, count in votes.items() if count == most)


def _by_likeness(lines: Sequence[str], wanted: Sequence[str]) -> int | None:
    offset, longest = max(enumerate(wanted), key=lambda pair: len(pair[1]))
    words = sorted(set(_WORD.findall(longest)), key=len, reverse=True)[:4]
    sharing = [(sum(word in line for word in words), index) for index, line in enumerate(lines)]
    best = sorted((pair for pair in sharing if pair[0]), key=lambda pair: (-pair[0], pair[1]))[:_CANDIDATES]
    matcher = SequenceMatcher(None, b=longest[:500], autojunk=False)
    rated = []
    for _, index in best:
        matcher.set_seq1(lines[index][:500])
        rated.append((matcher.ratio(), -index))
    if not rated:
        return None
    ratio, index = max(rated)
    return -index - offset if ratio > 0.5 else None


def _plain(line: str) -> str:
    return " ".join(line.translate(_QUOTES).split())


def _difference(place: Sequence[str], wanted: Sequence[str]) -> str:
    found, asked = "\n".join(place), "\n".join(wanted)
    if "".join(found.split()) == "".join(asked.split()):
        return ", which differs only in white space"
    if "".join(found.translate(_QUOTES).split()) == "".join(asked.translate(_QUOTES).split()):
        return ", which differs only in quotes and white space"
    return ""


def _numbered(place: Sequence[str], first: int) -> str:
    shown = "\n".join(f"{number}|{line.rstrip(chr(13))}" for number, line in enumerate(place, first + 1))
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "..."
