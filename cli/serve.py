"""Serving MCP from the console script."""

import os
from pathlib import Path
from typing import Literal


def serve(
    transport: Literal["stdio", "http", "sse"],
    env_file: Path | None,
    host: str | None,
    port: int | None,
    *,
    runs_tasks: bool = True,
) -> None:
    """Serve until the client goes away or the process is told to stop.

    `host` and `port` are where HTTP listens, if not where the settings say. Without `runs_tasks` only workers run
    tasks.
    """
    if env_file is not None:
        os.environ["SSH_MCP_ENV_FILE"] = str(env_file)
    os.environ.setdefault("FASTMCP_ENV_FILE", os.devnull)  # else FastMCP reads the working directory's .env
    from app import mcp

    mcp.runs_tasks = runs_tasks
    if transport == "stdio":
        mcp.run()
    else:
        mcp.run(transport, host=host, port=port)
