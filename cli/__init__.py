"""The console script `ssh-mcp-server`: what it can be told on the command line."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from settings import SettingsError, __version__, exit_for


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; without one, serve MCP."""
    options = _parser().parse_args(arguments)
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
        from cli.serve import serve

        serve(options.transport, options.env_file, options.host, options.port)
    except SettingsError as error:
        exit_for(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssh-mcp-server",
        description="An MCP server that lets an assistant work on your machines over SSH.",
        epilog="Settings are environment variables; the README lists them. Exit status 2: a setting is wrong.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--transport", choices=["stdio", "http", "sse"], default="stdio", help="default: stdio"
    )
    parser.add_argument("--host", help="address that HTTP listens on; default: HTTP_HOST, else 127.0.0.1")
    parser.add_argument("--port", type=_port, help="port of HTTP; default: HTTP_PORT, else 3003")
    parser.add_argument(
        "--env-file",
        type=Path,
        default=os.environ.get("SSH_MCP_ENV_FILE") or None,
        help="file with settings, for those that the environment does not hold",
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="")
    commands.add_parser(
        "demo", help="show every tool at work on a throwaway SSH server; needs no configuration"
    )
    commands.add_parser(
        "secrets",
        help="write a settings file with fresh signing keys; --env-file says where, if not the usual place",
    )
    _add_config(commands)
    return parser


def _add_config(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "config",
        help="show how a client is told of this server, or write it into the client's file",
        description="Show how a client is told of this server. What is to be copied goes to stdout.",
        epilog="Exit status 1: the client's file was left alone, and it was said why. Secrets belong in the settings "
        "file: ssh-mcp-server --env-file FILE config CLIENT names it.",
    )
    parser.add_argument(
        "client", nargs="?", metavar="CLIENT", help="which client; without one all are listed"
    )
    parser.add_argument("--name", default="ssh", help="what the client calls the server; default: ssh")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting, such as SSH_DEFAULT_HOST=web1.example.com; may be given often",
    )
    parser.add_argument(
        "--http", action="store_true", help="connect to PUBLIC_BASE_URL instead of starting it here"
    )
    parser.add_argument(
        "--write", action="store_true", help="write it into the client's file, and keep a backup"
    )
    parser.add_argument(
        "--force", action="store_true", help="with --write: replace another server of that name"
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65_535):
        raise argparse.ArgumentTypeError("give a port from 1 to 65535")
    return int(text)
