"""The text of an SSH client configuration: its files, lines, words and patterns (ssh_config(5)).

Words are split exactly as OpenSSH 9.2 does: a keyword ends at white space or one `=`, arguments may stand in quotes, a
`#` begins a comment where a word could begin. Whatever cannot be read is a ConfigError that names file and line.
"""

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ssh_errors import ConfigError

_BLANKS = " \t\r\n"
_ENDS_OF_KEYWORD = frozenset(_BLANKS + '"=')
_ESCAPED = frozenset("'\"\\")


@dataclass(frozen=True)
class Line:
    """One keyword and what follows it: as words, and as it stands."""

    path: Path
    number: int
    keyword: str
    words: tuple[str, ...]
    rest: str

    def error(self, what: str) -> ConfigError:
        """Return the error that names this line."""
        return ConfigError(f"SSH_CONFIG: {self.path} line {self.number}: {what}")


def read_lines(path: Path) -> tuple[Line, ...]:
    """Return the lines that say something.

    Raises FileNotFoundError when the file is not there, and ConfigError when it, or a line of it, cannot be read, or
    others than its owner may write to it: what stands in it is run.
    """
    try:
        with path.open("rb") as file:
            _refuse_foreign(path, os.fstat(file.fileno()))
            data = file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"SSH_CONFIG: {path} cannot be read: {error.strerror}") from None
    return _parsed(path, data)


@lru_cache(maxsize=64)  # every call to a tool asks anew
def _parsed(path: Path, data: bytes) -> tuple[Line, ...]:
    text = data.decode("utf-8", "surrogateescape")
    lines = (_line(path, number, line) for number, line in enumerate(text.split("\n"), 1))
    return tuple(line for line in lines if line is not None)


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    if os.name != "posix":
        return
    if status.st_uid not in (0, os.getuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"SSH_CONFIG: others may change {path}, and commands in it are run; make it yours: chmod go-w {path}"
        )


def _line(path: Path, number: int, text: str) -> Line | None:
    bare = Line(path, number, "", (), "")
    if "\0" in text:
        raise bare.error("it holds a NUL byte; is this a text file?")
    keyword, rest = delimited(text.rstrip(_BLANKS + "\f"))
    if keyword == "":  # what stands before leading blanks
        keyword, rest = delimited(rest or "")
    if keyword is None:
        raise bare.error("a quote is not closed")
    if not keyword or keyword.startswith("#"):
        return None
    line = Line(path, number, keyword.lower(), (), rest or "")
    if not line.rest:
        raise line.error(f"{keyword} has no argument")
    words = _words(line.rest)
    if words is None:
        raise line.error("a quote is not closed")
    return Line(path, number, line.keyword, words, line.rest)


def delimited(text: str) -> tuple[str | None, str | None]:
    """Part a text at its first blank or `=`: the first word, and what follows or None.

    A word in double quotes is taken as a whole; where its end is missing, the word is None.
    """
    end = next((place for place, char in enumerate(text) if char in _ENDS_OF_KEYWORD), None)
    if end is None:
        return text, None
    if text[end] == '"':
        closing = text.find('"', end + 1)
        if closing < 0:
            return None, None
        return text[:end] + text[end + 1 : closing], text[closing + 1 :].lstrip(_BLANKS)
    rest = text[end + 1 :].lstrip(_BLANKS)
    if text[end] != "=" and rest.startswith("="):
        rest = rest[1:].lstrip(_BLANKS)
    return text[:end], rest


def _words(text: str) -> tuple[str, ...] | None:
    """Split arguments; None when a quote is not closed."""
    words: list[str] = []
    place = 0
    while True:
        place += len(text[place:]) - len(text[place:].lstrip(" \t"))
        if place == len(text) or text[place] == "#":
            return tuple(words)
        word, place, closed = _word(text, place)
        if not closed:
            return None
        words.append(word)


def _word(text: str, place: int) -> tuple[str, int, bool]:
    """Return the word that begins at a place, the place behind it, and whether its quotes are closed."""
    word: list[str] = []
    quote = ""
    while place < len(text):
        char = text[place]
        following = text[place + 1 : place + 2]
        if char == "\\" and (following in _ESCAPED or (following == " " and not quote)):
            word.append(following)
            place += 1
        elif not quote and char in " \t":
            break
        elif not quote and char in "'\"":
            quote = char
        elif char == quote:
            quote = ""
        else:
            word.append(char)
        place += 1
    return "".join(word), place, not quote


def matches(text: str, pattern: str) -> bool:
    """Whether a pattern with the wildcards `*` and `?` fits all of a text."""
    if "*" not in pattern and "?" not in pattern:
        return text == pattern
    return _fits(pattern)(text) is not None


@lru_cache(maxsize=4096)  # fnmatch keeps 256, which is too few for a fleet's config
def _fits(pattern: str) -> Callable[[str], object]:
    return re.compile(fnmatch.translate(pattern.replace("[", "[[]"))).match


def matches_list(text: str, patterns: str) -> bool:
    """Whether one of the patterns between commas fits, and none of those that begin with `!`."""
    each = patterns.split(",")
    if any(matches(text, pattern[1:]) for pattern in each if pattern.startswith("!")):
        return False
    return any(matches(text, pattern) for pattern in each if not pattern.startswith("!"))


def included(pattern: str) -> list[Path]:
    """Return the files that a pattern of Include means, in OpenSSH's order."""
    names = glob.glob(pattern)  # noqa: PTH207 - Path.glob finds hidden files
    return [Path(name) for name in sorted(names, key=os.fsencode)]
