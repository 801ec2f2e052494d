"""A window of bytes is encoded as it would be in one piece, however its bytes come."""

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssh_bytes import Base64Window


@given(st.lists(st.binary(max_size=50)), st.integers(1, 200), st.booleans())
def test_pieces_give_what_the_whole_would(pieces: list[bytes], most: int, hashed: bool) -> None:
    window, whole = Base64Window(most, hashed=hashed), b"".join(pieces)
    for piece in pieces:
        window.feed(piece)
    assert base64.b64decode(window.text(), validate=True) == whole[:most]
    assert window.text() == base64.b64encode(whole[:most]).decode()
    assert (window.size, window.beyond) == (len(whole[:most]), len(whole[most:]))
    expected = hashlib.sha256(whole).hexdigest() if hashed and len(whole) <= most else None
    assert window.sha256() == expected


@pytest.mark.parametrize("most", [1, 2, 3])
def test_end_of_the_window_within_a_piece_is_kept(most: int) -> None:
    window = Base64Window(most, hashed=True)
    window.feed(b"abcdef")
    window.feed(b"ghi")
    assert (base64.b64decode(window.text()), window.beyond) == (b"abcdef"[:most], 9 - most)
