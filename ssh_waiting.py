"""Who waits for a command, and how: what a call says once, for whatever runs its command."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from ssh_pool import Cancelled


class Told(Protocol):
    """Who is told how a call goes on, whatever it runs on: as `ssh_exchange.Progress`, or as `ssh_rounds.Progress`."""

    def __call__(self, seconds: float, size: int, line: str) -> None:
        """Tell of one command."""

    def of_fleet(self, done: int, running: int, failed: int, count: int) -> None:
        """Tell of many."""


@dataclass(frozen=True)
class Waiting:
    """Who waits for a command: for how many seconds, what is to happen then, and how to ask and tell them.

    `cancelled` raises when they went away; `stands` tells in any thread, also later, whether their login still counts.
    """

    owner: str
    timeout: float
    on_timeout: Literal["detach", "kill"]
    cancelled: "Cancelled"
    progress: Told
    stands: Callable[[], bool]
