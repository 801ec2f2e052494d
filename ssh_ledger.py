"""What this process began that outlived its call, and for whom: to list it, and to say in a question what it is.

Nothing here decides who may ask for a job: its signed `job_id` does. Memory is bounded: of each owner the last are kept
that have `_OWNED_CHARACTERS` together, and of each command and list of hosts the beginning.
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ssh_answers import JobState

_OWNED_CHARACTERS = 1024 * 1024
_SHOWN_CHARACTERS = 500
_ITSELF_CHARACTERS = 500


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

    @property
    def characters(self) -> int:
        """About how many it holds."""
        return len(self.job_id) + len(self.where) + len(self.command) + _ITSELF_CHARACTERS


@dataclass
class _Owned:
    """The last jobs of one owner."""

    jobs: deque[Begun] = field(default_factory=deque)
    characters: int = 0

    def add(self, begun: Begun) -> None:
        self.jobs.append(begun)
        self.characters += begun.characters
        while self.characters > _OWNED_CHARACTERS:
            self.characters -= self.jobs.popleft().characters


class Ledger:
    """The jobs of all owners. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: defaultdict[str, _Owned] = defaultdict(_Owned)

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
        begun = Begun(name, job_id, _beginning(where), _beginning(command), state)
        with self._lock:
            self._of[owner].add(begun)

    def of(self, owner: str) -> list[tuple[Begun, JobState]]:
        """Return the jobs of `owner` that are known still, the last one first, and how they go."""
        return [(each, state) for each in reversed(self._owned(owner)) if (state := each.state()) is not None]

    def command_of(self, owner: str, name: str) -> str | None:
        """Return the beginning of what a job runs, None if it was not begun here, or too long ago."""
        return next((each.command for each in self._owned(owner) if each.name == name), None)

    def _owned(self, owner: str) -> list[Begun]:
        with self._lock:
            return list(self._of[owner].jobs) if owner in self._of else []


def _beginning(text: str) -> str:
    more = len(text) - _SHOWN_CHARACTERS
    return text if more <= 0 else f"{text[:_SHOWN_CHARACTERS]} [... {more} more characters]"
