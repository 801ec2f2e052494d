"""The way to a target: a TCP connection, a ProxyCommand, or over jump hosts that are each verified and logged in to.

Invariants:

- Each jump host is known by its own host key, and logged in to with its own keys, as its entry in the SSH config says.
- A connection owns what it runs over: the connections to its jump hosts, or the process, end with it.
- One deadline, the target's, covers the whole way.
"""

import time

from settings import Target
from ssh_config_values import ADDRESS_FAMILIES, Hop
from ssh_dial import dial
from ssh_errors import ConfigError, NoAnswerError, UnreachableError
from ssh_hosts import Host, Hosts
from ssh_keys import Keys
from ssh_local import Proxy
from ssh_login import HungUpError, log_in
from ssh_transport import Connection, SocketWire, jittered, tcp_wire

_ENOUGH_SECONDS = 1.0


def connect(target: Target, hosts: Hosts, keys: Keys) -> Connection:
    """Open a connection: name look-up, TCP (`ssh_dial`) or what the SSH config says, key exchange, host key, login.

    Takes at most ConnectTimeout or else `SSH_CONNECT_TIMEOUT` seconds. Raises
    ConfigError, UnreachableError and its kinds: HostKeyError, LoginError, NoAnswerError. Thread-safe.
    """
    host = hosts.host(target)
    return _Way(hosts, keys, time.monotonic() + host.connect_seconds).to(host)


class _Way:
    """Connecting by one deadline (monotonic seconds). Used by one thread."""

    def __init__(self, hosts: Hosts, keys: Keys, deadline: float) -> None:
        self._hosts = hosts
        self._keys = keys
        self._deadline = deadline
        self._passed: set[Target] = set()

    def to(self, host: Host) -> Connection:
        """Connect to a host as its entry in the SSH config says."""
        if host.config.proxy_jump:
            return self._over(self._jump(host), host)
        if host.config.proxy_command:
            return self._by_command(host, host.config.proxy_command)
        return self._directly(host)

    def _directly(self, host: Host) -> Connection:
        """Connect by TCP. A server that hangs up at once (MaxStartups drops log-ins at random) is tried again.

        The last try may have too little time left; what the server did before is told then.
        """
        pause, hung_up = 0.05, False
        family = ADDRESS_FAMILIES[host.config.address_family]
        while True:
            is_late = self._deadline - time.monotonic() < _ENOUGH_SECONDS
            try:
                wire = tcp_wire(dial(host.target, self._deadline, host=host.config.hostname, family=family))
                return log_in(host, wire, None, self._keys, self._deadline)
            except HungUpError:
                hung_up = True
            except NoAnswerError:
                if not (hung_up and is_late):
                    raise
            if time.monotonic() + pause > self._deadline:
                raise UnreachableError(
                    f"{host} hangs up before the SSH key exchange; is this an SSH server, and does it take "
                    "more log-ins (MaxStartups)?"
                )
            time.sleep(jittered(pause))
            pause = min(2 * pause, 1.0)

    def _by_command(self, host: Host, command: str) -> Connection:
        proxy = Proxy(command)
        wire = SocketWire(fileno=proxy.socket.detach())
        try:
            return log_in(host, wire, proxy, self._keys, self._deadline)
        except HungUpError:
            raise UnreachableError(
                f"{host}: its ProxyCommand ended before the SSH key exchange: {proxy.last_words()}"
            ) from None

    def _jump(self, host: Host) -> Connection:
        """Connect to a host's jump hosts: to the first in its own way, to each other over the one before."""
        first, *others = [self._passing(host, hop) for hop in host.config.proxy_jump]
        try:
            connection = self.to(first)
            for jump_host in others:
                connection = self._over(connection, jump_host)
        except UnreachableError as error:
            raise type(error)(f"on the way to {host.target}: {error}") from None
        return connection

    def _passing(self, host: Host, hop: Hop) -> Host:
        jump_host = self._hosts.jump_host(hop)
        place = Target(jump_host.target.user, jump_host.config.hostname, jump_host.target.port)
        if place in self._passed:
            raise ConfigError(
                f"SSH_CONFIG: the jump hosts of {host} lead in a circle: {hop.host} comes twice"
            )
        self._passed.add(place)
        return jump_host

    def _over(self, jump: Connection, host: Host) -> Connection:
        try:
            left = self._deadline - time.monotonic()
            wire = jump.open_passage(host.config.hostname, host.target.port, left)
        except BaseException:
            jump.close()
            raise
        try:
            return log_in(host, wire, jump, self._keys, self._deadline)
        except HungUpError:
            raise UnreachableError(
                f"{host} hangs up before the SSH key exchange, over the jump host {jump.target}; is this an SSH server?"
            ) from None
