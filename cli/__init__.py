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
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65_535):
        raise argparse.ArgumentTypeError("give a port from 1 to 65535")
    return int(text)
