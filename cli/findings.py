"""What `check` does and finds: steps that are taken in order, each with its verdicts.

A step that needs one which failed is not taken. What another room says of a failure is taken over as it is: by the
house's habit what failed stands first, and behind the last semicolon what to do about it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from settings import SettingsError
from ssh_errors import SSHError

Status = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Verdict:
    """What was found, and what would mend it."""

    status: Status
    message: str
    fix: str | None = None


def ok(message: str) -> Verdict:
    """Return the verdict on what is as it should be."""
    return Verdict("ok", message)


def warning(message: str, fix: str) -> Verdict:
    """Return the verdict on what works, and should be otherwise."""
    return Verdict("warning", message, fix)


def error(message: str, fix: str) -> Verdict:
    """Return the verdict on what does not work."""
    return Verdict("error", message, fix)


def skipped(message: str) -> Verdict:
    """Return the verdict on what was not looked at."""
    return Verdict("skipped", message)


def of_sentence(sentence: str, fix: str, status: Status = "error") -> Verdict:
    """Return the verdict that another room's sentence gives; `fix` is for one that does not say what to do."""
    message, semicolon, remedy = sentence.rpartition("; ")
    return Verdict(status, message, remedy) if semicolon else Verdict(status, sentence, fix)


class Problem(Exception):  # noqa: N818 - it is a verdict
    """Ends a step with an error: what failed, and what to do."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.verdict = error(message, fix)


@dataclass(frozen=True)
class Step:
    """One step. `fix` is what to do when it fails and the failure's sentence does not say; `needs` are other steps."""

    name: str
    take: Callable[[], Iterable[Verdict]]
    fix: str
    needs: tuple[str, ...] = ()

    def verdicts(self) -> Iterator[Verdict]:
        """Take the step. Its failures are verdicts, too."""
        try:
            yield from self.take()
        except Problem as problem:
            yield problem.verdict
        except SettingsError as failure:
            yield from (of_sentence(sentence, self.fix) for sentence in failure.problems)
        except SSHError as failure:
            yield of_sentence(str(failure), self.fix)


@dataclass(frozen=True)
class Finding:
    """A verdict, on what, and about whom: the settings, a target, or HTTP."""

    about: str
    name: str
    verdict: Verdict


Waiting = Callable[[str], AbstractContextManager[object]]
"""Shows what is being done, as long as the context lasts."""


def findings(about: str, steps: Sequence[Step], waiting: Waiting) -> Iterator[Finding]:
    """Take steps, and yield what each of them found as soon as it is over."""
    failed: dict[str, str] = {}  # and the step by whose failure it did
    for step in steps:
        lacking = next((failed[name] for name in step.needs if name in failed), None)
        if lacking is None:
            with waiting(f"{about}: {step.name}"):
                verdicts = list(step.verdicts())
        else:
            verdicts = [skipped(f"not tried without {lacking}")]
        if lacking is not None or any(verdict.status == "error" for verdict in verdicts):
            failed[step.name] = lacking or step.name
        for verdict in verdicts:
            yield Finding(about, step.name, verdict)
