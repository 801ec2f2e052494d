"""Random command lines of all that shells know, and what real shells make of them: the programs run, word for word.

The only programs there are stand in one folder, and each writes down its arguments. So nothing that gets past the
policy does anything but leave a record, or a file in the folder that the shell runs in.
"""

import random
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from conftest import program
from ssh_words import CommandLine

Argv = tuple[str, ...]

PROGRAMS = (
    "prog",
    "tool",
    "fail",
    "a b",
    "it's",
    "$x",
    "*",
    "if",
    "=prog",
    "A=b",
    "é",
    "{",
    "#",
    ";",
    "\u3000",
)
ALLOWED = "prog,tool x,fail,'a b',it\\'s,'$x','*','if',\\=prog,\"A=b\",é,\\{,\\#,';','\u3000'"
"""All of them may be run; `tool` only with `x`. `fail` ends with 1."""

_NAMES = [
    "prog", "prog", "prog", "prog", "tool x", "fail", "'prog'", '"prog"', "\\prog", "pr''og", 'p"r"og',
    "pr\\\nog", "'a b'", "a\\ b", "it\\'s", '"it\'s"', "'$x'", "\\*", "'if'", "\\if", "\\=prog", "'A=b'",
    "A\\=b", "é", "\\{", "'{'", "\\#", "';'", "\\;", "'\u3000'",
]  # fmt: skip
_PLAIN = [
    "a", "b", "-x", "--long=v", "1", "0", "é", "日本", "ÿ", "ā", "ł", "\u2009x", ".", "/", "%", "+", ":", "@",
    ",", "^", "]", "=", "!", "#", "~", "{}", "{0}", "..", "-", "--", "a.b", "b1", "HEAD^", "HEAD~1", "x=y",
    "1..3", "a,b", "''", '""', "' '", '" "', "'a b'", '"a b"', "'\\'", "'\\\\'", '"\\\\"', '"\\""',
    '"\\$a"', '"\\`"', '"\\x"', '"\'"', "'\"'", "\\'", '\\"', "\\\\", "\\ ", "\\a", "\\$", "\\`", "\\;",
    "\\|", "\\&", "\\*", "\\?", "\\[", "\\~", "\\#", "\\<", "\\>", "\\(", "\\)", "\\{", "\\}", "\\!", "\\=",
    "\\\n", '"a\\\nb"', "'a\nb'", '"a\nb"', "'\t'", "\\\t", "'$x'", "'`id`'", "'*'", "'{a,b}'", "'~'",
    "'#'", "'!'", '"!"', '"!!"', "'$(id)'", "'\\''", "'%s'", "'\\n'", '"\\n"', "'\u00a0'", "\\\u3000",
    "'\u200b'", '"\u2028"', "'\u0101\u0102\u0181'", "'\ue000'", "'\U0001f600'", "-n", "'-n'", "then", "if",
    "do", "esac", "while", "in", "function", "time", "for", "case", "select", "repeat", "end", "coproc",
]  # fmt: skip
_EXPANDS = [
    "$x", "${x}", "${x:-a}", "${x#a}", "$1", "$@", "$*", "$#", "$?", "$$", "$!", "$-", "$", '"$x"',
    '"${x}"', "${(f)x}", "$'a'", "$'\\n'", "$'\\''", '$"a"', "`prog a`", '"`prog a`"', "$(prog a)",
    '"$(prog a)"', "$((1+1))", "$[1+1]", "*", "?", "a*", "[ab]", "[!a]", "[", "a[1]", "**/a", "@(a|b)",
    "+(a)", "!(a)", "*(.)", "<1-3>", "(a|b)", "^a*", "~", "~/a", "~root", "~+", "~-", "a=~", "--b=~/x",
    "a=b:~", ":~", "~'root'", "\\\n~", "''~", "=prog", "==", "=a", "{a,b}", "{1..3}", "{a..c}", "x{a,b}y",
    "{a,'b'}", "{,}", "{a\\,b}", "\\{a,b}", "{", "}", "a}", "}a", "{a", "{{a,b}", ">f", ">>f", "<f", "2>f",
    "2>&1", "&>f", ">&2", "<>f", ">|f", "<<E\na\nE", "<<<a", "<(prog a)", ">(prog a)", ">!f", "{fd}>f",
    ">f&", "# c", "#c", "\n#c", "(prog)", "((1))", "[[ a ]]", "[ a ]", "( )", ")", "(", "()", "a()",
    "=(prog)", "!!", "!$", "!prog", "!-1", "^a^b", "%1", "\x01", "\x7f", "\x81", "\x88", "\r", "\x0b",
    "\x0c", "\x1b[A", "\0", "\ud800", "\u00a0", "\u3000", "\u2003", "\u200b", "\u2028", "\u1680", "\u180e",
    "\ufeff", "\u00ad", "\x85", "\u202e", "'", '"', "\\", "`", "&", "\n", "'a", '"a', "a\\",
]  # fmt: skip
_STARTS = [
    "A=b prog", "A+=b prog", "a[1]=b prog", "A=b", "PATH=/x prog", "'A'=b prog", "! prog", "!prog",
    "time prog", "- prog", "if prog; then prog; fi", "while fail; do prog; done",
    "for i in a; do prog; done", "{ prog; }", "(prog)", "{prog}", "case a in a) prog;; esac",
    "prog() { prog a; }", "function f { prog; }", "select i in a; do prog; done", "fi", "done",
    "coproc prog", "noglob prog", "nocorrect prog", "repeat 2 prog", "foreach i (a) prog; end",
    "until prog; do :; done", "eval prog", "exec prog", "command prog", "builtin prog", ". prog",
    "env prog", "alias prog=tool", "set -x", "trap prog", "tool", "tool y", "progx", "/prog", "./prog",
    "PROG", "''", "'prog '", "$x", "pr\\\nog", "i\\\nf prog", "e''val prog", "{ prog", "} prog", "]] prog",
    "[[ a", "then prog", "do prog", "#prog", "~prog", "*", "{prog,a}", "pro[g]", "-", "prog#",
]  # fmt: skip
_JOINS = ["|", "|", "&&", "&&", "||", "||", ";", ";", " | ", "&&\\\n"]
_ODD_JOINS = [
    "&",
    "|&",
    ";;",
    ";&",
    ";|",
    "&&&",
    "|||",
    "&|",
    "&!",
    "\n",
    "\r\n",
    "&\\\n&",
    "|\\\n|",
    ";;&",
    "&;",
    "|;",
]
_SOUP = "aab  '\"\\\\\n\t{}=~#,.!^:;|&-%]"


def lines(seed: int, count: int) -> list[str]:
    """Return random command lines, always the same ones for a seed."""
    chance = random.Random(seed)
    return [_line(chance) for _ in range(count)]


def _line(chance: random.Random) -> str:
    """Return a line of some commands. Some have nothing odd, so that what is allowed is seen to be.

    Others are a few characters in any order.
    """
    if chance.random() < 0.2:
        return "prog " + "".join(chance.choices(_SOUP, k=chance.randrange(12)))
    oddness = chance.choice([0.0, 0.02, 0.05, 0.3])
    line = _command(chance, oddness)
    while chance.random() < 0.35:
        line += chance.choice(_ODD_JOINS if chance.random() < oddness else _JOINS) + _command(chance, oddness)
    if chance.random() < oddness:
        at = chance.randrange(len(line) + 1)
        line = line[:at] + chance.choice(_EXPANDS + _ODD_JOINS) + line[at + chance.randrange(2) :]
    return line


def _command(chance: random.Random, oddness: float) -> str:
    start = chance.choice(_STARTS if chance.random() < oddness else _NAMES)
    words = [_word(chance, oddness) for _ in range(chance.choice([0, 1, 1, 2, 3, 4]))]
    blank = chance.choice([" ", " ", "  ", "\t", " \\\n "])
    return chance.choice(["", "", " "]) + blank.join([start, *words]) + chance.choice(["", "", " "])


def _word(chance: random.Random, oddness: float) -> str:
    pieces = chance.choice([1, 1, 1, 2, 3])
    return "".join(chance.choice(_EXPANDS if chance.random() < oddness else _PLAIN) for _ in range(pieces))


def expected(line: CommandLine) -> list[Argv]:
    """Return the commands that a shell runs of a line, if those named `fail` fail."""
    ran: list[Argv] = []
    runs, status = True, 0
    for words, before in zip(line.commands, (";", *line.joins), strict=True):
        if before != "|":
            runs = before == ";" or (before == "&&") == (status == 0)
        if runs:
            ran.append(words)
            status = int(words[0] == "fail")
    return comparable(ran, line)


def comparable(ran: list[Argv], line: CommandLine) -> list[Argv]:
    """Return what was run in an order that does not hang on which part of a pipeline was first."""
    return sorted(ran) if "|" in line.joins else ran


@dataclass(frozen=True)
class Shell:
    """A shell, by the name that it is started with."""

    package: str
    arguments: tuple[str, ...]

    def command(self) -> tuple[str, list[str]]:
        return program(self.package, self.package), list(self.arguments)


AS_SH = {
    "bash": Shell("bash", ("sh",)),
    "dash": Shell("dash", ("sh",)),
    "zsh": Shell("zsh", ("sh",)),
    "ash": Shell("busybox", ("sh",)),
    "ksh": Shell("ksh", ("sh",)),
}
"""What `/bin/sh` is on one machine or another."""

AS_THEMSELVES = {
    "bash": Shell("bash", ("bash", "--norc")),
    "dash": Shell("dash", ("dash",)),
    "zsh": Shell("zsh", ("zsh", "-f")),
    "ash": Shell("busybox", ("ash",)),
    "ksh": Shell("ksh", ("ksh",)),
}


class Stubs:
    """The folder of the programs that write down their arguments, and one for shells to run in."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stubs"
        self.cwd = folder / "cwd"
        self.path.mkdir()
        self.cwd.mkdir()
        for name in ("a", "b", "ab"):
            (self.cwd / name).touch()
        stub = self.path / PROGRAMS[0]
        stub.write_text(
            f"#!{program('dash', 'dash')}\n"
            'printf \'%s\\0\' "$L" $# "${0##*/}" "$@" >>"$RECORD"\n'
            "case $0 in */fail) exit 1 ;; esac\n"
        )
        stub.chmod(0o755)
        for name in PROGRAMS[1:]:
            (self.path / name).hardlink_to(stub)

    def environment(self, record: Path) -> dict[str, str]:
        return {"PATH": str(self.path), "HOME": str(self.cwd), "RECORD": str(record), "L": "0"}

    def untouched(self) -> bool:
        """Whether no shell has made a file."""
        return sorted(path.name for path in self.cwd.iterdir()) == ["a", "ab", "b"]

    def start(
        self, shell: Shell, numbered: Mapping[int, str], folder: Path, locale: str
    ) -> subprocess.Popen[bytes]:
        """Start a shell on a script of these lines; each is run with its number in `L`."""
        folder.mkdir()
        script = folder / "script"
        text = "".join(f"L={number}\n{line}\n" for number, line in numbered.items())
        script.write_bytes(text.encode())
        path, arguments = shell.command()
        with (folder / "out").open("wb") as out:
            return subprocess.Popen(
                [*arguments, str(script)],
                executable=path,
                cwd=self.cwd,
                env=self.environment(folder / "record") | {"LC_ALL": locale},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )


def recorded(record: Path) -> Iterable[tuple[int, Argv]]:
    """Return the number of the line and the words of each program that was run."""
    fields = record.read_bytes().decode().split("\0") if record.exists() else [""]
    at = 0
    while at + 1 < len(fields):
        number, count = int(fields[at]), int(fields[at + 1])
        yield number, tuple(fields[at + 2 : at + 3 + count])
        at += 3 + count
