"""What calls get from the running server where ALLOWED_COMMANDS or READ_ONLY is set, and how they try to get more."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client

import app
from conftest import SHELLS, Server, nobody_cancels, wait_for
from ssh_commands import Commands
from ssh_errors import RefusedError
from ssh_pool import Pool
from ssh_shells import Task

Serve = Callable[..., Server]
Call = Callable[..., Awaitable[Any]]

REFUSED = {
    "another program": "touch {x}",
    "behind ;": "ls; touch {x}",
    "behind ; in one word": "ls;touch {x}",
    "behind &&": "ls && touch {x}",
    "behind ||": "ls /none || touch {x}",
    "behind a pipe": "ls | touch {x}",
    "before a pipe": "touch {x} | cat",
    "to a shell": "cat /etc/hosts | sh",
    "in the background": "ls & touch {x}",
    "behind a line break": "ls\ntouch {x}",
    "behind CR and line break": "ls\r\ntouch {x}",
    "behind CR": "ls\rtouch {x}",
    "behind a vertical tab": "ls\x0btouch {x}",
    "behind NUL": "ls\0; touch {x}",
    "behind a line separator": "ls\u2028touch {x}",
    "behind NEL": "ls\x85touch {x}",
    "behind a comment that ends": "ls #\ntouch {x}",
    "substituted": "ls $(touch {x})",
    "substituted in double quotes": 'ls "$(touch {x})"',
    "substituted by backquotes": "ls `touch {x}`",
    "substituted by backquotes in double quotes": 'ls "`touch {x}`"',
    "substituted behind two backslashes": 'ls "\\\\$(touch {x})"',
    "substituted in arithmetic": "ls $((a[$(touch {x})]))",
    "substituted in a parameter": "ls ${{a:-$(touch {x})}}",
    "substituted in $'...'": "ls $'\\x27' $(touch {x})",
    "quote that $'...' would not close": "ls $'\\'; touch {x} #'",
    "process substitution": "ls <(touch {x})",
    "process substitution of zsh": "ls =(touch {x})",
    "redirection": "ls >{x}",
    "redirection that appends": "ls >>{x}",
    "redirection of stderr": "ls /none 2>{x}",
    "redirection that clobbers": "ls >|{x}",
    "redirection of both": "ls &>{x}",
    "redirection before the command": ">{x} ls",
    "redirection alone": ">{x}",
    "here-document with a substitution": "cat <<E\n$(touch {x})\nE",
    "here-string with a substitution": "cat <<<$(touch {x})",
    "assignment of PATH": "PATH=/tmp:$PATH ls",
    "assignment of a hook": "GIT_EXTERNAL_DIFF='touch {x}' git log -p --ext-diff",
    "assignment alone": "LD_PRELOAD={x}; ls",
    "assignment by +=": "PATH+=:/tmp ls",
    "assignment of an element": "a[$(touch {x})]=1 ls",
    "subshell": "(touch {x})",
    "group": "{{ touch {x}; }}",
    "group of zsh": "{{touch {x}}}",
    "condition": "if ls; then touch {x}; fi",
    "loop": "for i in a; do touch {x}; done",
    "case": "case a in a) touch {x};; esac",
    "negation": "! touch {x}",
    "time": "time touch {x}",
    "coproc": "coproc touch {x}",
    "function": "ls() {{ touch {x}; }}; ls",
    "function of ksh": "function ls {{ touch {x}; }}; ls",
    "alias": "alias ls='touch {x}'; ls",
    "eval": "eval touch {x}",
    "eval in quotes": "'eval' 'touch {x}'",
    "exec": "exec touch {x}",
    "command": "command touch {x}",
    "trap": "trap 'touch {x}' EXIT; ls",
    "env": "env touch {x}",
    "noglob of zsh": "noglob touch {x}",
    "- of zsh": "- touch {x}",
    "=cmd of zsh": "=touch {x}",
    "history": "!touch {x}",
    "program by its path": "/bin/ls; /bin/touch {x}",
    "program beside": "./ls {x}",
    "path with an allowed end": "../bin/ls",
    "allowed name in one word": "'ls ; touch {x}'",
    "two words of a prefix in one": "'git log' ; touch {x}",
    "option before the subcommand": "git -c alias.log='!touch {x}' log",
    "another subcommand": "git -c core.pager='touch {x}' diff",
    "glob that names a program": "/bin/tou* {x}",
    "braces that make words": "{{ls,{x}}}",
    "braces that make a command": "{{touch,{x}}}",
    "name that is continued": "tou\\\nch {x}",
    "quote that hides a join": "ls 'a' ';' b; touch {x}",
    "operator that is continued": "ls |\\\n| touch {x}",
    "quote that is not closed": "ls 'a; touch {x}",
    "backslash at the end": "ls a\\",
    "full-width semicolon": "ls\uff1btouch {x}",
    "blank of another alphabet": "touch\u3000{x}",
    "bidirectional override": "ls \u202e; touch {x}",
    "case that ends otherwise": "ls ;& touch {x}",
    "pipe of both streams": "ls |& touch {x}",
    "empty command": "ls ;; touch {x}",
    "nothing": " ",
}
"""Command lines that would make a file `{x}`, past a list that allows ls, cat and git log."""

HARMLESS = {
    "bypass by the quoting of fish": "ls 'x\\' '; touch {x} #'",
    "bypass by the quoting of fish, in the middle": "cat -- '\\' '; touch {x} ;' '\\'",
    "quotes in quotes": "ls \"'; touch {x}; '\"",
    "history in quotes, for tcsh": "ls '!!; touch {x}' \"!touch\"",
    "line break in quotes, for tcsh": "ls 'a\n; touch {x}; \n'",
    "substitution in single quotes": "ls '$(touch {x})' '`touch {x}`'",
    "substitution that is escaped": 'ls "\\$(touch {x})" \\`touch\\ {x}\\`',
    "arguments like redirections": "ls '>{x}' \\>{x}",
    "joins in quotes": "ls ';' touch '|' touch '&&' touch \\; touch '&' {x}",
    "octal escapes, for what decodes lines": "ls '\\0047; touch {x}; \\0047' '\\047'",
    "percent, for printf": "ls '%s%n%b' '\\0137'",
    "option that ends options": "ls -- --eval=touch",
    "end of a here-document": "cat /dev/null 'EOF\ntouch {x}\nEOF'",
    "letters that dash uses within": "ls '\u0101\u0102\u0141' 'ā;touch {x}'",
    "braces that fish expands": "ls stash@{{0}} {{}}",
    "caret that redirects in old fish": "ls HEAD^ ^{x}",
    "tail of a word like a comment": "ls a#; ls b#c",
    "many words": "ls " + "-d " * 3000 + "/",
}
"""Command lines that are allowed, and whose words another reader would take for more."""


@pytest.fixture
def environment(sshd: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    for name, value in {
        "SSH_MCP_ENV_FILE": tmp_path / "env",
        "SSH_DEFAULT_HOST": "127.0.0.1",
        "SSH_DEFAULT_PORT": sshd.port,
        "SSH_DEFAULT_USER": "tester",
        "SSH_KEY_PATH": sshd.key,
        "SSH_KNOWN_HOSTS": sshd.known_hosts,
        "SSH_ALLOWED_HOSTS": "*@127.0.0.1:*",
        "XDG_STATE_HOME": tmp_path / "state",
        "ALLOWED_COMMANDS": "ls,cat,git log",
    }.items():
        monkeypatch.setenv(name, str(value))


def with_client(work: Callable[[Call], Awaitable[Any]]) -> Any:
    """Let `work` call tools of the running server, which answers with errors too."""

    async def run() -> Any:
        async with Client(app.mcp) as client:

            async def call(tool: str, **arguments: Any) -> Any:
                return await client.call_tool(tool, arguments, raise_on_error=False)

            return await work(call)

    return asyncio.run(run())


def call_once(tool: str, **arguments: Any) -> Any:
    async def work(call: Call) -> Any:
        return await call(tool, **arguments)

    return with_client(work)


def text(result: Any) -> str:
    return str(result.content[0].text)


def tools() -> set[str]:
    async def run() -> set[str]:
        async with Client(app.mcp) as client:
            return {tool.name for tool in await client.list_tools()}

    return asyncio.run(run())


@pytest.mark.parametrize("account", SHELLS)
def test_no_command_line_makes_a_file(environment: None, sshd: Server, account: str, tmp_path: Path) -> None:
    canary = tmp_path / "x"

    async def work(call: Call) -> None:
        for idea, line in REFUSED.items():
            result = await call("ssh_execute", command=line.format(x=canary), user=account)
            assert result.is_error, f"{idea}: {text(result)}"
            assert "ALLOWED_COMMANDS" in text(result), f"{idea}: {text(result)}"
        for idea, line in HARMLESS.items():
            result = await call("ssh_execute", command=line.format(x=canary), user=account)
            assert not result.is_error, f"{idea}: {text(result)}"
            assert result.structured_content["status"] == "exited", idea
            assert not canary.exists(), idea

    with_client(work)
    assert not canary.exists()


ELSEWHERE: dict[str, dict[str, Any]] = {
    "env": {"command": "ls", "env": {"PATH": "{x}"}},
    "background": {"command": "touch {x}", "background": True},
    "detached": {"command": "touch {x}", "timeout": 0.1, "on_timeout": "kill"},
    "cwd that closes a quote": {"command": "ls", "cwd": "/'; touch {x}; '"},
    "cwd with a substitution": {"command": "ls", "cwd": "$(touch {x})"},
    "cwd with backquotes": {"command": "ls", "cwd": "~/`touch {x}`"},
    "cwd with a line break": {"command": "ls", "cwd": "/\ntouch {x}\n"},
    "cwd of an account": {"command": "ls", "cwd": "~$(touch {x})"},
    "host": {"command": "ls", "host": "-oProxyCommand=touch {x}"},
    "user": {"command": "ls", "user": "a;touch {x}"},
    "job of one's own making": {"job_id": "touch {x}"},
    "job and command": {"job_id": "x", "command": "touch {x}"},
    "signal for a new command": {"command": "touch {x}", "signal": "TERM"},
}
"""Other arguments of ssh_execute that could carry a command. All are refused."""


def test_no_other_argument_makes_a_file(environment: None, tmp_path: Path) -> None:
    canary = tmp_path / "x"

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        return value.format(x=canary) if isinstance(value, str) else value

    async def work(call: Call) -> None:
        for idea, arguments in ELSEWHERE.items():
            result = await call("ssh_execute", **filled(arguments))
            assert result.is_error, f"{idea}: {text(result)}"

    with_client(work)
    assert not canary.exists()


@pytest.mark.parametrize("account", SHELLS)
def test_input_is_data_and_cwd_a_folder(
    environment: None, sshd: Server, account: str, tmp_path: Path
) -> None:
    canary, folder = tmp_path / "x", tmp_path / "it's a $(folder)"
    folder.mkdir()
    (folder / "inside").touch()
    data = f"touch {canary}\neval 'touch {canary}'\n\\0047; touch {canary}\n"

    async def work(call: Call) -> None:
        for _ in range(2):  # where it is met, and on a shell started ahead
            read = await call("ssh_execute", command="cat", input=data, user=account)
            assert read.structured_content["stdout"] == data
            unread = await call("ssh_execute", command="ls", input=data, cwd=str(folder), user=account)
            assert unread.structured_content["stdout"] == "inside\n"

    with_client(work)
    assert not canary.exists()


RC_FILES = {  # `set` is what a shell that reads a line would begin with
    "tester": (
        ".bashrc",
        "ls() { touch CANARY; }; alias ls='touch CANARY'; set() { touch CANARY; }; shopt -s expand_aliases extglob\n",
    ),
    "zsh": (
        ".zshenv",
        "ls() { touch CANARY; }; set() { touch CANARY; }; alias -g -- '-d'='; touch CANARY'; setopt rcquotes\n",
    ),
    "fish": (".config/fish/config.fish", "function ls; touch CANARY; end\n"),
    "tcsh": (".cshrc", "alias ls touch CANARY\n"),
}


@pytest.mark.parametrize("account", RC_FILES)
def test_rc_file_of_the_login_shell_has_no_say_in_what_a_word_means(
    own_sshd: Serve, account: str, tmp_path: Path
) -> None:
    server = own_sshd()
    canary = tmp_path / "x"
    name, content = RC_FILES[account]
    file = server.folder / account / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content.replace("CANARY", str(canary)))
    settings = server.settings(allowed_commands="ls")
    pool = Pool(settings)
    for _ in range(2):
        task = Task.of("'ls' '-d' '/' ; 'ls' '-d' '/'")
        result = Commands(pool, settings).run_task(
            server.account(account), task, timeout=30, cancelled=nobody_cancels
        )
        assert (result.stdout, result.exit_code) == ("/\n/\n", 0)
    pool.close()
    assert not canary.exists()


def test_shell_is_started_ahead_of_what_was_approved(own_sshd: Serve) -> None:
    server = own_sshd()
    (server.home / ".bashrc").write_text("echo >> ~/marks\n")
    marks = server.home / "marks"
    settings = server.settings(allowed_commands="cat")
    pool = Pool(settings)
    commands = Commands(pool, settings)
    for ahead in (2, 3):
        commands.run_task(server.target, Task.of("'cat'"), timeout=30, cancelled=nobody_cancels)
        wait_for(lambda least=ahead: len(marks.read_text()) >= least)  # type: ignore[misc]
    pool.close()


def test_account_that_takes_only_plain_commands_is_refused(own_sshd: Serve) -> None:
    server = own_sshd()
    keys = server.folder / "authorized_keys"
    keys.write_text('command="echo forced" ' + keys.read_text())
    settings = server.settings(allowed_commands="ls")
    pool = Pool(settings)
    commands = Commands(pool, settings)
    for _ in range(2):  # where it is met, and where it is known
        with pytest.raises(RefusedError, match=r"ALLOWED_COMMANDS .*/bin/sh"):
            commands.run_task(server.target, Task.of("'ls'"), timeout=30, cancelled=nobody_cancels)
    pool.close()


def test_jobs_go_on_where_a_list_is_set(environment: None, sshd: Server, tmp_path: Path) -> None:
    fifo = tmp_path / "it's a fifo"
    os.mkfifo(fifo)

    async def work(call: Call) -> None:
        started = await call("ssh_execute", command=f'cat "{fifo}"', background=True, user="fish")
        assert not started.is_error, text(started)
        job = started.structured_content["job_id"]
        fifo.write_text("words\n")
        ended = await call("ssh_execute", job_id=job)
        assert not ended.is_error, text(ended)
        assert (ended.structured_content["status"], ended.structured_content["stdout"]) == (
            "exited",
            "words\n",
        )
        await call("ssh_execute", command="ls /")  # connects
        waits = await call("ssh_execute", command=f'cat "{fifo}"', timeout=3)
        assert not waits.is_error, text(waits)
        job = waits.structured_content["job_id"]
        ended = await call("ssh_execute", job_id=job, signal="TERM")
        assert not ended.is_error, text(ended)
        assert ended.structured_content["status"] in ("killed", "exited")
        assert ended.structured_content["exit_code"] != 0

    with_client(work)


def test_job_where_calls_may_go_no_more_is_refused(
    environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = call_once("ssh_execute", command="ls /", background=True, user="dash")
    job = started.structured_content["job_id"]
    monkeypatch.setenv("SSH_ALLOWED_HOSTS", "tester@127.0.0.1:*")
    refused = call_once("ssh_execute", job_id=job, signal="TERM")
    assert refused.is_error
    assert "SSH_ALLOWED_HOSTS" in text(refused)


def write_and_edit(folder: Path) -> list[str]:
    """Try to write and to edit a file, and return the errors."""

    async def work(call: Call) -> list[str]:
        path = str(folder / "file")
        results = [
            await call("ssh_write_file", path=path, content="x"),
            await call(
                "ssh_edit_file", path=path, edits=[{"operation": "insert", "start_line": 0, "new_text": "x"}]
            ),
        ]
        assert all(result.is_error for result in results)
        return [text(result) for result in results]

    errors: list[str] = with_client(work)
    return errors


def test_read_only_hides_and_refuses_what_writes_and_runs(
    environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("READ_ONLY", "true")
    monkeypatch.setenv("ALLOWED_COMMANDS", "")
    (tmp_path / "file").write_text("old\n")
    assert tools().isdisjoint({"ssh_write_file", "ssh_edit_file"})
    assert len(tools()) == 5
    for error in write_and_edit(tmp_path):
        assert "READ_ONLY" in error
    for arguments in ({"command": "ls"}, {"job_id": "x"}):
        result = call_once("ssh_execute", **arguments)
        assert result.is_error
        assert "READ_ONLY" in text(result)
    assert not call_once("ssh_read_file", path=str(tmp_path / "file")).is_error
    assert (tmp_path / "file").read_text() == "old\n"


def test_read_only_lets_run_what_is_listed(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READ_ONLY", "true")
    assert not call_once("ssh_execute", command="ls /").is_error
    assert call_once("ssh_execute", command="touch x").is_error


def test_list_of_commands_alone_hides_and_refuses_what_writes(environment: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old\n")
    assert tools().isdisjoint({"ssh_write_file", "ssh_edit_file"})
    for error in write_and_edit(tmp_path):
        assert "ALLOWED_COMMANDS" in error
        assert "ALLOWED_PATHS" in error
    assert (tmp_path / "file").read_text() == "old\n"


def test_nothing_is_hidden_without_limits(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOWED_COMMANDS", "")
    assert len(tools()) == 7


def test_tools_can_be_listed_before_the_server_runs() -> None:
    assert len(asyncio.run(app.mcp.list_tools())) == 7
