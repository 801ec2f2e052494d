"""What a person and ChatGPT do in the last step of docs/deploy.md, as a program for the throwaway machine.

Usage: connector.py FOLDER COMMAND..., where FOLDER holds the `ca.pem` of https://mcp.example.com. A Google of the
tests' own is started first, and the server told of it. Each answer is printed with a NUL behind it.
"""

import asyncio
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from fastmcp import Client
from fastmcp.client.transports import SSETransport

import oauth
from conftest import wait_for
from front import Behind, trust
from oauth import App, Google

URL = "https://mcp.example.com"
SETTINGS = Path("/etc/ssh-mcp-server/env")
PERSON = "you@gmail.com"


def main(folder: Path, lines: list[str]) -> None:
    google = Google(folder)
    with closing(google):
        google.person(PERSON)
        with SETTINGS.open("a") as settings:
            settings.write(f"GOOGLE_DISCOVERY_URL={google.discovery_url}\n")
        subprocess.run(["systemctl", "restart", "ssh-mcp-server"], check=True)
        server = Behind(folder, 3003, {"PUBLIC_BASE_URL": URL}, front=folder)
        trust(server, pytest.MonkeyPatch())
        with oauth.http_from() as http:
            wait_for(lambda: http.get(f"{URL}/health").status_code == 200, 60)
        token = App(server).log_in(PERSON, resource=f"{URL}/sse").access

        async def call() -> None:
            async with Client(SSETransport(f"{URL}/sse", auth=token, verify=server.tls)) as client:
                for line in lines:
                    answer = await client.call_tool("ssh_execute", {"command": line}, raise_on_error=False)
                    texts = [block.text for block in answer.content if block.type == "text"]
                    print("\n".join(texts), end="\0")

        asyncio.run(call())


main(Path(sys.argv[1]), sys.argv[2:])
