"""Calls of every kind through a bad wire, for as long as SOAK_SECONDS says: nothing grows, and every answer is true."""

import logging
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from conftest import Server, wait_for
from relay import Relay, way_to
from test_faults import Caller, disturb, processes_of

SECONDS = float(os.environ.get("SOAK_SECONDS", "120"))
CALLERS = 8


@dataclass(frozen=True)
class Sample:
    """What this process holds at one moment."""

    kilobytes: int
    files: int
    threads: int

    @classmethod
    def now(cls, relay: Relay) -> "Sample":
        """The relay's sockets, in this process too, are not counted."""
        status = Path("/proc/self/status").read_text()
        resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
        files = len(list(Path("/proc/self/fd").iterdir())) - relay.files
        return cls(int(resident), files, threading.active_count())


def _most(samples: list[Sample]) -> Sample:
    columns = zip(*((one.kilobytes, one.files, one.threads) for one in samples), strict=True)
    return Sample(*map(max, columns))


def test_nothing_grows_in_a_long_time_of_faults(
    own_sshd: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps what records refer to
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    server, over, numbers = own_sshd("MaxStartups 200"), threading.Event(), count()
    kinds: Counter[str] = Counter()
    samples: list[Sample] = []

    def call_on(caller: Caller) -> None:
        while not over.is_set():
            kinds[caller.call(next(numbers))] += 1

    with way_to(server) as way:
        caller = Caller(way)
        disturbing = threading.Thread(target=disturb, args=(caller, way.relay, over, int(time.time())))
        disturbing.start()
        with ThreadPoolExecutor(CALLERS) as threads:
            calling = [threads.submit(call_on, caller) for _ in range(CALLERS)]
            ends = time.monotonic() + SECONDS
            while time.monotonic() < ends and not any(future.done() for future in calling):
                time.sleep(SECONDS / 60)
                samples.append(Sample.now(way.relay))
            over.set()
            for future in calling:
                future.result()
        disturbing.join()
        caller.close()
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    print(f"{sum(kinds.values())} calls: {dict(kinds)}")
    print(f"at the begin {samples[0]}; most of the middle third and the last:", *map(_most, (middle, last)))
    for name in ("files", "threads"):
        assert max(getattr(s, name) for s in last) <= max(getattr(s, name) for s in middle) + 40, samples
    grown = statistics.median(s.kilobytes for s in last) / statistics.median(s.kilobytes for s in middle)
    assert grown < 1.15, (grown, samples)
    assert sum(n for kind, n in kinds.items() if not kind.endswith(("lost", "error"))) > SECONDS, kinds
    wait_for(lambda: not server.session_pids(), 60)
    wait_for(lambda: not processes_of(server), 60)
