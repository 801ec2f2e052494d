"""Writes the README's table of settings, and `.env.example`, from `settings.py`.

Run it after a change there: `.venv/bin/python docs/settings_reference.py`. A variable's default and what would do for
it are its field's; what it is for is the string below the field. Both files hold every variable that is enforced.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import settings
from settings import Settings

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- made by docs/settings_reference.py -->\n", "<!-- end of it -->\n"
_WIDTH = 110
_PREFACE = """\
# Settings of the SSH MCP server, made by docs/settings_reference.py from settings.py. Copy to .env beside app.py
# (chmod 600), or to ssh-mcp-server/.env in your configuration directory. The environment wins over this file. An empty
# value is as good as none.
"""


@dataclass(frozen=True)
class Variable:
    """One environment variable, as a reader is told of it."""

    name: str
    default: str
    value: str
    purpose: str


def variables() -> Iterator[Variable]:
    """Yield every variable that is enforced, in the order of `settings.py`."""
    purposes = _strings_below_fields()
    for name, field in Settings.model_fields.items():
        if field.description is not None:
            default = _shown(name, field.default)
            yield Variable(name.upper(), default, field.description, purposes[name])


def _strings_below_fields() -> dict[str, str]:
    fields = ast.parse(textwrap.dedent(inspect.getsource(Settings).partition("\n")[2])).body
    strings = {}
    for statement, below in pairwise(fields):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                strings[name] = " ".join(text.split())
    return strings


def _shown(name: str, default: object) -> str:
    if name == "ssh_default_user":
        return "your user name"
    if name == "google_discovery_url":
        return "Google's"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Path):
        return f"~/{default.relative_to(Path.home())}"
    return "none" if default is None else str(default)


def table() -> str:
    """Return the README's table."""
    rows = (
        f"| `{variable.name}` | {variable.default} | {_cell(variable.value)} | {_cell(variable.purpose)} |\n"
        for variable in variables()
    )
    return "| variable | default | value | what it is for |\n|---|---|---|---|\n" + "".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def example() -> str:
    """Return `.env.example`: every variable unset, so that a copy decides nothing until it is filled in."""
    return _PREFACE + "".join(f"\n{_comment(variable)}{variable.name}=\n" for variable in variables())


def _comment(variable: Variable) -> str:
    text = f"{variable.purpose.replace('`', '')} Give {variable.value}. Default: {variable.default}"
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def with_table(readme: str) -> str:
    """Return the README with the table in the place of the one it holds."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))
    (ROOT / ".env.example").write_text(example())
    print(f"README.md and .env.example hold {len(list(variables()))} settings of {settings.__version__}")


if __name__ == "__main__":
    main()
