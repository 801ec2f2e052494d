"""Serving MCP from the console script."""

import os
from pathlib import Path
from typing import Literal

from settings import SettingsError


def serve(transport: Literal["stdio", "http", "sse"], env_file: Path | None) -> None:
    """Serve until the client goes away or the process is told to stop. Raises SettingsError."""
    if transport != "stdio":
        raise SettingsError(
            f"--transport {transport} needs a login (OAuth), which this version does not have; use stdio"
        )
    if env_file is not None:
        os.environ["SSH_MCP_ENV_FILE"] = str(env_file)
    os.environ.setdefault("FASTMCP_ENV_FILE", os.devnull)  # else FastMCP reads the working directory's .env
    from app import mcp

    mcp.run()
