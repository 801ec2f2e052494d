"""nginx on loopback, with a configuration of its own: in front of our server, or between it and a client."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import program, wait_for

# gzip is on, as in Debian's own nginx.conf
_AROUND = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
{user}
events {{}}
http {{
    access_log off;
    gzip on;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{site}
}}
"""


@contextmanager
def nginx(folder: Path, site: str, port: int) -> Iterator[None]:
    """Run nginx with what a site file holds, until it listens on that port; its log is `error.log` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nginx.conf"
    user = f"user {folder.owner()};" if folder.owner() == "root" else ""
    config.write_text(_AROUND.format(folder=folder, user=user, site=site))
    command = [
        program("nginx", "nginx"),
        "-p",
        str(folder),
        "-e",
        str(folder / "error.log"),
        "-c",
        str(config),
    ]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)

    def listens() -> bool:
        assert process.poll() is None, (folder / "output").read_text() + (folder / "error.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listens)
        yield
    finally:
        process.terminate()
        process.wait()
