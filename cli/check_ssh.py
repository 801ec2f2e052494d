"""What `check` says of a target: the way there, who it is, the login, and what the server would do over it.

The rooms that connect for the server connect here, so what they say is what the server would meet. Nothing is written
here or there: a host key that `accept-new` would record is noted in memory, and what runs on the target only reads.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

import paramiko

from cli.findings import Problem, Step, Verdict, error, of_sentence, ok, skipped, warning
from settings import Settings, Target
from ssh_commands import Commands
from ssh_config_values import ADDRESS_FAMILIES
from ssh_dial import dial, look_up
from ssh_errors import ArgumentError, FileError, LoginError, RefusedError, SSHError
from ssh_files import Files
from ssh_host_keys import HostKey
from ssh_hosts import Host, Hosts
from ssh_keys import Keys, agent_at
from ssh_known_hosts import KnownAs, KnownHosts
from ssh_policy import AllowedPaths, Reach, split_port
from ssh_pool import Pool
from ssh_route import connect
from ssh_session import Session
from ssh_sftp import SFTP, NoSFTPError
from ssh_sftp_packets import StatusError
from ssh_transport import Connection, SessionRefusedError

_ANSWER_SECONDS = 15.0
_SESSIONS = 10
_FEW_SESSIONS = 4
_RSA_BITS = 2048
_SLOW_SHELL_SECONDS = 1.0
_CLOCK_SECONDS = 30.0
_LOOKS = 5
_WARM_SECONDS = 5.0


def target_steps(check: "TargetCheck") -> list[Step]:
    """Return the steps for one target."""
    reached = ("target", "SSH config")
    return [
        Step("target", check.target_allowed, "add it to SSH_ALLOWED_HOSTS"),
        Step("SSH config", check.config, "correct the file, or name another with SSH_CONFIG", ("target",)),
        Step("agent", check.agent, "run: ssh-add", reached),
        Step("key", check.key, "name a private key with SSH_KEY_PATH", reached),
        Step("name", check.name, "check the spelling and the DNS", reached),
        Step("TCP", check.tcp, "check the address, the port and the firewall", (*reached, "name")),
        Step("host key", check.host_key, "check that an SSH server answers there", (*reached, "TCP")),
        Step("login", check.login, "see the log of its sshd", ("host key", "key")),
        Step("sessions", check.sessions, "set MaxSessions 10 in its sshd_config", ("login",)),
        Step("SFTP", check.sftp, "set Subsystem sftp internal-sftp in its sshd_config", ("sessions",)),
        Step("round trip", check.round_trip, "check the network", ("SFTP",)),
        Step("paths", check.paths, "correct ALLOWED_PATHS", ("SFTP",)),
        Step("shell", check.shell, "see the account's login shell and rc files there", ("sessions",)),
        Step("warm shell", check.warm_shell, "see the account's login shell and rc files there", ("shell",)),
        Step("clock", check.clock, "set the clocks of both machines by NTP", ("shell",)),
    ]


class _Noted(KnownHosts):
    """Known hosts to which nothing is added; what was seen of each host is noted in `seen`."""

    def __init__(self, seen: dict[KnownAs, tuple[HostKey, bool]], *paths: Path, hash_names: bool) -> None:
        super().__init__(*paths, hash_names=hash_names)
        self._seen = seen

    def verify(self, host: KnownAs, key: HostKey, certificate: bytes | None = None) -> None:
        """Note a key that is known."""
        super().verify(host, key, certificate)
        self._seen[host] = key, True

    def add(self, host: KnownAs, key: HostKey) -> None:
        """Note a key that would be recorded."""
        self._seen[host] = key, False


class TargetCheck:
    """One target, looked at step by step: each method is a step. Owns what it opens until the end of its context."""

    def __init__(self, settings: Settings, named: str | None) -> None:
        """`named` is `[user@]host[:port]`; None is the default target."""
        self._settings = settings
        self._named = named
        self._seen: dict[KnownAs, tuple[HostKey, bool]] = {}
        self._hosts = Hosts(settings, partial(_Noted, self._seen))
        self._keys = Keys(settings)
        self._pool = Pool(settings, self._hosts)
        self._commands = Commands(self._pool, settings)
        self._connected: Connection | None = None
        self._refused: LoginError | None = None

    def __enter__(self) -> "TargetCheck":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._commands.stop()
        self._pool.close()
        if self._connected is not None:
            self._connected.close()

    def target_allowed(self) -> Iterator[Verdict]:
        """Ask what calls may name."""
        user, host, port = _parts(self._named) if self._named else (None, None, None)
        self._target = Reach(self._settings).target(host, user, port)
        yield ok(f"{self._target} may be named")

    def config(self) -> Iterator[Verdict]:
        """Ask what the SSH config makes of the target."""
        self._host = self._hosts.host(self._target)
        self._first = self._first_hop(self._host)
        config = self._host.config
        leads = [f"to {config.hostname}"] if config.hostname != self._target.host else []
        over = [f"over {hop.host}" for hop in config.proxy_jump]
        by = ["by its ProxyCommand"] if config.proxy_command else []
        path, way = self._settings.ssh_config, ", ".join([*leads, *over, *by])
        if path.exists():
            yield ok(f"{path} leads {way or 'straight to where the name says'}")
        else:
            yield ok(f"there is none at {path}")

    def agent(self) -> Iterator[Verdict]:
        """Ask the agent what it holds."""
        named = self._host.config.identity_agent
        place = named or os.environ.get("SSH_AUTH_SOCK")
        if place == "none" or not (place or os.name == "nt"):  # where it has a fixed place
            yield skipped("no SSH agent is named (SSH_AUTH_SOCK)")
            return
        with agent_at(named) as agent:
            kinds = [key.get_name() for key in agent.keys]
        if kinds:
            yield ok(f"it holds {', '.join(kinds)}")
        else:
            yield warning(f"{place or 'the SSH agent'} does not answer, or holds no key", "run: ssh-add")

    def key(self) -> Iterator[Verdict]:
        """Load the keys that will be shown."""
        with self._keys.offered(self._host.config, is_default=self._host.is_default) as offered:
            keys = list(offered)
        for sentence in offered.unusable:
            yield of_sentence(sentence, "name another key", "warning")
        if not keys:
            advice = self._keys.advice(self._target, [], offered.unusable)
            yield of_sentence(advice, "set SSH_KEY_PATH")
            return
        yield ok(", ".join(f"{name} ({key.get_name()})" for name, key in keys))
        for name, key in keys:
            if isinstance(key, paramiko.RSAKey) and key.get_bits() < _RSA_BITS:
                yield warning(
                    f"{name} has {key.get_bits()} bits, which many servers refuse",
                    "run: ssh-keygen -t ed25519",
                )

    def name(self) -> Iterator[Verdict]:
        """Look up the name of what is dialled."""
        if self._first is None:
            yield skipped("the ProxyCommand finds the host")
            return
        host = self._first.config.hostname
        family = ADDRESS_FAMILIES[self._first.config.address_family]
        deadline = time.monotonic() + self._first.connect_seconds
        try:
            found = look_up(host, self._first.target.port, family, deadline)
        except TimeoutError:
            raise Problem(f"nothing tells the address of {host} in time", "check the DNS") from None
        except (socket.gaierror, UnicodeError):
            raise Problem(f"there is no host {host}", "check its spelling and the DNS") from None
        yield ok(f"{host} is at {', '.join(dict.fromkeys(address.host for address in found))}")

    def tcp(self) -> Iterator[Verdict]:
        """Connect to what is dialled."""
        if self._first is None:
            yield skipped("the ProxyCommand connects")
            return
        started = time.monotonic()
        config = self._first.config
        family = ADDRESS_FAMILIES[config.address_family]
        deadline = started + self._first.connect_seconds
        dial(self._first.target, deadline, host=config.hostname, family=family).close()
        yield ok(f"port {self._first.target.port} answers in {_milliseconds(time.monotonic() - started)}")

    def host_key(self) -> Iterator[Verdict]:
        """Connect and log in; say here who is there, and leave to `login` what became of that."""
        started = time.monotonic()
        try:
            self._connected = connect(self._target, self._hosts, self._keys)
        except LoginError as refusal:
            if self._host.known_as not in self._seen:  # it was a jump host's
                raise
            self._refused = refusal
        self._login_seconds = time.monotonic() - started
        for place, (key, is_known) in self._seen.items():  # jump hosts, too
            if is_known:
                yield ok(f"{place} is known by its {key}")
            else:
                yield warning(
                    f"{place} is not known; its {key} will be recorded at the first visit (accept-new)",
                    f"compare it with what the machine's console says, or with: {place.scan}",
                )

    def login(self) -> Iterator[Verdict]:
        """Say what became of the login."""
        if self._refused is not None:
            raise self._refused
        yield ok(f"as {self._target.user}, in {_milliseconds(self._login_seconds)} from TCP on")

    def sessions(self) -> Iterator[Verdict]:
        """Open sessions at once, as many as OpenSSH grants by default."""
        count = 0
        with ExitStack() as opened, suppress(SessionRefusedError):
            while count < _SESSIONS:
                opened.callback(self._open_session().close)
                count += 1
        if count == 0:
            yield error(f"{self._target} lets you log in but opens no session", self._more_sessions)
        elif count < _FEW_SESSIONS:
            yield warning(
                f"{count} at once on a connection, so the server opens a connection for nearly every call",
                self._more_sessions,
            )
        else:
            yield ok(f"{count}{' or more' if count == _SESSIONS else ''} at once on a connection")

    def sftp(self) -> Iterator[Verdict]:
        """Start SFTP and ask for the login directory."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        with self._pool.session(self._target, deadline, _nobody_cancels) as session:
            try:
                with closing(SFTP(session)) as sftp:
                    self._round_trips, homes = zip(*(_timed(sftp) for _ in range(_LOOKS)), strict=True)
            except (NoSFTPError, StatusError):
                raise Problem(
                    f"{self._target} offers no file transfer (SFTP), which the file tools need",
                    "set Subsystem sftp internal-sftp in its sshd_config",
                ) from None
        yield ok(f"files are found from {os.fsdecode(homes[0])} on")

    def round_trip(self) -> Iterator[Verdict]:
        """Say how long an answer of SFTP took."""
        yield ok(_milliseconds(min(self._round_trips)))

    def paths(self) -> Iterator[Verdict]:
        """Ask for the directories of ALLOWED_PATHS."""
        entries = AllowedPaths(self._settings).entries
        files = Files(self._pool, self._settings)
        lacking = False
        for entry in map(os.fsdecode, entries):
            try:
                files.list(self._target, entry, cancelled=_nobody_cancels, limit=1)
            except (FileError, RefusedError) as failure:
                lacking = True
                yield warning(
                    of_sentence(str(failure), "").message,
                    f"make {entry} there, or take it out of ALLOWED_PATHS",
                )
        if not entries:
            yield skipped("ALLOWED_PATHS is not set")
        elif not lacking:
            yield ok("every directory of ALLOWED_PATHS is there")

    def shell(self) -> Iterator[Verdict]:
        """Have the account's shell start one program."""
        started = time.monotonic()
        try:
            said = self._script('printf "%s on %s" "${SHELL:-/bin/sh}" "$(uname -sm)"')
        except (ArgumentError, RefusedError) as failure:
            raise Problem(
                str(failure), "give the account an ordinary shell, without a forced command"
            ) from None
        except SSHError as failure:
            raise Problem(str(failure), "see the account's login shell and rc files there") from None
        seconds = time.monotonic() - started
        if seconds > _SLOW_SHELL_SECONDS:
            yield warning(
                f"{said.strip()} takes {seconds:.1f} s to start",
                "make the account's rc files do less where no terminal is ([ -t 0 ] || return)",
            )
        else:
            yield ok(said.strip())

    def warm_shell(self) -> Iterator[Verdict]:
        """See whether shells that were started ahead are used, and how fast a command is then."""
        deadline, used_before, took = time.monotonic() + _WARM_SECONDS, self._shells_used, 0.0
        while self._shells_used == used_before and time.monotonic() < deadline:
            started = time.monotonic()
            self._commands.run(self._target, ":", cancelled=_nobody_cancels, timeout=_ANSWER_SECONDS)
            took = time.monotonic() - started
        if self._shells_used > used_before:
            yield ok(f"started ahead; a command takes {_milliseconds(took)}")
        else:
            yield warning(
                "no shell could be started ahead, so every command waits for one", self._more_sessions
            )

    def clock(self) -> Iterator[Verdict]:
        """Compare the clocks, to the second."""
        before = time.time()
        told = self._script("date +%s").strip()
        if not told.isdecimal():
            raise Problem(f"date +%s prints {told[:100]!r} there", "see which date the account's PATH finds")
        ahead = int(told) + 0.5 - (before + time.time()) / 2
        if abs(ahead) > _CLOCK_SECONDS:
            how = "ahead of" if ahead > 0 else "behind"
            yield warning(f"its clock is {abs(ahead):.0f} s {how} this machine's", "set both clocks by NTP")
        else:
            yield ok(f"within {max(1, round(abs(ahead)))} s of this machine's")

    @property
    def _shells_used(self) -> int:
        return self._pool.counters()["prepared_used"]

    @property
    def _more_sessions(self) -> str:
        return f"set MaxSessions {_SESSIONS} in the sshd_config of {self._target.host}"

    def _first_hop(self, host: Host) -> Host | None:
        """Return what is dialled for a host: itself, or its outermost jump host; None behind a ProxyCommand."""
        passed: set[Target] = set()
        while host.config.proxy_jump and host.target not in passed:
            passed.add(host.target)
            host = self._hosts.jump_host(host.config.proxy_jump[0])
        return None if host.config.proxy_command else host

    def _open_session(self) -> Session:
        assert self._connected is not None  # noqa: S101 - the steps that need it need the login
        return self._connected.open_session(_ANSWER_SECONDS)

    def _script(self, text: str) -> str:
        return self._commands.script(self._target, text, cancelled=_nobody_cancels, timeout=_ANSWER_SECONDS)


def _nobody_cancels() -> None:
    """Wait for the end: whoever does not want to, ends the process."""


def _parts(named: str) -> tuple[str | None, str, int | None]:
    user, _, place = named.rpartition("@")
    try:
        host, port = split_port(place)
        return user or None, host, int(port) if port else None
    except ValueError:
        raise Problem(f"{named[:100]!r} is no target", "give [user@]host[:port]") from None


def _timed(sftp: SFTP) -> tuple[float, bytes]:
    """Ask for the login directory; return the seconds that took, and its path."""
    started = time.monotonic()
    home = sftp.real_path(b".").path()
    return time.monotonic() - started, home


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
