"""What a person is asked before a destructive act (`confirm`). Pure: what is meant goes in, text comes out.

The text shows what is done exactly as it is done, with control characters made visible, and fits into a dialog. What
is run stands there whole, or is refused; of what is written, and of what a command reads, a beginning, how much there
is, and its SHA-256. What callers give is indented, so that it cannot pass for a sentence of ours. Many blanks or empty
lines in a row are counted instead, since they would push what follows them out of a dialog.
"""

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from textwrap import indent
from typing import TYPE_CHECKING, Any

from settings import Target
from ssh_answers import EditedFile, iso_time
from ssh_errors import RefusedError
from ssh_kill import Signal
from ssh_output import one_line, visible
from ssh_shells import Task

if TYPE_CHECKING:
    from ssh_writes import Place

_MOST_CHARACTERS = 4000
_EXCERPT_CHARACTERS = 1500
_ENDS_CHARACTERS = 750
_EXCERPT_LINES = 25
_GAP = re.compile(r"\s{60,}|\n(?:[^\S\n]*\n){7,}")


def running(place: str, task: Task, *, background: bool) -> str:
    """Ask whether a command may be run. Raises RefusedError for what is too long to be shown."""
    conditions = [
        f"in the directory {one_line(task.cwd)}" if task.cwd else "",
        "as root through sudo" if task.sudo else "",
        "in the background, where it outlives this server" if background else "",
    ]
    where = ", ".join([f"on {place}", *filter(None, conditions)])
    variables = "\n".join(f"{name}={one_line(value)}" for name, value in sorted(task.env.items()))
    if len(place) > _MOST_CHARACTERS // 2:
        raise RefusedError(
            f"CONFIRM wants every host shown to a person, and these need over {_MOST_CHARACTERS // 2} characters; "
            "nothing was run. Name fewer at once"
        )
    exact = f"Run this {where}?\n\n{_quoted(task.command[:_MOST_CHARACTERS])}"
    if variables:
        exact += f"\n\nwith these variables:\n\n{_quoted(variables[:_MOST_CHARACTERS])}"
    if max(len(exact), len(task.command), len(variables)) > _MOST_CHARACTERS:
        raise RefusedError(
            f"CONFIRM wants the command shown to a person, and with its hosts and variables it has over "
            f"{_MOST_CHARACTERS} characters; nothing was run. Write it to a file with ssh_write_file and run that"
        )
    return exact + (f"\n\nIt reads {_excerpt(task.stdin)}" if task.stdin else "")


def signalling(place: str, job: str, signal: Signal | None) -> str:
    """Ask whether a job may be sent a signal; without one, whether it may be killed when its time is over."""
    deed = f"Send SIG{signal} to" if signal else "Kill, once the time of this call is over,"
    more = len(place) - 2 * _ENDS_CHARACTERS
    cut = f"{place[:_ENDS_CHARACTERS]}[... {more} more characters ...]{place[-_ENDS_CHARACTERS:]}"
    where = place if more <= 0 else cut
    return f"{deed} this on {where}?\n\n{_quoted(job)}"


def writing(
    target: Target, place: "Place", content: bytes, *, append: bool, mode: str | None, create_parents: bool
) -> str:
    """Ask whether a file may be written."""
    if place.existing is None:
        deed = "Create this file"
    elif append:
        deed = "Add to the end of this file"
    else:
        changed = iso_time(place.existing.mtime or 0)
        deed = f"Replace this file, which has {place.existing.size or 0} bytes and was last changed at {changed},"
    more = f", with mode {mode}" if mode else ""
    more += ", in folders that are made where they are missing" if create_parents else ""
    return f"{deed} on {target}{more}?\n\n{_quoted(place.shown)}\n\nWritten are {_excerpt(content)}"


def editing(target: Target, planned: EditedFile) -> str:
    """Ask whether a file may be changed as a dry run showed."""
    diff = _excerpt(planned.diff.encode(errors="replace"))
    return f"Change this file on {target}?\n\n{_quoted(planned.path)}\n\nThe change is {diff}"


def calling(tool: str, arguments: Mapping[str, Any], where: str) -> str:
    """Ask whether a tool may be called of which no more is known."""
    shown = _excerpt(json.dumps(dict(arguments), indent=1).encode())
    return f"Call {one_line(tool)} on {where}, which may change or destroy something?\n\nIts arguments are {shown}"


def _excerpt(data: bytes) -> str:
    """Describe data and show its beginning."""
    whole = f"{len(data)} bytes, SHA-256 {sha256(data).hexdigest()}"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return f"{whole}, which are no text."
    lines = text.split("\n")
    shown = "\n".join(lines[:_EXCERPT_LINES])[:_EXCERPT_CHARACTERS]
    rest = len(text) - len(shown)
    return f"{whole}:\n\n{_quoted(shown)}" + (
        f"\n\n({rest} more characters are not shown here.)"
        if text[len(shown) :].strip("\n") or rest > 1
        else ""
    )


def _quoted(text: str) -> str:
    return indent(visible(_GAP.sub(_counted, text.rstrip("\n"))), "    ", lambda _: True)


def _counted(gap: re.Match[str]) -> str:
    """Return what stands for a gap; where lines end in it, one still does."""
    lines = gap[0].count("\n")
    return f"\n[... {lines} line ends ...]\n" if lines else f"[... {len(gap[0])} blanks ...]"
