"""A command line as POSIX shells read it: words and what joins them, or a refusal that says which part and why.

Quoting is that of XCU 2.2: single quotes, double quotes, backslash, and a backslash before a line break, which
continues the line. Only `|`, `&&`, `||` and `;` join commands. Pure: text in, words out.

Invariants:

- A word is what bash, dash, BusyBox ash, ksh and zsh, with the options they start with, would pass to a program. What
  one of them would change, or read otherwise than another, is refused and not passed on as it stands.
- What `CommandLine.quoted` returns has every word in single quotes, so that nothing is left for a shell to read.
"""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeGuard

Join = Literal["|", "&&", "||", ";"]

MOST_CHARACTERS = 100_000
"""Linux takes 128 KiB for one argument, and what does not fit there would fail in odd ways."""

_BLANKS = " \t"
_QUOTES = "'\"\\"
_ESCAPED_IN_DOUBLE_QUOTES = '$`"\\'
_EXPANDS = "would be expanded by a shell; put it in single quotes, which keep it as it is"
_GLOBS = "would be replaced by the names of files; put it in single quotes"
_OUTSIDE_QUOTES = {
    "$": _EXPANDS,
    "`": _EXPANDS,
    "*": _GLOBS,
    "?": _GLOBS,
    "[": _GLOBS,
    "<": "redirects; leave it out: text for stdin goes into input",
    ">": "redirects; leave it out: stdout and stderr both come back",
    "(": "begins a subshell, a function or a pattern; quote it, or leave it out",
    ")": "ends a subshell, a function or a pattern; quote it, or leave it out",
    "\n": "is a line break outside quotes; join commands with ; or &&",
}
_KEYWORDS = frozenset({
    "!", "-", "[[", "]]", "{", "}", "case", "coproc", "do", "done", "elif", "else", "end", "esac", "fi",
    "for", "foreach", "function", "if", "in", "namespace", "nocorrect", "noglob", "repeat", "select",
    "then", "time", "until", "while",
})  # fmt: skip
"""The reserved words of all these shells, and what zsh takes as a modifier of the command behind it."""

_QUOTED = "\0"
"""Stands in a word's shape for a character that was quoted; no line may hold it."""


class UnreadableError(ValueError):
    """A line is not made of words and joins alone; `str()` says which part is not, and why."""


@dataclass(frozen=True)
class CommandLine:
    """The words of each simple command, and what stands between them: always one join less."""

    commands: tuple[tuple[str, ...], ...]
    joins: tuple[Join, ...]

    def quoted(self) -> str:
        """Return the line with each word in single quotes."""
        texts = [" ".join(quoted(word) for word in words) for words in self.commands]
        pieces = [texts[0]]
        for join, text in zip(self.joins, texts[1:], strict=True):
            pieces += [join, text]
        return " ".join(pieces)


@dataclass(frozen=True)
class _Word:
    """What a program would get; how it stands in the line; and its shape, in which quoted characters are hidden."""

    text: str
    written: str
    shape: str


def quoted(text: str) -> str:
    """Quote for a POSIX shell (XCU 2.2.2)."""
    return "'" + text.replace("'", "'\\''") + "'"


def read(line: str) -> CommandLine:
    """Split a command line. Raises UnreadableError."""
    if len(line) > MOST_CHARACTERS:
        raise UnreadableError(f"it has more than {MOST_CHARACTERS} characters; pass long text as input")
    for at, char in enumerate(line):
        if char not in "\t\n" and unicodedata.category(char) in ("Cc", "Cs"):
            _refuse(line, at, "is a control character or no character at all; leave it out")
    return _parsed(_Lexer(line).tokens())


def _parsed(tokens: Iterator[_Word | Join]) -> CommandLine:
    commands: list[tuple[str, ...]] = []
    joins: list[Join] = []
    words: list[str] = []
    for token in tokens:
        if isinstance(token, _Word):
            if not words:
                _check_command(token)
            words.append(token.text)
            continue
        if not words:
            raise UnreadableError(f"a command is missing before {token}")
        commands.append(tuple(words))
        joins.append(token)
        words = []
    if words:
        commands.append(tuple(words))
    else:
        raise UnreadableError(
            f"a command is missing after {joins[-1]}" if joins else "there is no command in it"
        )
    return CommandLine(tuple(commands), tuple(joins))


class _Lexer:
    """Goes through one line. For one thread."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._at = 0

    def tokens(self) -> Iterator[_Word | Join]:
        """Return words and joins in their order."""
        while char := self._next():
            if char in _BLANKS:
                self._at += 1
            elif char in "|&;":
                yield self._join()
            else:
                yield self._word()

    def _next(self) -> str:
        """Return the character at hand, behind any continuation of the line; nothing at its end."""
        while self._line.startswith("\\\n", self._at):
            self._at += 2
        return self._line[self._at : self._at + 1]

    def _join(self) -> Join:
        start = end = self._at
        while self._line[end : end + 1] in tuple("|&;"):
            end += 1
        text = self._line[start:end]
        if not _is_join(text):
            _refuse(self._line, start, "does not join commands; only | && || and ; do")
        self._at = end
        return text

    def _word(self) -> _Word:
        start = self._at
        text, shape = [], []
        while (char := self._next()) and char not in _BLANKS + "|&;":
            if char in _QUOTES:
                piece = self._quoted(char)
                shape.append(_QUOTED * len(piece))
            else:
                piece = self._bare(char)
                shape.append(piece)
            text.append(piece)
        word = _Word("".join(text), self._line[start : self._at], "".join(shape))
        _check_word(word)
        return word

    def _bare(self, char: str) -> str:
        if why := _OUTSIDE_QUOTES.get(char):
            _refuse(self._line, self._at, why)
        if not char.isprintable():
            _refuse(self._line, self._at, "is a blank or cannot be seen; put it in quotes")
        self._at += 1
        return char

    def _quoted(self, char: str) -> str:
        """Return what a quoted part of a word, which `char` begins, stands for."""
        if char == "'":
            return self._single_quoted()
        return self._double_quoted() if char == '"' else self._escaped()

    def _single_quoted(self) -> str:
        end = self._line.find("'", self._at + 1)
        if end < 0:
            _refuse(self._line, self._at, "opens a quote that is not closed")
        inner = self._line[self._at + 1 : end]
        self._at = end + 1
        return inner

    def _double_quoted(self) -> str:
        start = self._at
        self._at += 1
        inner = []
        while (char := self._next()) != '"':
            if not char:
                _refuse(self._line, start, "opens a quote that is not closed")
            if char in "$`":
                _refuse(self._line, self._at, _EXPANDS)
            if char == "\\" and self._line[self._at + 1 : self._at + 2] in tuple(_ESCAPED_IN_DOUBLE_QUOTES):
                self._at += 1
            inner.append(self._line[self._at])
            self._at += 1
        self._at += 1
        return "".join(inner)

    def _escaped(self) -> str:
        escaped = self._line[self._at + 1 : self._at + 2]
        if not escaped:
            _refuse(self._line, self._at, "is a backslash with nothing behind it")
        self._at += 2
        return escaped


def _is_join(text: str) -> TypeGuard[Join]:
    return text in ("|", "&&", "||", ";")


def _check_word(word: _Word) -> None:
    """Refuse what one shell or another would put something else in the place of."""
    shape = word.shape
    if shape.startswith("#"):
        _refuse_word(word, "begins a comment; quote it, or leave it out")
    if shape.startswith("~") or "=~" in shape or (":~" in shape and "=" in shape):
        _refuse_word(word, "holds a ~ that shells may replace by a home directory; put it in single quotes")
    if shape.startswith("=") and len(word.text) > 1:
        _refuse_word(word, "would be replaced by a program's path in zsh; put it in single quotes")
    if _has_braces(word):
        _refuse_word(word, "holds braces that shells may expand; put it in single quotes")


def _has_braces(word: _Word) -> bool:
    """Whether braces would make several words of it, or have no partner, which zsh takes for its own."""
    first = word.shape.find("{")
    inside = word.text[first:] if first >= 0 else ""
    if "," in inside or ".." in inside:
        return True
    opened = 0
    for char in word.shape:
        opened += (char == "{") - (char == "}")
        if opened < 0:
            return True
    return False


def _check_command(word: _Word) -> None:
    """Refuse a first word that shells would not take for the name of a command."""
    if word.shape in _KEYWORDS or word.shape.startswith("!"):
        _refuse_word(word, "is a word of the shell's own language; quote it to run a program of that name")
    if "=" in word.shape:
        _refuse_word(word, "is an assignment; that is not allowed")


def _refuse(line: str, at: int, why: str) -> NoReturn:
    raise UnreadableError(f"{line[at]!r} at character {at + 1} ({_shown(line[at : at + 40])}) {why}")


def _refuse_word(word: _Word, why: str) -> NoReturn:
    raise UnreadableError(f"the word {_shown(word.written)} {why}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
