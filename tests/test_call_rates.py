"""How many calls one identity may make in a minute."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calls import Rate
from ssh_errors import RefusedError


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def taken(rate: Rate, identity: str = "somebody") -> bool:
    try:
        rate.take(identity)
    except RefusedError:
        return False
    return True


def test_calls_over_the_limit_are_refused_until_the_first_is_a_minute_old() -> None:
    clock = Clock()
    rate = Rate(2, clock)
    assert taken(rate)
    clock.now += 12.5
    assert taken(rate)
    with pytest.raises(RefusedError, match=r"RATE_LIMIT allows 2 calls a minute.*again in 48 s"):
        rate.take("somebody")
    clock.now += 47.4
    assert not taken(rate)
    clock.now += 0.1
    assert taken(rate)
    assert not taken(rate)


def test_what_was_refused_does_not_count() -> None:
    clock = Clock()
    rate = Rate(1, clock)
    assert taken(rate)
    for _ in range(59):
        clock.now += 1
        assert not taken(rate)
    clock.now += 1
    assert taken(rate)


def test_each_identity_has_its_own_calls() -> None:
    rate = Rate(1, Clock())
    assert taken(rate, "a")
    assert taken(rate, "b")
    assert not taken(rate, "a")


def test_without_a_limit_nothing_is_counted() -> None:
    rate = Rate(None)
    assert all(taken(rate) for _ in range(1000))
    assert rate.identities == 0


def test_identities_that_are_quiet_for_a_minute_are_forgotten() -> None:
    clock = Clock()
    rate = Rate(1, clock)
    for number in range(1000):
        assert taken(rate, f"identity {number}")
        clock.now += 1
    assert rate.identities <= 61


@given(st.integers(1, 5), st.lists(st.floats(0, 40), max_size=60))
def test_no_minute_has_more_calls_than_the_limit_and_none_is_refused_without_need(
    most: int, pauses: list[float]
) -> None:
    clock = Clock()
    rate = Rate(most, clock)
    taken_at: list[float] = []
    for pause in pauses:
        clock.now += pause
        lately = sum(then > clock.now - 60 for then in taken_at)
        assert taken(rate) is (lately < most)
        if lately < most:
            taken_at.append(clock.now)


def test_threads_together_get_as_many_calls_as_one() -> None:
    rate, got = Rate(50, Clock()), [0] * 8
    together = threading.Barrier(len(got))

    def take(place: int) -> None:
        together.wait()
        got[place] = sum(taken(rate) for _ in range(50))

    threads = [threading.Thread(target=take, args=(place,)) for place in range(len(got))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(got) == 50
