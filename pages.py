"""The pages that people see: landing, consent, leaving, refused, faulty, error.

Templates in `templates/` are filled by Jinja2, which escapes every value. The pages run no script, load nothing, may
not be framed and are never stored; the one stylesheet stands inside the page and the policy names its hash.
Thread-safe: nothing here changes after the import.
"""

import base64
import hashlib
import unicodedata
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from settings_values import is_loopback

PageName = Literal["landing", "consent", "leaving", "refused", "faulty", "error"]

_FOLDER = Path(__file__).resolve().parent / "templates"
_SHOWN_CHARACTERS = 200


def page(
    name: PageName, status: int = 200, **values: str | list[str] | dict[str, str] | None
) -> HTMLResponse:
    """Return a filled page. Raises jinja2.UndefinedError when one of the template's values is not given."""
    html = _environment.get_template(f"{name}.html").render(values)
    return HTMLResponse(html, status, headers=_HEADERS)


def _plain(text: str) -> str:
    """Return a stranger's text as one short line.

    Characters that cannot be seen, or that turn the direction of what follows, could make a name look like another.
    """
    shown = "".join("\N{REPLACEMENT CHARACTER}" if _unseen(character) else character for character in text)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…"


def _unseen(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")


def _is_this_computer(host: str) -> bool:
    """Tell whether a redirect host (a port may follow) is the person's own machine (RFC 8252, 7.3)."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and host.count(":") == 1 else host
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    return is_loopback(name)


def _is_program_link(host: str) -> bool:
    """Tell whether what is shown of a redirect URI is a private-use scheme (RFC 8252, 7.1)."""
    return host.endswith(":")


def _style() -> str:
    return (_FOLDER / "style.css").read_text(encoding="utf-8")


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_environment = Environment(
    loader=FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_environment.filters["plain"] = _plain
_environment.tests["this_computer"] = _is_this_computer
_environment.tests["program_link"] = _is_program_link
_environment.globals["style"] = Markup(_style())  # noqa: S704 - our own file; escaping would change its hash

_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src {_hash_source(_style())}; img-src data:; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    # not no-referrer: with it browsers send "Origin: null" when the consent form is posted
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
