"""`ssh-mcp-server secrets`: a settings file with fresh signing keys."""

import os
import secrets
from pathlib import Path

import settings
from settings import SettingsError

_KEY_BYTES = 32
_FORM = """\
# Settings of the SSH MCP server: README.md says what each means. The environment wins over this file.
SSH_DEFAULT_HOST=
SSH_DEFAULT_USER=
SSH_KEY_PATH=

# HTTP: the URL that clients see, the OAuth client from https://console.cloud.google.com/apis/credentials,
# and who may log in
PUBLIC_BASE_URL=
GOOGLE_CLIENT_ID=
GOOGLE_CLIENT_SECRET=
ALLOWED_EMAIL=

# HTTP: signing keys. To change one: NEW,OLD; the first signs, all verify
JWT_SECRET={}
SESSION_SECRET={}
OAUTH_CODE_SECRET={}
"""


def write(named: Path | None) -> None:
    """Write a settings file that only its owner may read, and say what is still to be filled in.

    Without a name it goes where the server looks first. Raises SettingsError when a settings file is there already,
    or it cannot be written.
    """
    path = settings.new_env_file(named)
    text = _FORM.format(*(secrets.token_hex(_KEY_BYTES) for _ in range(3)))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    except FileExistsError:
        raise SettingsError(f"{path} is there already; nothing was written") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
    print(
        f"{path} has three fresh keys. Fill in what stands empty there, then: ssh-mcp-server --transport http"
    )
