"""Proxies on loopback with configurations of their own: in front of our server, or between it and a client."""

import os
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import oauth
from conftest import Server, free_port, program, wait_for
from oauth import Google, Remote, make_remote
from tls import certificates

DEPLOY = Path(__file__).parents[1] / "deploy"

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


def replaced(shipped: str, changes: Mapping[str, str]) -> str:
    """Return a shipped file with the tests' own places; each of the shipped ones must stand in it."""
    for theirs, ours in changes.items():
        assert theirs in shipped, theirs
        shipped = shipped.replace(theirs, ours)
    return shipped


def site_places(folder: Path, http_port: int, https_port: int) -> dict[str, str]:
    """Return what a shipped site of nginx names, and what takes its place: all but the servers behind it."""
    return {
        "listen 80;": f"listen 127.0.0.1:{http_port};",
        "    listen [::]:80;\n": "",
        "listen 443 ssl;": f"listen 127.0.0.1:{https_port} ssl;",
        "    listen [::]:443 ssl;\n": "",
        "return 301 https://mcp.example.com$request_uri": f"return 301 https://localhost:{https_port}$request_uri",
        "server_name mcp.example.com;": "server_name localhost;",
        "/etc/letsencrypt/live/mcp.example.com/fullchain.pem": f"{folder}/cert.pem",
        "/etc/letsencrypt/live/mcp.example.com/privkey.pem": f"{folder}/key.pem",
        "/var/log/nginx/": f"{folder}/",
    }


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
    with _running(command, folder, port):
        yield


@contextmanager
def caddy(folder: Path, config: str, port: int) -> Iterator[None]:
    """Run Caddy with a Caddyfile, until it listens on that port; what it logs to stderr is `output` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Caddyfile").write_text(config)
    command = [program("caddy", "caddy"), "run", "--config", str(folder / "Caddyfile")]
    with _running(command, folder, port):
        yield


@contextmanager
def _running(command: list[str], folder: Path, port: int) -> Iterator[None]:
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, env=os.environ | {"HOME": str(folder)}
        )

    def listens() -> bool:
        assert process.poll() is None, "".join(path.read_text() for path in _logs(folder))
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listens, 60)
        yield
    finally:
        process.terminate()
        process.wait()


def _logs(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.log"), *folder.glob("output")])


@dataclass
class Behind(Remote):
    """A server that is only reached through a proxy with TLS, whose files and logs are in a folder of its own."""

    front: Path = Path()
    http_port: int = 0

    @property
    def url(self) -> str:
        """The server's URL is the proxy's."""
        return self.environment["PUBLIC_BASE_URL"]

    @property
    def https_port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.front / "ca.pem")

    def front_logs(self) -> str:
        return "".join(path.read_text() for path in _logs(self.front))


def trust(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let browsers and applications of a test trust the proxy's CA."""

    def http_from(address: str | None = None, **options: Any) -> httpx.Client:
        transport = httpx.HTTPTransport(
            local_address=address or oauth.own_address(), verify=behind.tls, limits=oauth.KEPT
        )
        return httpx.Client(
            transport=transport, follow_redirects=False, timeout=30, trust_env=False, **options
        )

    monkeypatch.setattr(oauth, "http_from", http_from)


@contextmanager
def behind_nginx(folder: Path, google: Google, sshd: Server) -> Iterator[Behind]:
    """Run a server behind nginx, with the site that ships."""

    def proxy(remote: Behind) -> AbstractContextManager[None]:
        site = (DEPLOY / "nginx" / "ssh-mcp-server.conf").read_text()
        places = site_places(folder, remote.http_port, remote.https_port)
        site = replaced(site, places | {"http://127.0.0.1:3003": f"http://127.0.0.1:{remote.port}"})
        return nginx(folder, site, remote.https_port)

    with _behind(folder, google, sshd, proxy) as remote:
        yield remote


@contextmanager
def behind_caddy(folder: Path, google: Google, sshd: Server) -> Iterator[Behind]:
    """Run a server behind Caddy, with the Caddyfile that ships."""

    def proxy(remote: Behind) -> AbstractContextManager[None]:
        ports = f"http_port {remote.http_port}\n\thttps_port {remote.https_port}"
        places = {
            "{\n\t# who opens": f"{{\n\tadmin off\n\tdefault_bind 127.0.0.1\n\t{ports}\n\t# who opens",
            "\nmcp.example.com {": f"\nlocalhost {{\n\ttls {folder}/cert.pem {folder}/key.pem",
            "reverse_proxy 127.0.0.1:3003": f"reverse_proxy 127.0.0.1:{remote.port}",
        }
        config = replaced((DEPLOY / "Caddyfile").read_text(), places)
        return caddy(folder, config, remote.https_port)

    with _behind(folder, google, sshd, proxy) as remote:
        yield remote


@contextmanager
def _behind(
    folder: Path, google: Google, sshd: Server, proxy: Callable[[Behind], AbstractContextManager[None]]
) -> Iterator[Behind]:
    http_port, https_port = free_port(), free_port()
    certificates(folder)
    plain = make_remote(folder / "remote", google, sshd, PUBLIC_BASE_URL=f"https://localhost:{https_port}")
    remote = Behind(plain.folder, plain.port, plain.environment, front=folder, http_port=http_port)
    with proxy(remote):
        plain.start()
        remote.process = plain.process
        try:
            yield remote
        finally:
            remote.stop()
