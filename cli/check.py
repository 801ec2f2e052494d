"""`ssh-mcp-server check`: what is wrong with a configuration, found by doing what the server would do with it.

Exit status: 0 when nothing is wrong (warnings may be there), 1 when something is, 2 when the settings do not load. Each
line is printed as soon as it is known. Nothing is changed on any host, and no host key is recorded.
"""

import json
import logging
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cli import check_settings
from cli.findings import Finding, Status, Verdict, Waiting, findings
from settings import Settings, __version__
from ssh_output import one_line

_INTERRUPTED = 130
_COLUMNS = 80
_NAME_COLUMNS = 14
_INDENT = _NAME_COLUMNS + 5
_MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "warning": ("!", "yellow"),
    "error": ("✗", "bold red"),
    "skipped": ("-", "dim"),
}
_ASCII = {"✓": "+", "✗": "x"}
_SECTION = "settings"


@dataclass(frozen=True)
class Asked:
    """What is to be checked: further targets, as `[user@]host[:port]`; HTTP even where it is not set up, and where."""

    hosts: tuple[str, ...]
    env_file: Path | None
    http: bool
    http_host: str | None
    http_port: int | None

    def listening(self, current: Settings) -> Settings:
        """Return the settings with the place of the command line, where HTTP would listen."""
        told = {"http_host": self.http_host, "http_port": self.http_port}
        return current.model_copy(update={name: value for name, value in told.items() if value})


def check(asked: Asked, *, as_json: bool) -> int:
    """Check, print what was found, and return the exit status."""
    logging.disable(logging.CRITICAL)  # what the server would log is said here
    loaded: list[Settings] = []
    found: list[Finding] = []
    report = _Json() if as_json else _Lines()
    try:
        for finding in _findings(asked, loaded, report.waiting):
            found.append(finding)
            report.show(finding)
    except KeyboardInterrupt:
        return _INTERRUPTED
    report.end(found)
    if not loaded:
        return 2
    return 1 if any(finding.verdict.status == "error" for finding in found) else 0


def _findings(asked: Asked, loaded: list[Settings], waiting: Waiting) -> Iterator[Finding]:
    yield from findings(_SECTION, check_settings.steps(asked.env_file, loaded), waiting)
    if not loaded:
        return
    (current,) = loaded
    yield from findings(_SECTION, check_settings.steps_of_loaded(current), waiting)
    from cli.check_ssh import TargetCheck, target_steps  # the SSH rooms take a second to import

    default = [None] if current.ssh_default_host else []
    for named in (*default, *asked.hosts):
        with TargetCheck(current, named) as target:
            yield from findings(named or str(current.ssh_default_host), target_steps(target), waiting)
    if asked.http or any((current.public_base_url, current.google_client_id, current.allowed_email)):
        from cli.check_http import HttpCheck, http_steps  # and so do those of HTTP

        with HttpCheck(asked.listening(current)) as http:
            yield from findings("HTTP", http_steps(http), waiting)


class _Lines:
    """The findings for people: a heading for each section, a line for each finding, its remedy below it."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress = Console(stderr=True, highlight=False)
        self._about = ""
        self._columns = min(100, self._console.width) if self._console.is_terminal else _COLUMNS
        self._skipped: list[Finding] = []
        draws = self._console.encoding.lower().startswith("utf")
        self._marks = {
            status: (mark if draws else _ASCII.get(mark, mark), style)
            for status, (mark, style) in _MARKS.items()
        }
        self._arrow = "→" if draws else "->"

    def waiting(self, what: str) -> AbstractContextManager[object]:
        """Show on a terminal what is being done."""
        if not self._progress.is_terminal:
            return nullcontext()
        return self._progress.status(f"{what} …")

    def show(self, finding: Finding) -> None:
        """Print a finding; of those that were not looked at for one reason, print one line when the last is there."""
        if self._skipped and (finding.about, finding.verdict) != (self._about, self._skipped[0].verdict):
            self._print_skipped()
        if finding.about != self._about:
            self._console.print(Text(f"{self._about and chr(10)}{finding.about}", style="bold"))
            self._about = finding.about
        if finding.verdict.status == "skipped":
            self._skipped.append(finding)
        else:
            self._print(finding.verdict, finding.name)

    def _print_skipped(self) -> None:
        names = ", ".join(finding.name for finding in self._skipped)
        verdict = self._skipped[0].verdict
        if len(self._skipped) == 1:
            self._print(verdict, names)
        else:
            self._print(replace(verdict, message=f"{verdict.message}: {names}"), "")
        self._skipped.clear()

    def _print(self, verdict: Verdict, name: str) -> None:
        mark, style = self._marks[verdict.status]
        first, *others = textwrap.wrap(
            one_line(verdict.message),
            self._columns - _INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        line = Text.assemble("  ", (mark, style), f" {name:{_NAME_COLUMNS}} ", first)
        for other in (line, *(Text(" " * _INDENT + other) for other in others)):
            self._console.print(other, style="dim" if verdict.status == "skipped" else "")
        if verdict.fix:
            self._console.print(Text(f"    {self._arrow} {one_line(verdict.fix)}", style="cyan"))

    def end(self, found: Sequence[Finding]) -> None:
        """Print how it went in all."""
        if self._skipped:
            self._print_skipped()
        counts = {status: sum(f.verdict.status == status for f in found) for status in _MARKS}
        said = f"{counts['ok']} well, {counts['warning']} to look at, {counts['error']} wrong"
        skipped = f", {counts['skipped']} not looked at" if counts["skipped"] else ""
        style = "bold red" if counts["error"] else "bold yellow" if counts["warning"] else "bold green"
        self._console.print(Text(f"\n{said}{skipped}", style=style))


class _Json:
    """The findings for programs: one object at the end."""

    def waiting(self, what: str) -> AbstractContextManager[object]:
        """Show nothing."""
        return nullcontext()

    def show(self, finding: Finding) -> None:
        """Wait for the others."""

    def end(self, found: Sequence[Finding]) -> None:
        """Print all findings."""
        answer = {"version": __version__, "results": [_as_json(finding) for finding in found]}
        json.dump(answer, sys.stdout, indent=2)
        print()


def _as_json(finding: Finding) -> dict[str, Any]:
    verdict = finding.verdict
    return {
        "about": finding.about,
        "name": finding.name,
        "status": verdict.status,
        "message": verdict.message,
        "fix": verdict.fix,
    }
