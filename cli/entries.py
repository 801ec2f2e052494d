"""An entry put into a table of somebody's JSON or TOML, with every byte around it left as it was.

Pure: text in, text out. The entry is spliced into the text at places that a parser found, and the result is parsed
again: it must hold what the text held before, and the entry. What cannot be done so is refused.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_decoder = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\r\n]*")
_INDENT = "  "
_NOT_ALONE = "is written in a way that does not let one entry be changed alone"


class EntryError(Exception):
    """The text is left as it is; `str()` says why, as what comes after the name of the file."""


def in_json(text: str, section: str, name: str, entry: Mapping[str, Any], *, replace: bool) -> str:
    """Return JSON text in which `entry` stands as `name` in the object `section`, which is made if need be.

    Raises EntryError when the text is not a JSON object, or another entry has the name and is not to be replaced.
    """
    if not text.strip():
        return snippet_json(section, name, entry)
    try:
        held = json.loads(text)
    except ValueError as error:
        raise EntryError(f"is not plain JSON ({error}); comments would be lost") from None
    if _is_there(held, section, name, entry, replace=replace):
        return text
    unit = _unit(text)
    root = _Object.at(text, _after_blank(text, 0))
    table = root.members.get(section)
    if table is None:
        changed = root.with_member(text, section, {name: entry}, unit)
    else:
        changed = _Object.at(text, table.start).with_member(text, name, entry, unit)
    return _checked(changed, json.loads(changed), held, section, name, entry)


def in_toml(text: str, section: str, name: str, entry: Mapping[str, Any], *, replace: bool) -> str:
    """Return TOML text in which `entry` stands as the table `section`.`name`, at the end.

    Raises EntryError when the text is not TOML or names the section in another way than by tables' headers, or
    another entry has the name and is not to be replaced.
    """
    try:
        held = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise EntryError(f"is not TOML ({error})") from None
    if _is_there(held, section, name, entry, replace=replace):
        return text
    newline = _newline(text)
    kept = _without_tables(text, f"{section}.{name}")
    if kept and not kept.endswith("\n"):
        kept += newline
    if kept and not kept.endswith(2 * newline):
        kept += newline
    changed = kept + snippet_toml(section, name, entry).replace("\n", newline)
    try:
        holds = tomllib.loads(changed)
    except tomllib.TOMLDecodeError:
        raise EntryError(_NOT_ALONE) from None
    return _checked(changed, holds, held, section, name, entry)


def snippet_json(section: str, name: str, entry: Mapping[str, Any]) -> str:
    """Return JSON text with nothing but the entry."""
    return _dumped({section: {name: entry}}, _INDENT) + "\n"


def compact(entry: Mapping[str, Any]) -> str:
    """Return an entry as JSON on one line."""
    return _dumped(entry)


def snippet_toml(section: str, name: str, entry: Mapping[str, Any]) -> str:
    """Return TOML text with nothing but the entry, whose values are strings, lists of them, or objects of them."""
    plain = {key: value for key, value in entry.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in entry.items() if isinstance(value, dict)}
    parts = [(f"{section}.{name}", plain)]
    parts += [(f"{section}.{name}.{key}", value) for key, value in tables.items()]
    return "\n".join(
        f"[{header}]\n" + "".join(f"{key} = {_dumped(value)}\n" for key, value in values.items())
        for header, values in parts
    )


def _is_there(held: Any, section: str, name: str, entry: Mapping[str, Any], *, replace: bool) -> bool:
    table = held.get(section, {}) if isinstance(held, dict) else None
    if not isinstance(table, dict):
        raise EntryError(f"holds something else where {section} is expected to be a table")
    if name in table and table[name] != entry and not replace:
        raise EntryError(f"has another server called {name}; --force replaces it, --name adds one beside it")
    return table.get(name) == entry


def _checked(changed: str, holds: Any, held: Any, section: str, name: str, entry: Mapping[str, Any]) -> str:
    if holds != held | {section: held.get(section, {}) | {name: entry}}:
        raise EntryError(_NOT_ALONE)
    return changed


@dataclass(frozen=True)
class _Span:
    start: int
    end: int


@dataclass(frozen=True)
class _Object:
    """A JSON object in a text: where its brace opens, where its members' values stand, how its members are set off.

    `lead` is a line's end and an indentation, or, when the first member stands on the line of the brace, a blank.
    """

    opened: int
    members: Mapping[str, _Span]
    lead: str

    @classmethod
    def at(cls, text: str, opened: int) -> "_Object":
        """Find the members of the object whose brace is at `opened` in a valid text."""
        first = place = _after_blank(text, opened + 1)
        members = {}
        while text[place] != "}":
            key, place = _decoder.raw_decode(text, place)
            start = _after_blank(text, _after_blank(text, place) + 1)
            end = _decoder.raw_decode(text, start)[1]
            members[key] = _Span(start, end)
            place = _after_blank(text, end)
            if text[place] == ",":
                place = _after_blank(text, place + 1)
        lead = text[opened + 1 : first]
        return cls(opened, members, _newline(text) + lead.rpartition("\n")[2] if "\n" in lead else " ")

    def with_member(self, text: str, key: str, value: Any, unit: str | None) -> str:
        """Return the text with the member replaced, or added behind the others."""
        if (there := self.members.get(key)) is not None:
            return text[: there.start] + _laid_out(value, unit, self.lead) + text[there.end :]
        if self.members:
            end = max(span.end for span in self.members.values())
            added = f",{self.lead}{_dumped(key)}: {_laid_out(value, unit, self.lead)}"
            return text[:end] + added + text[end:]
        closing = text.index("}", self.opened)
        line = text[text.rfind("\n", 0, self.opened) + 1 : self.opened]
        outer = _newline(text) + line[: len(line) - len(line.lstrip())]
        inner = outer + (unit or _INDENT)
        added = f"{inner}{_dumped(key)}: {_laid_out(value, unit or _INDENT, inner)}{outer}"
        return text[: self.opened + 1] + added + text[closing:]


def _unit(text: str) -> str | None:
    """Return by what the members of the outermost object are indented, None when they stand on its line."""
    root = _Object.at(text, _after_blank(text, 0))
    if not root.members:
        return _INDENT
    return root.lead.rpartition("\n")[2] if "\n" in root.lead else None


def _laid_out(value: Any, unit: str | None, lead: str) -> str:
    """Return a value as JSON whose further lines begin like the member that holds it."""
    return _dumped(value, unit if "\n" in lead else None).replace("\n", lead)


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _dumped(value: Any, indent: str | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False)


def _after_blank(text: str, place: int) -> int:
    found = _BLANK.match(text, place)
    return found.end() if found else place


def _without_tables(text: str, name: str) -> str:
    """Return TOML text without the table `name` and those below it; what is commented before the next one stays."""
    kept: list[str] = []
    loose: list[str] = []
    dropping = False
    for line in text.splitlines(keepends=True):
        if line.startswith("["):
            header = line[1:].partition("]")[0]
            dropping = header == name or header.startswith(f"{name}.")
        if not dropping:
            kept += [*loose, line]
            loose = []
        elif not line.strip() or line.startswith("#"):
            loose.append(line)
        else:
            loose = []
    return "".join([*kept, *loose])
