"""From a wire to a logged-in connection: algorithms, key exchange, host key, login (RFC 4253, RFC 4252).

Nothing but the key exchange is sent before the host key was verified. Host keys are asked for in the order of what is
known; what the SSH config says of algorithms is applied to what Paramiko has.
"""

import time
from dataclasses import replace

import paramiko

from settings import Target
from ssh_errors import LoginError, NoAnswerError, UnreachableError
from ssh_host_keys import HostKey
from ssh_hosts import Host
from ssh_keys import Keys
from ssh_known_hosts import UnknownHostKeyError
from ssh_session import SOCKET_ERRORS
from ssh_transport import Carrier, Connection, Transport, Wire


class HungUpError(Exception):
    """The server closed the connection before it said who it is."""


def log_in(host: Host, wire: Wire, carrier: Carrier | None, keys: Keys, deadline: float) -> Connection:
    """Make a logged-in connection of a wire: key exchange, host key, login, by `deadline` (monotonic seconds).

    Takes the wire and the carrier, which are closed when it fails. Raises UnreachableError and its kinds, HungUpError.
    """
    transport = Transport.over(wire)
    try:
        host_key = _exchange_keys(host, transport, deadline)
        _authenticate(host, transport, keys, deadline)
        return Connection(host, transport, wire, carrier, host_key)
    except BaseException:
        transport.packetizer.complete_handshake()  # ends its timer, a thread that would hold up the process's end
        transport.close()
        wire.close()
        if carrier is not None:
            carrier.close()
        raise


def _choose_algorithms(host: Host, transport: Transport) -> None:
    """Offer what the SSH config wants of what there is. Raises UnreachableError when nothing is left."""
    offered = transport.offer(host.config, host.known_hosts.algorithms(host.known_as))
    for keyword, names in offered.items():
        if not names:
            raise UnreachableError(
                f"{host}: nothing that can be used here is left of {keyword} in the SSH config; add to it"
            )


def _exchange_keys(host: Host, transport: Transport, deadline: float) -> HostKey:
    """Exchange keys, verify the host's key and return it."""
    target = host.target
    _choose_algorithms(host, transport)
    left = max(0.1, deadline - time.monotonic())
    transport.banner_timeout = transport.handshake_timeout = left
    try:
        transport.start_client(timeout=left)
    except SOCKET_ERRORS as error:
        if not transport.remote_version:
            raise _no_banner(target, transport.sock) from None
        if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
            raise UnreachableError(
                f"{target} offers no key exchange, cipher or host key type that is still safe; update its SSH server"
            ) from None
        raise UnreachableError(
            f"{target}: the SSH key exchange failed; try again, or see its sshd log"
        ) from None
    if not transport.initial_kex_done:
        raise _silent(target)
    shown = transport.get_remote_server_key()
    key = HostKey(shown.get_name(), shown.asbytes())
    try:
        host.known_hosts.verify(host.known_as, key, shown.public_blob.key_blob if shown.public_blob else None)
    except UnknownHostKeyError:
        if not host.accepts_new:
            raise
        host.known_hosts.add(host.known_as, key)
        return replace(key, is_new=True)
    return key


def _no_banner(target: Target, wire: Wire) -> Exception:
    if wire.hung_up:
        return HungUpError()
    if wire.heard_at:
        return UnreachableError(f"{target}: what answers there is no SSH server; check the port")
    return _silent(target)


def _silent(target: Target) -> NoAnswerError:
    return NoAnswerError(f"{target} accepts connections but does not answer; is its SSH server overloaded?")


def _authenticate(host: Host, transport: Transport, keys: Keys, deadline: float) -> None:
    target = host.target
    tried: list[str] = []
    with keys.offered(host.config, is_default=host.is_default, deadline=deadline) as offered:
        for name, key in offered:
            transport.auth_timeout = max(0.1, deadline - time.monotonic())
            try:
                if not transport.auth_publickey(target.user, key):
                    return
                raise LoginError(
                    f"{target} asks for more than a key (a second factor); this server can only show keys"
                )
            except paramiko.BadAuthenticationType:
                raise LoginError(
                    f"{target} takes no key logins; set PubkeyAuthentication yes in its sshd_config"
                ) from None
            except SOCKET_ERRORS:
                if offered.agent.is_silent:
                    raise LoginError(
                        f"the SSH agent did not sign for {target} with {name} in time; answer what it asks, or start "
                        "it anew"
                    ) from None
                gone = transport.sock.hung_up or not transport.is_active()
                if gone and not tried:  # else it may have had enough of keys (MaxAuthTries)
                    raise UnreachableError(
                        f"{target}: the connection went away during the login; try again, or see its sshd log"
                    ) from None
                tried.append(name)
            if not transport.is_active():
                break
    if time.monotonic() >= deadline:
        raise NoAnswerError(f"{target} does not answer the login; is its SSH server overloaded?")
    raise LoginError(keys.advice(target, tried, offered.unusable))
