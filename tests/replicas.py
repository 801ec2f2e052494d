"""Servers with the same settings on one Redis, as processes on loopback, by themselves or behind one nginx."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from conftest import Server, free_port
from front import DEPLOY, Behind, nginx, replaced, site_places
from oauth import Google, Remote, make_remote
from tls import certificates

SITE = DEPLOY / "nginx" / "ssh-mcp-server-replicas.conf"


@contextmanager
def running_replicas(
    folder: Path, google: Google, sshd: Server, count: int, arguments: Sequence[str] = (), **changes: str
) -> Iterator[list[Remote]]:
    """Run that many servers; the changes, STATE_URL among them, are environment variables of each."""
    first = make_remote(folder / "1", google, sshd)
    first.environment |= changes
    remotes = [first]
    for number in range(2, count + 1):
        another = make_remote(folder / str(number), google, sshd)
        own = {name: another.environment[name] for name in ("HOME", "SSH_MCP_ENV_FILE")}
        another.environment = first.environment | own
        remotes.append(another)
    with ExitStack() as ending, ThreadPoolExecutor() as starting:
        for remote in remotes:
            remote.arguments += arguments
            ending.callback(remote.stop)
        list(starting.map(Remote.start, remotes))
        yield remotes


@dataclass
class Replicated(Behind):
    """Replicas that are only reached through one nginx."""

    replicas: tuple[Remote, ...] = ()

    def seen(self, line: str) -> Counter[int]:
        """Return how often each replica answered a request like that, by its log."""
        for replica in self.replicas:
            replica.settle_log()
        return Counter({replica.port: replica.log().count(f" {line} ") for replica in self.replicas})


@contextmanager
def replicas_behind_nginx(
    folder: Path, google: Google, sshd: Server, arguments: Sequence[str] = (), **changes: str
) -> Iterator[Replicated]:
    """Run three servers behind nginx, with the site that ships for replicas."""
    http_port, https_port = free_port(), free_port()
    certificates(folder)
    changes["PUBLIC_BASE_URL"] = f"https://localhost:{https_port}"
    with running_replicas(folder, google, sshd, 3, arguments, **changes) as replicas:
        places = site_places(folder, http_port, https_port)
        for number, replica in enumerate(replicas, 11):
            places[f"10.0.0.{number}:3003"] = f"127.0.0.1:{replica.port}"
            places[rf"10\.0\.0\.{number}:3003"] = rf"127\.0\.0\.1:{replica.port}"
        with nginx(folder, replaced(SITE.read_text(), places), https_port):
            environment = replicas[0].environment
            yield Replicated(folder, https_port, environment, front=folder, replicas=tuple(replicas))
