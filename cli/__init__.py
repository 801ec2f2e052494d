"""The console script `ssh-mcp-server`: what it can be told on the command line.

Each command imports what it needs once it is known to be the one; `--help` and `--version` need nothing.
"""

import argparse
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cli import completion
from version import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; without one, serve MCP."""
    parser = _parser()
    completion.answer(parser)
    options = parser.parse_args(arguments)
    from settings import SettingsError, exit_for

    try:
        if options.command == "demo":
            from cli.demo import demo

            raise SystemExit(demo())
        if options.command == "secrets":
            from cli import secrets

            secrets.write(options.env_file)
            return
        if options.command == "config":
            from cli import config

            wanted = config.Wanted(options.name, tuple(options.env), options.env_file, options.http)
            raise SystemExit(config.config(options.client, wanted, write=options.write, force=options.force))
        if options.command == "completion":
            completion.show(options.shell)
            return
        if options.command == "check":
            from cli import check

            asked = check.Asked(
                tuple(options.hosts), options.env_file, options.http, options.host, options.port
            )
            raise SystemExit(check.check(asked, as_json=options.json))
        if options.command == "worker":
            from cli.worker import worker

            raise SystemExit(worker(options.env_file, options.grace))
        if options.command == "audit":
            from cli import audit

            raise SystemExit(audit.run(options))
        from cli.serve import serve

        serve(
            options.transport, options.env_file, options.host, options.port, runs_tasks=not options.no_worker
        )
    except SettingsError as error:
        exit_for(error)


class _Parser(argparse.ArgumentParser):
    """A parser whose list of commands begins without an empty line."""

    def format_help(self) -> str:
        return super().format_help().replace("commands:\n  \n", "commands:\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="ssh-mcp-server",
        description="An MCP server that lets an assistant work on your machines over SSH. Without a command "
        "it serves MCP.",
        epilog="Settings are environment variables; the README lists them. Exit status 2: a setting, or this command "
        "line, is wrong. Each command has a --help of its own.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--transport", choices=["stdio", "http", "sse"], default="stdio", help="default: stdio"
    )
    parser.add_argument("--host", help="address that HTTP listens on; default: HTTP_HOST, else 127.0.0.1")
    parser.add_argument("--port", type=_port, help="port of HTTP; default: HTTP_PORT, else 3003")
    parser.add_argument(
        "--no-worker", action="store_true", help="leave tasks (TASKS_URL) to `ssh-mcp-server worker`"
    )
    parser.add_argument(
        "--env-file",
        type=Path,
        metavar="FILE",
        default=os.environ.get("SSH_MCP_ENV_FILE") or None,
        help="file with settings, for those that the environment does not hold",
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="")
    commands.add_parser(
        "demo",
        help="show every tool at work on a throwaway SSH server",
        description="Show every tool at work on a throwaway SSH server. It needs no configuration, and leaves nothing "
        "behind.",
        epilog="Exit status 1: an answer was not as expected.",
    )
    commands.add_parser(
        "secrets",
        help="write a settings file with fresh signing keys",
        description="Write a settings file with fresh signing keys, never over one that is there. Only you may "
        "read it.",
        epilog="--env-file before the command says where, if not in the usual place.",
    )
    _add_check(commands)
    _add_config(commands)
    _add_audit(commands)
    _add_completion(commands)
    _add_worker(commands)
    return parser


def _add_worker(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "worker",
        help="run the tasks of servers that share TASKS_URL, and nothing else",
        description="Run the tasks of servers that share TASKS_URL and SESSION_SECRET, and nothing else. On SIGTERM it "
        "takes no more and lets go what runs, which another worker goes on waiting for.",
        epilog="Exit status: 0 when it was told to stop, 1 when it cannot go on, 2 when a setting is wrong. --env-file "
        "stands before the command.",
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=10,
        metavar="SECONDS",
        help="how long it may take to stop; default: 10",
    )


def _add_check(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "check",
        help="say what is wrong with a configuration, and what would mend it",
        description="Read the settings as the server would, do what it would do, and say what is wrong. Nothing is "
        "changed on any host.",
        epilog="Exit status: 0 nothing is wrong, 1 something is, 2 the settings do not load. --env-file, --host "
        "and --port stand before the command.",
    )
    hosts = parser.add_argument(
        "hosts",
        nargs="*",
        metavar="HOST",
        help="further targets, as [user@]host[:port], beside the default one",
    )
    completion.offer(hosts, completion.hosts)
    parser.add_argument(
        "--http", action="store_true", help="check HTTP and the login as well, even where they are not set up"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def _add_config(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "config",
        help="show how a client is told of this server, or write it into the client's file",
        description="Show how a client is told of this server. What is to be copied goes to stdout.",
        epilog="Exit status 1: the client's file was left alone, and it was said why. Secrets belong in the settings "
        "file, which --env-file before the command names.",
    )
    client = parser.add_argument(
        "client", nargs="?", metavar="CLIENT", help="which client; without one all are listed"
    )
    completion.offer(client, completion.clients)
    parser.add_argument("--name", default="ssh", help="what the client calls the server; default: ssh")
    variable = parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting, such as SSH_DEFAULT_HOST=web1.example.com; may be given often",
    )
    completion.offer(variable, completion.variables)
    parser.add_argument(
        "--http", action="store_true", help="connect to PUBLIC_BASE_URL instead of starting it here"
    )
    parser.add_argument(
        "--write", action="store_true", help="write it into the client's file, and keep a backup"
    )
    parser.add_argument(
        "--force", action="store_true", help="with --write: replace another server of that name"
    )


def _add_audit(commands: "argparse._SubParsersAction[_Parser]") -> None:
    audit = commands.add_parser(
        "audit", help="check an audit trail, or show it", description="Check an audit trail, or show it."
    )
    actions = audit.add_subparsers(dest="action", title="commands", metavar="", required=True)
    verify = actions.add_parser(
        "verify",
        help="say whether a trail is as it was written",
        description="Say whether a record of an audit trail was altered, removed, moved or put in.",
        epilog="Exit status: 0 if none was, 1 if one was, 2 when a file cannot be read. Without --key whoever can "
        "write the files may have made the whole trail anew. That its end was cut off is seen with --head alone.",
    )
    verify.add_argument(
        "--key",
        action="append",
        default=[],
        help="the trail's public key, or a file that holds it; `ssh-keygen -y -f .NAME.key` beside the trail prints "
        "it; may be given several times",
    )
    verify.add_argument(
        "--head", metavar="HASH", help="a hash that an earlier check printed: that record must still be there"
    )
    show = actions.add_parser(
        "show", help="show a trail for people to read", description="Show an audit trail for people to read."
    )
    show.add_argument("--tool", default="*", help="only calls of this tool, such as ssh_execute")
    show.add_argument("--target", default="*", help="only this target, or a part of it, such as web1")
    show.add_argument("--identity", default="*", help="only this caller, or a part, such as @example.com")
    show.add_argument(
        "--since",
        type=_time,
        metavar="TIME",
        default="0001-01-01",
        help="only from then on, such as 2026-11-25 or 2026-11-25T14:00Z",
    )
    for action in (verify, show):
        action.add_argument("files", nargs="+", type=Path, metavar="FILE", help="in any order; .gz too")


def _add_completion(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "completion",
        help="print a script that makes a shell complete this command line",
        description="Print a script that makes a shell complete this command line.",
        epilog='In ~/.bashrc:                  eval "$(ssh-mcp-server completion bash)"\n'
        'In ~/.zshrc, after compinit:   eval "$(ssh-mcp-server completion zsh)"\n'
        "In ~/.config/fish/config.fish: ssh-mcp-server completion fish | source",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=completion.SHELLS, metavar="SHELL", help="bash, zsh or fish")


def _time(text: str) -> str:
    """Return a time as audit records hold it; one without a zone is UTC."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("give a time such as 2026-11-25 or 2026-11-25T14:00Z") from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC).isoformat()[:19]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("give seconds, from 0.1 to 3600")
    return seconds


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65_535):
        raise argparse.ArgumentTypeError("give a port from 1 to 65535")
    return int(text)
