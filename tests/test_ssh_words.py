"""How a command line is read: its words, its joins, and what is refused because shells would change it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssh_words import MOST_CHARACTERS, UnreadableError, quoted, read


def words(line: str) -> list[str]:
    """Return the words of a line that is one simple command."""
    (command,) = read(line).commands
    return list(command)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ls", ["ls"]),
        (" \t ls \t -l ", ["ls", "-l"]),
        ("ls ''", ["ls", ""]),
        ('ls "" x', ["ls", "", "x"]),
        ("'a b'", ["a b"]),
        ("a'b'\"c\"\\d", ["abcd"]),
        ("'a\\'", ["a\\"]),
        ("'$HOME `id` * ~ {a,b} # ! ; | & < > ( )'", ["$HOME `id` * ~ {a,b} # ! ; | & < > ( )"]),
        ("'a\n\tb'", ["a\n\tb"]),
        ('"a b"', ["a b"]),
        ('"\\$ \\` \\" \\\\"', ['$ ` " \\']),
        ('"\\a \\n \\\'"', ["\\a \\n \\'"]),
        ('"a\\\nb"', ["ab"]),
        ('"a\nb"', ["a\nb"]),
        ('"a\\\\\nb"', ["a\\\nb"]),
        ('"* ? [a] ~ {a,b} # ! ; | & < > ( ) \'"', ["* ? [a] ~ {a,b} # ! ; | & < > ( ) '"]),
        ("\\$x \\` \\* \\~ \\# \\; \\| \\& \\< \\( \\\\", ["$x", "`", "*", "~", "#", ";", "|", "&", "<", "(", "\\"]),
        ("a\\ b", ["a b"]),
        ("ls \\\n -l", ["ls", "-l"]),
        ("l\\\ns", ["ls"]),
        ("a#b c~ d~e f=g h!", ["a#b", "c~", "d~e", "f=g", "h!"]),
        ("git log HEAD^ HEAD~3 stash@{0} a:b %h {}", ["git", "log", "HEAD^", "HEAD~3", "stash@{0}", "a:b", "%h", "{}"]),
        ("scp host:~/x -- !", ["scp", "host:~/x", "--", "!"]),
        ("ls ] = if -", ["ls", "]", "=", "if", "-"]),
        ("'if' x", ["if", "x"]),
        ("\\if", ["if"]),
        ("'!' x", ["!", "x"]),
        ("'A=b' c", ["A=b", "c"]),
        ("ls naïve 日本 '\u00a0' \\\u3000", ["ls", "naïve", "日本", "\u00a0", "\u3000"]),
        ("ls '{a,b}' \"{1..3}\" \\{a,b\\}", ["ls", "{a,b}", "{1..3}", "{a,b}"]),
        ("ls a,b 1..3", ["ls", "a,b", "1..3"]),
    ],
)  # fmt: skip
def test_words_are_those_of_a_posix_shell(line: str, expected: list[str]) -> None:
    assert words(line) == expected


@pytest.mark.parametrize(
    ("line", "commands", "joins"),
    [
        ("a|b", [("a",), ("b",)], ["|"]),
        ("a x && b || c ; d", [("a", "x"), ("b",), ("c",), ("d",)], ["&&", "||", ";"]),
        ("a;b", [("a",), ("b",)], [";"]),
        ("a | \\\n b", [("a",), ("b",)], ["|"]),
        ("a '|' b \\; c", [("a", "|", "b", ";", "c")], []),
    ],
)
def test_joins_stand_between_commands(line: str, commands: list[tuple[str, ...]], joins: list[str]) -> None:
    found = read(line)
    assert (list(found.commands), list(found.joins)) == (commands, joins)


@pytest.mark.parametrize(
    ("line", "part", "hint"),
    [
        ("ls $HOME", "'$HOME'", "single quotes"),
        ('ls "$HOME"', "character 5", "single quotes"),
        ("ls $'a'", "'$'", "single quotes"),
        ('ls $"a"', "'$'", "single quotes"),
        ("grep x$", "'$'", "single quotes"),
        ("ls `id`", "'`'", "single quotes"),
        ('ls "`id`"', "'`'", "single quotes"),
        ('ls "a\\\\$b"', "'$b\"'", "single quotes"),
        ("ls *.log", "'*.log'", "single quotes"),
        ("ls a?", "'?'", "single quotes"),
        ("ls [a]", "'['", "single quotes"),
        ("[[ a ]]", "'['", "single quotes"),
        ("ls ~", "'~'", "single quotes"),
        ("ls ~root/x", "'~root/x'", "single quotes"),
        ("ls \\\n~", "'~'", "single quotes"),
        ("ls a=~/x", "'a=~/x'", "single quotes"),
        ("ls --to=~", "'--to=~'", "single quotes"),
        ("ls a=b:~", "'a=b:~'", "single quotes"),
        ("ls {a,b}", "'{a,b}'", "single quotes"),
        ("ls a{1..3}", "'a{1..3}'", "single quotes"),
        ("ls {a','b}", "{a", "single quotes"),
        ("ls }", "'}'", "single quotes"),
        ("ls a}", "'a}'", "single quotes"),
        ("ls \\{a,b}", "a,b}", "single quotes"),
        ("ls =cat", "'=cat'", "single quotes"),
        ("ls #x", "'#x'", "comment"),
        ("ls; # x", "'#'", "comment"),
        ("ls > x", "character 4", "redirects"),
        ("ls 2>&1", "character 5", "stderr both come back"),
        ("cat <x", "'<'", "input"),
        ("cat <<E", "'<'", "input"),
        ("cat <(ls)", "'<'", "input"),
        ("ls & cat", "'&'", "only | && || and ;"),
        ("ls |& cat", "'|'", "only | && || and ;"),
        ("ls ;; cat", "';'", "only | && || and ;"),
        ("ls ;& cat", "';'", "only | && || and ;"),
        ("ls &&& cat", "'&'", "only | && || and ;"),
        ("ls ||| cat", "'|'", "only | && || and ;"),
        ("ls &\\\n& cat", "'&'", "only | && || and ;"),
        ("(ls)", "'('", "subshell"),
        ("ls )", "')'", "subshell"),
        ("ls() ls", "'('", "function"),
        ("ls\ncat", "line break", "; or &&"),
        ("ls\n", "line break", "; or &&"),
        ("ls\r\n", "'\\r'", "leave it out"),
        ("ls '\x01'", "'\\x01'", "leave it out"),
        ("ls '\x7f'", "'\\x7f'", "leave it out"),
        ("ls '\x85'", "'\\x85'", "leave it out"),
        ("ls '\0'", "'\\x00'", "leave it out"),
        ("ls '\ud800'", "'\\ud800'", "leave it out"),
        ("ls\x0bcat", "'\\x0b'", "leave it out"),
        ("ls\u00a0cat", "'\\xa0'", "in quotes"),
        ("ls\u3000cat", "'\\u3000'", "in quotes"),
        ("ls \u200bcat", "'\\u200b'", "in quotes"),
        ("ls \u202ecat", "'\\u202e'", "in quotes"),
        ("ls\u2028cat", "'\\u2028'", "in quotes"),
        ("ls 'a", "character 4", "not closed"),
        ('ls "a\\"', "character 4", "not closed"),
        ("ls a\\", "backslash", "nothing behind it"),
        ("", "no command", ""),
        ("  ", "no command", ""),
        ("\\\n", "no command", ""),
        ("| ls", "before |", "missing"),
        ("ls |", "after |", "missing"),
        ("ls ;", "after ;", "missing"),
        ("ls ; ; cat", "before ;", "missing"),
        ("ls | | cat", "before |", "missing"),
        ("ls |\\\n| cat", "before |", "missing"),
        ("ls && || cat", "before ||", "missing"),
        ("A=b ls", "'A=b'", "assignment"),
        ("A+=b ls", "'A+=b'", "assignment"),
        ("ls; PATH=/tmp cat", "'PATH=/tmp'", "assignment"),
        ("! ls", "'!'", "quote it"),
        ("!ls", "'!ls'", "quote it"),
        ("if ls", "'if'", "quote it"),
        ("i\\\nf ls", "f'", "quote it"),
        ("ls | while", "'while'", "quote it"),
        ("time ls", "'time'", "quote it"),
        ("coproc ls", "'coproc'", "quote it"),
        ("noglob ls", "'noglob'", "quote it"),
        ("- ls", "'-'", "quote it"),
        ("{ ls", "'{'", "quote it"),
        ("ls " + "a" * MOST_CHARACTERS, f"{MOST_CHARACTERS} characters", "input"),
    ],
)  # fmt: skip
def test_what_shells_would_change_is_refused_with_the_part_and_the_way_out(
    line: str, part: str, hint: str
) -> None:
    with pytest.raises(UnreadableError) as raised:
        read(line)
    assert part in str(raised.value)
    assert hint in str(raised.value)
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)


@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"])), min_size=1))
def test_what_was_quoted_is_read_as_it_was(texts: list[str]) -> None:
    assert words(" ".join(quoted(text) for text in texts)) == texts


@given(st.text("ab '\"\\\n|&;$`*~#={}", max_size=12))
def test_line_that_is_read_means_the_same_once_it_is_quoted(line: str) -> None:
    try:
        found = read(line)
    except UnreadableError:
        return
    assert read(found.quoted()) == found
    assert len(found.joins) == len(found.commands) - 1
