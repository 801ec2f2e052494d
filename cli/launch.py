"""How this very installation is started by a program that has neither the user's PATH nor working directory.

An environment that stays (`.venv`, `uv tool install`, pipx) is started by its console script. One that `uvx` made is
uv's to throw away: there it is `uvx --from` and what the environment was made from, as `direct_url.json` says.
Sources: PEP 610, and the environment variable `UV` that uv gives to the programs it starts.
"""

import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from settings import SettingsError

_NAME = "ssh-mcp-server"
_SUFFIX = ".exe" if os.name == "nt" else ""


def command() -> list[str]:
    """Return the command line, its program by absolute path.

    Raises SettingsError when there is no console script, or nothing says what the environment was made from.
    """
    uv = os.environ.get("UV")
    if uv and _is_in_cache_of(uv):
        return [str(Path(uv).absolute().with_name(f"uvx{_SUFFIX}")), "--from", _origin(), _NAME]
    script = Path(sysconfig.get_path("scripts")) / f"{_NAME}{_SUFFIX}"
    if not script.is_file():
        raise SettingsError(f"{script} does not exist; install the server into an environment of its own")
    return [str(script)]


def _is_in_cache_of(uv: str) -> bool:
    try:
        told = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise SettingsError(f"{uv} does not say where its cache is: {error}") from None
    return Path(sys.prefix).resolve().is_relative_to(Path(told.stdout.strip()).resolve())


def _origin() -> str:
    """Return what `uvx --from` is to be given: a path, or a URL with what to do with it before and after."""
    try:
        text = distribution(_NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    if text is None:
        raise SettingsError("nothing says where this server came from; name its folder or git URL to uvx")
    origin = json.loads(text)
    url: str = origin["url"]
    if (vcs := origin.get("vcs_info")) is not None:
        revision = vcs.get("requested_revision")
        return f"{vcs['vcs']}+{url}" + (f"@{revision}" if revision else "")
    parts = urlsplit(url)
    return url2pathname(parts.path) if parts.scheme == "file" else url
