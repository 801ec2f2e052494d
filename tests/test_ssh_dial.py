"""Host names with several addresses: in which order these are tried, who wins, and what is told when none does."""

import errno
import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ssh_dial
from conftest import Server, free_port, nobody_cancels, wait_for
from settings import Target
from ssh_commands import Commands
from ssh_dial import Address, dial, interleaved
from ssh_errors import NoAnswerError, UnreachableError
from ssh_pool import Pool

FOUR, SIX = socket.AF_INET, socket.AF_INET6
HOST = "host.example"
addresses = st.builds(Address, st.sampled_from([FOUR, SIX]), st.tuples(st.text(), st.integers()))
Resolve = Callable[..., None]


@given(st.lists(addresses))
def test_each_address_comes_once_and_its_family_keeps_its_order(given: list[Address]) -> None:
    order = interleaved(given)
    assert order[:1] == given[:1]
    for family in (FOUR, SIX):
        wanted = [address for address in dict.fromkeys(given) if address.family == family]
        assert [address for address in order if address.family == family] == wanted


@given(st.lists(addresses, unique=True))
def test_families_take_turns_as_long_as_both_have_addresses(given: list[Address]) -> None:
    order = [address.family for address in interleaved(given)]
    both = 2 * min(order.count(FOUR), order.count(SIX))
    assert all(one != other for one, other in pairwise(order[:both]))


@contextmanager
def black_hole(host: str, port: int = 0) -> Iterator[int]:
    """A port that answers nothing: its queue is full, so that the system drops whoever comes."""
    family = SIX if ":" in host else FOUR
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        place = listener.getsockname()[:2]
        for _ in range(4):
            filler = stack.enter_context(socket.socket(family))
            filler.setblocking(False)
            filler.connect_ex(place)
        with stack.enter_context(socket.socket(family)) as probe:
            probe.settimeout(0.5)
            with pytest.raises(TimeoutError):
                probe.connect(place)
        yield place[1]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Let the host's name have these addresses."""
    known = socket.getaddrinfo

    def use(*hosts: str) -> None:
        def look_up(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
            return [found for one in hosts for found in known(one, port, type=socket.SOCK_STREAM)]

        monkeypatch.setattr("socket.getaddrinfo", look_up)

    return use


def listen(stack: ExitStack, host: str, port: int = 0) -> int:
    listener = stack.enter_context(socket.create_server((host, port), family=SIX if ":" in host else FOUR))
    return int(listener.getsockname()[1])


def peer_of(port: int, seconds: float = 30) -> str:
    with dial(Target("me", HOST, port), time.monotonic() + seconds) as connected:
        return str(connected.getpeername()[0])


def test_dead_sixth_version_costs_no_time_out(resolve: Resolve) -> None:
    with ExitStack() as stack:
        port = listen(stack, "127.0.0.1")
        stack.enter_context(black_hole("::1", port))
        resolve("::1", "127.0.0.1")
        assert peer_of(port) == "127.0.0.1"


def test_first_address_wins_when_all_are_alive(resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_dial, "_NEXT_SECONDS", 10.0)
    with ExitStack() as stack:
        port = listen(stack, "127.0.0.1")
        listen(stack, "::1", port)
        for first, second in (("::1", "127.0.0.1"), ("127.0.0.1", "::1")):
            resolve(first, second)
            assert peer_of(port) == first


def test_next_address_is_tried_at_once_when_one_refuses(
    resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_dial, "_NEXT_SECONDS", 10.0)
    with ExitStack() as stack:
        port = listen(stack, "127.0.0.3")
        resolve("::1", "127.0.0.2", "127.0.0.3")
        began = time.monotonic()
        assert peer_of(port, 60) == "127.0.0.3"
        assert time.monotonic() - began < 8


def test_dead_addresses_do_not_use_up_the_time_of_the_last(
    resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_dial, "_NEXT_SECONDS", 60.0)
    with ExitStack() as stack:
        port = listen(stack, "127.0.0.1")
        dead = [f"127.0.0.{number}" for number in range(2, 4)]
        for host in dead:
            stack.enter_context(black_hole(host, port))
        resolve(*dead, "127.0.0.1")
        assert peer_of(port, 6) == "127.0.0.1"


def test_losers_are_closed(resolve: Resolve, recwarn: pytest.WarningsRecorder) -> None:
    gc.collect()
    recwarn.clear()  # of what earlier tests left
    with ExitStack() as stack:
        port = listen(stack, "127.0.0.1")
        stack.enter_context(black_hole("127.0.0.2", port))
        resolve("127.0.0.2", "127.0.0.1")
        before = open_sockets()
        peer_of(port)
        assert not [one for one in open_sockets() if one not in before]
    gc.collect()
    assert not recwarn.list


def open_sockets() -> list[socket.socket]:
    return [one for one in gc.get_objects() if isinstance(one, socket.socket) and one.fileno() >= 0]


def test_error_says_what_happened_at_each_address(resolve: Resolve) -> None:
    with black_hole("127.0.0.2") as port:
        resolve("127.0.0.2", "::1", "127.0.0.1")
        with pytest.raises(UnreachableError) as raised:
            peer_of(port, 2)
    text = str(raised.value)
    for part in (
        "127.0.0.2: no answer",
        f"::1: nothing listens on port {port}",
        "127.0.0.1: nothing listens",
    ):
        assert part in text
    assert not isinstance(raised.value, NoAnswerError), "a refusal is an answer"
    assert "\n" not in text


def test_answer_that_came_in_time_counts_though_it_is_seen_late(
    resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine may let this process wait beyond its deadline."""
    start = ssh_dial._Race._start

    def start_and_sleep(race: ssh_dial._Race, address: ssh_dial.Address) -> None:
        start(race, address)
        time.sleep(1.2)

    monkeypatch.setattr(ssh_dial._Race, "_start", start_and_sleep)
    with ExitStack() as stack:
        port = listen(stack, "127.0.0.1")
        resolve("127.0.0.1")
        assert peer_of(port, 1) == "127.0.0.1"
    with pytest.raises(UnreachableError, match="nothing listens"):
        peer_of(port, 1)


def test_name_that_is_not_looked_up_in_time_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, over = threading.Event(), threading.Event()

    def look_up(*args: Any, **kwargs: Any) -> list[Any]:
        asked.set()
        over.wait()
        return []

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    try:
        with pytest.raises(
            NoAnswerError, match=rf"me@{HOST}:22: nothing tells the address of {HOST} in time"
        ):
            peer_of(22, 1)
        assert asked.is_set()
    finally:
        over.set()


def test_name_of_the_ssh_config_is_named_when_it_is_not_looked_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: over.wait() and [])
    try:
        with pytest.raises(NoAnswerError, match=r"address of real\.example \(HostName of the SSH config\)"):
            dial(Target("me", HOST, 22), time.monotonic(), host="real.example")
    finally:
        over.set()


def test_silence_everywhere_is_told_apart_from_a_refusal(resolve: Resolve) -> None:
    with black_hole("127.0.0.2") as port, black_hole("127.0.0.3", port):
        resolve("127.0.0.2", "127.0.0.3")
        with pytest.raises(NoAnswerError, match=r"127.0.0.2: no answer, 127.0.0.3: no answer"):
            peer_of(port, 1)


def test_single_address_is_not_named_twice(resolve: Resolve) -> None:
    port = free_port()
    resolve("127.0.0.1")
    with pytest.raises(UnreachableError, match=rf"^me@{HOST}:{port} cannot be reached: nothing listens"):
        peer_of(port)


def test_host_with_a_dead_address_is_worked_on(sshd: Server, resolve: Resolve) -> None:
    with black_hole("::1", sshd.port):
        resolve("::1", "127.0.0.1")
        known = sshd.folder / "known_hosts_two"
        known.write_text(sshd.known_hosts.read_text().replace("[127.0.0.1]", f"[{HOST}]"))
        settings = sshd.settings(ssh_known_hosts=known)
        pool = Pool(settings)
        try:
            result = Commands(pool, settings).run(
                Target("tester", HOST, sshd.port), "echo x", cancelled=nobody_cancels
            )
        finally:
            pool.close()
    assert result.stdout == "x\n"


def test_look_ups_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(ssh_dial, "_look_ups", threading.BoundedSemaphore(3))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: over.wait() and [])

    def look_ups() -> int:
        return sum(one.name == "ssh-look-up" for one in threading.enumerate())

    before = look_ups()
    try:
        for _ in range(6):
            with pytest.raises(NoAnswerError, match="in time"):
                peer_of(22, 0.1)
        assert look_ups() - before == 3
    finally:
        over.set()
    wait_for(lambda: look_ups() <= before)
    monkeypatch.undo()
    assert ssh_dial.look_up("localhost", 22, FOUR, time.monotonic() + 60)


def test_address_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_dial, "_look_ups", threading.BoundedSemaphore(1))
    assert ssh_dial._look_ups.acquire(blocking=False)
    assert ssh_dial.look_up("127.0.0.1", 22, FOUR, time.monotonic()) == [Address(FOUR, ("127.0.0.1", 22))]
    assert ssh_dial.look_up("::1", 22, SIX, time.monotonic())[0].host == "::1"


def test_machine_without_a_file_left_is_not_taken_for_a_host_that_is_down(
    resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    resolve("127.0.0.1")
    monkeypatch.setattr(socket, "socket", none_left)
    with pytest.raises(OSError, match="Too many open files"):
        dial(Target("me", HOST, 22), time.monotonic() + 30)
