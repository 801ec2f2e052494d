"""What this process began that outlived its call, and for whom: to list it, and to say in a question what it is.

Nothing here decides who may ask for a job: its signed `job_id` does. Memory is bounded: of each owner the last
`_REMEMBERED` are kept, and of each command its beginning.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ssh_answers import JobState

_REMEMBERED = 1000
_COMMAND_CHARACTERS = 500


def in_background() -> JobState:
    """Tell how a job goes that outlives this process: only its machine knows more."""
    return "background"


@dataclass(frozen=True)
class Begun:
    """A job: its name, the `job_id` that was given out, where it runs, its command, and since when (epoch seconds).

    `state` tells how it goes, None once it is forgotten; it asks no machine.
    """

    name: str
    job_id: str
    where: str
    command: str
    state: Callable[[], JobState | None] = field(repr=False)
    began_at: float = field(default_factory=time.time)


class Ledger:
    """The jobs of all owners. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, deque[Begun]] = {}

    def note(
        self,
        owner: str,
        name: str,
        job_id: str,
        where: str,
        command: str,
        state: Callable[[], JobState | None],
    ) -> None:
        """Remember a job."""
        shown, more = command[:_COMMAND_CHARACTERS], len(command) - _COMMAND_CHARACTERS
        if more > 0:
            shown += f" [... {more} more characters]"
        with self._lock:
            of_owner = self._of.setdefault(owner, deque(maxlen=_REMEMBERED))
            of_owner.append(Begun(name, job_id, where, shown, state))

    def of(self, owner: str) -> list[tuple[Begun, JobState]]:
        """Return the jobs of `owner` that are known still, the last one first, and how they go."""
        with self._lock:
            begun = list(reversed(self._of.get(owner, ())))
        return [(each, state) for each in begun if (state := each.state()) is not None]

    def command_of(self, owner: str, name: str) -> str | None:
        """Return the beginning of what a job runs, None if it was not begun here, or too long ago."""
        with self._lock:
            return next((each.command for each in self._of.get(owner, ()) if each.name == name), None)
