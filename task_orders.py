"""What travels through Redis when a command runs as an MCP task: orders there, progress and outcomes back, sealed.

Whoever can read Redis learns no argument and no output; whoever can write to it can have nothing run, and can give
nobody an outcome that belongs to somebody else's task: both are encrypted and authenticated (Fernet: AES-128-CBC and
HMAC-SHA256) under keys derived with HKDF (RFC 5869) from the secret that signs job ids: `SESSION_SECRET` over HTTP,
over stdio the user's own job key. An order names its task, its owner and the job that it begins, so a copy of one is
the same order: the remote host lets it begin once. Orders expire before the host forgets that.

Pure: keys and models in, text out. Thread-safe.
"""

from base64 import urlsafe_b64encode
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Literal, TypeVar

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict, Field

from ssh_errors import RefusedError

_LIFETIME_SECONDS = 12 * 3600

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T", "Outcome", "Progress")


class Command(BaseModel):
    """The arguments of ssh_execute that begin a command; what else it takes cannot be asked as a task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str
    cwd: str | None = None
    env: dict[str, str] | None = None
    input: str = ""
    timeout: float = 45
    on_timeout: Literal["detach", "kill"] = "detach"
    host: str | None = None
    user: str | None = None
    port: int | None = None


class Order(BaseModel):
    """One command that somebody may have run. `job_id` is the task's id and the handle of the job that it begins."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    owner: str
    client: str | None = Field(description="the OAuth client, None over stdio")
    token: str | None = Field(description="the `jti` of the access token, None over stdio")
    confirmed: bool = Field(description="whether a person agreed (CONFIRM)")
    command: Command


class Outcome(BaseModel):
    """What a call of the tool would have answered, for the task it belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    text: str
    fields: dict[str, Any] | None = Field(description="None for an error")


class Progress(BaseModel):
    """How a command goes, for the task it belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    text: str


class Seal:
    """Seals and opens with keys of which the first seals and all open. `queue` is where those who share it meet."""

    def __init__(self, keys: Sequence[bytes], queue: str) -> None:
        self.queue = queue
        self._orders = MultiFernet([_fernet(key, b"order") for key in keys])
        self._outcomes = MultiFernet([_fernet(key, b"outcome") for key in keys])
        self._progress = MultiFernet([_fernet(key, b"progress") for key in keys])

    @classmethod
    def of_members(cls, session_keys: Sequence[bytes]) -> "Seal":
        """Return the seal of servers that share SESSION_SECRET."""
        return cls(session_keys, "ssh-mcp-server")

    @classmethod
    def of_local_user(cls, job_key: str) -> "Seal":
        """Return the seal of one user's servers over stdio; nobody else's see their queue."""
        return cls([job_key.encode()], f"ssh-mcp-server-{sha256(job_key.encode()).hexdigest()[:16]}")

    def order(self, order: Order) -> str:
        """Return an order as it travels."""
        return self._orders.encrypt(order.model_dump_json(exclude_unset=True).encode()).decode()

    def outcome(self, outcome: Outcome) -> str:
        """Return an outcome as it travels."""
        return self._outcomes.encrypt(outcome.model_dump_json().encode()).decode()

    def progress(self, progress: Progress) -> str:
        """Return as it travels how a command goes."""
        return self._progress.encrypt(progress.model_dump_json().encode()).decode()

    def opened_order(self, text: str) -> Order:
        """Return the order that was sealed. Raises RefusedError for any other text, and for one that is too old."""
        return _opened(self._orders, text, Order, _LIFETIME_SECONDS)

    def opened_outcome(self, text: str, job_id: str) -> Outcome:
        """Return the outcome of that task. Raises RefusedError for any other text or task."""
        return _of_task(job_id, _opened(self._outcomes, text, Outcome, None))

    def opened_progress(self, text: bytes | str, job_id: str) -> Progress:
        """Return how the command of that task goes. Raises RefusedError for any other text or task."""
        return _of_task(job_id, _opened(self._progress, text, Progress, None))


def _of_task(job_id: str, told: T) -> T:
    if told.job_id != job_id:
        raise RefusedError("what Redis holds of this task belongs to another one")
    return told


def _opened(fernets: MultiFernet, text: bytes | str, kind: type[M], lifetime_seconds: int | None) -> M:
    try:
        return kind.model_validate_json(fernets.decrypt(text, lifetime_seconds))
    except (InvalidToken, TypeError, ValueError):
        raise RefusedError(
            "what Redis holds for this task was not sealed with this server's key (SESSION_SECRET), or too long ago"
        ) from None


def _fernet(key: bytes, purpose: bytes) -> Fernet:
    derived = HKDF(SHA256(), 32, salt=None, info=b"ssh-mcp-server task " + purpose).derive(key)
    return Fernet(urlsafe_b64encode(derived))
