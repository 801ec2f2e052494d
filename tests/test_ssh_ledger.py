"""What was begun is remembered by owner, and no owner's memory grows without end."""

from ssh_answers import JobState
from ssh_ledger import Ledger, in_background


def test_owners_see_their_own_the_last_one_first() -> None:
    ledger = Ledger()
    for owner, name in (("me", "one"), ("you", "two"), ("me", "three")):
        ledger.note(owner, name, f"id of {name}", "web1", f"run {name}", in_background)
    assert [(begun.name, state) for begun, state in ledger.of("me")] == [
        ("three", "background"),
        ("one", "background"),
    ]
    assert ledger.command_of("me", "one") == "run one"
    assert ledger.command_of("me", "two") is None
    assert ledger.of("nobody") == []


def test_what_is_forgotten_is_not_listed() -> None:
    def forgotten() -> JobState | None:
        return None

    ledger = Ledger()
    ledger.note("me", "one", "id", "web1", "true", forgotten)
    assert ledger.of("me") == []


def test_one_owner_pushes_out_only_what_is_their_own() -> None:
    ledger = Ledger()
    ledger.note("you", "yours", "id", "web1", "true", in_background)
    for number in range(300):
        ledger.note("me", str(number), "i" * 30_000, "w" * 30_000, "c" * 30_000, in_background)
    mine = [begun for begun, _ in ledger.of("me")]
    assert mine[0].name == "299"
    assert len(mine) < 100
    assert sum(len(one.job_id) + len(one.where) + len(one.command) for one in mine) < 2**20
    assert mine[0].command == "c" * 500 + " [... 29500 more characters]"
    assert len(ledger.of("you")) == 1
