"""The breaker: what opens it, for how long, and what closes it."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ssh_breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain(seconds: float) -> float:
    return seconds


def opened(clock: Clock, times: int = 3) -> Breaker:
    breaker = Breaker(clock, plain)
    for _ in range(times):
        clock.now += breaker.wait_seconds
        breaker.timed_out(breaker.begin(), "no answer")
    return breaker


def test_three_time_outs_in_a_row_open_it() -> None:
    clock = Clock()
    assert [opened(clock, times).state for times in range(4)] == ["closed", "closed", "closed", "open"]


def test_attempts_under_way_together_count_as_one() -> None:
    breaker = Breaker(Clock(), plain)
    for attempt in [breaker.begin() for _ in range(9)]:
        breaker.timed_out(attempt, "no answer")
    assert (breaker.state, breaker.row) == ("closed", 1)


def test_time_out_of_an_attempt_older_than_a_connection_does_not_count() -> None:
    breaker = Breaker(Clock(), plain)
    late = breaker.begin()
    breaker.close()
    breaker.timed_out(late, "no answer")
    assert breaker.row == 0


def test_one_probe_at_a_time_when_the_pause_is_over() -> None:
    clock = Clock()
    breaker = opened(clock)
    assert (breaker.most_attempts, breaker.wait_seconds) == (0, 5.0)
    clock.now += 5
    assert (breaker.state, breaker.most_attempts) == ("half open", 1)
    probe = breaker.begin()
    assert breaker.most_attempts == 0
    breaker.abandoned(probe)
    assert breaker.most_attempts == 1


def test_pause_doubles_to_a_minute() -> None:
    clock = Clock()
    pauses = [opened(clock, times).wait_seconds for times in range(3, 10)]
    assert pauses == [5, 10, 20, 40, 60, 60, 60]


def test_probe_that_ends_otherwise_closes_it_and_the_next_row_pauses_shortly() -> None:
    clock = Clock()
    breaker = opened(clock, 6)
    clock.now += breaker.wait_seconds
    breaker.begin()
    breaker.close()
    assert breaker.most_attempts > 100
    for _ in range(3):
        breaker.timed_out(breaker.begin(), "no answer")
    assert breaker.wait_seconds == 5


@given(st.lists(st.booleans(), max_size=60))
def test_open_exactly_when_the_last_three_timed_out(time_outs: list[bool]) -> None:
    clock = Clock()
    breaker = Breaker(clock, plain)
    for timed_out in time_outs:
        clock.now += breaker.wait_seconds
        attempt = breaker.begin()
        if timed_out:
            breaker.timed_out(attempt, "no answer")
        else:
            breaker.close()
    last = time_outs[-3:]
    assert (breaker.state != "closed") == (len(last) == 3 and all(last))


class AnyLife(RuleBasedStateMachine):
    """Attempts that begin whenever they may and end whenever they like, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.factor = 1.0
        self.breaker = Breaker(self.clock, lambda seconds: seconds * self.factor)
        self.attempts: list[int] = []
        self.probes: list[int] = []

    @rule(seconds=st.floats(0, 100), factor=st.floats(0.5, 1.5))
    def time_goes_by(self, seconds: float, factor: float) -> None:
        self.clock.now += seconds
        self.factor = factor

    @precondition(lambda self: self.breaker.most_attempts)
    @rule()
    def one_begins(self) -> None:
        probes = self.breaker.state == "half open"
        attempt = self.breaker.begin()
        (self.probes if probes else self.attempts).append(attempt)

    @precondition(lambda self: self.attempts or self.probes)
    @rule(data=st.data(), end=st.sampled_from(["timed out", "otherwise", "abandoned"]))
    def one_ends(self, data: st.DataObject, end: str) -> None:
        attempt = data.draw(st.sampled_from(self.attempts + self.probes))
        (self.probes if attempt in self.probes else self.attempts).remove(attempt)
        before = self.breaker.row
        if end == "timed out":
            self.breaker.timed_out(attempt, "no answer")
            assert self.breaker.row <= before + 1
        elif end == "abandoned":
            self.breaker.abandoned(attempt)
            assert self.breaker.row == before
        else:
            self.breaker.close()
            assert self.breaker.state == "closed"
            self.attempts += self.probes  # they are no longer that: nothing is open
            self.probes = []

    @invariant()
    def nothing_but_one_probe_begins_while_it_is_not_closed(self) -> None:
        assert len(self.probes) <= 1
        if self.breaker.state == "open":
            assert self.breaker.most_attempts == 0
        if self.breaker.state == "half open":
            assert self.breaker.most_attempts == 1 - len(self.probes)

    @invariant()
    def nobody_waits_longer_than_a_minute(self) -> None:
        assert 0 <= self.breaker.wait_seconds <= 60
        assert self.breaker.state != "closed" or self.breaker.most_attempts > 100


TestAnyLife = AnyLife.TestCase
