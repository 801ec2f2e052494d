"""The text of answers: what it may hold of what the other side says."""

from ssh_answers import Entry, Listing


def test_owner_and_group_are_names_that_the_other_side_makes_up() -> None:
    entry = Entry(
        name="a\x1b[2J",
        type="symlink",
        size=1,
        mode="0644",
        owner="me\x1b]0;x\x07",
        group="us\nroot",
        mtime=None,
        link_target="b\rc",
    )
    listing = Listing(path="/p", entries=[entry], total=1, truncated=False, next_offset=None)
    row, facts = listing.text().splitlines()
    assert row.split() == [
        "l",
        "0644",
        "me\\x1b]0;x\\x07:us\\x0aroot",
        "1",
        "-",
        "a\\x1b[2J",
        "->",
        "b\\x0dc",
    ]
    assert facts == "[1 entries · /p]"
