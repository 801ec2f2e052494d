import base64
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import jwt
import pytest
import time_machine
from itsdangerous import URLSafeSerializer
from jwt.api_jws import PyJWS

from oauth import FAR_AHEAD, LONG_AGO
from oauth_tokens import (
    ACCESS_SECONDS,
    CODE_SECONDS,
    LOGIN_SECONDS,
    Code,
    Refresh,
    Request,
    Tokens,
    Unreadable,
    Visit,
    new_id,
)

ISSUER = "https://mcp.example.com"
BOTH = [f"{ISSUER}/sse", f"{ISSUER}/mcp"]
KEYS = b"j" * 64, b"s" * 32, b"c" * 32

REQUEST = Request(
    "id", "client", "Näme", None, "https://a.example/cb", "c" * 43, "state", [f"{ISSUER}/mcp"], "ssh"
)
VISIT = Visit(REQUEST, "browser")
CODE = Code(
    "family", "client", "https://a.example/cb", "c" * 43, [f"{ISSUER}/mcp"], "ssh", "sub", "me@example.com"
)
REFRESH = Refresh("family", 3, "client", [f"{ISSUER}/mcp"], "ssh", "sub", "me@example.com")


def tokens_of(
    jwt_key: bytes = KEYS[0], session_key: bytes = KEYS[1], code_key: bytes = KEYS[2], *older: bytes
) -> Tokens:
    return Tokens(ISSUER, (jwt_key, *older), (session_key, *older), (code_key, *older))


TOKENS = tokens_of()

MADE: dict[str, Callable[[Tokens], str]] = {
    "client id": lambda tokens: tokens.client_id({"name": "n", "uris": ["https://a.example/cb"]}),
    "request": lambda tokens: tokens.request(REQUEST),
    "state": lambda tokens: tokens.state(VISIT),
    "browser": lambda tokens: tokens.browser(),
    "code": lambda tokens: tokens.code(CODE),
    "refresh": lambda tokens: tokens.refresh(REFRESH),
    "access": lambda tokens: tokens.access(REFRESH, BOTH),
}


def read_browser(tokens: Tokens, text: str) -> bool:
    if not tokens.knows_browser(text):
        raise Unreadable
    return True


READ: dict[str, Callable[[Tokens, str], object]] = {
    "client id": lambda tokens, text: tokens.registration(text),
    "request": lambda tokens, text: tokens.read_request(text),
    "state": lambda tokens, text: tokens.read_state(text),
    "browser": read_browser,
    "code": lambda tokens, text: tokens.read_code(text),
    "refresh": lambda tokens, text: tokens.read_refresh(text),
    "access": lambda tokens, text: tokens.read_access(text, BOTH),
}
KINDS = list(MADE)


def test_what_is_made_is_read_as_it_was() -> None:
    assert TOKENS.registration(TOKENS.client_id({"name": "n"})) == {"name": "n"}
    assert TOKENS.read_request(TOKENS.request(REQUEST)) == REQUEST
    assert TOKENS.read_state(TOKENS.state(VISIT)) == VISIT
    assert TOKENS.read_code(TOKENS.code(CODE)) == CODE
    assert TOKENS.read_refresh(TOKENS.refresh(REFRESH)) == REFRESH
    assert TOKENS.knows_browser(TOKENS.browser())


@pytest.mark.parametrize("made", KINDS)
@pytest.mark.parametrize("read", KINDS)
def test_no_string_is_taken_for_another_kind(made: str, read: str) -> None:
    text = MADE[made](TOKENS)
    if made == read:
        assert READ[read](TOKENS, text)
    else:
        with pytest.raises(Unreadable):
            READ[read](TOKENS, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_string_is_bound_to_its_own_secret_even_if_all_secrets_were_one(kind: str) -> None:
    same = Tokens(ISSUER, (KEYS[0],), (KEYS[0],), (KEYS[0],))
    others = [text for name, make in MADE.items() if name != kind for text in [make(same)]]
    for text in others:
        with pytest.raises(Unreadable):
            READ[kind](same, text)


@pytest.mark.parametrize("kind", KINDS)
def test_changing_any_character_makes_a_string_unreadable(kind: str) -> None:
    text = MADE[kind](TOKENS)
    for place in range(len(text) - 1):  # the last one of base64 has bits that say nothing
        changed = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
        with pytest.raises(Unreadable):
            READ[kind](TOKENS, changed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["", ".", "..", "...", "a.b.c", "é", "\ud7ff", "\ud800", "x" * 100_000, "[" * 50_000]
)
def test_nonsense_is_unreadable(kind: str, text: str) -> None:
    with pytest.raises(Unreadable):
        READ[kind](TOKENS, text)


@pytest.mark.parametrize("kind", KINDS)
def test_strings_of_a_server_with_other_secrets_are_unreadable(kind: str) -> None:
    stranger = tokens_of(b"x" * 32, b"y" * 32, b"z" * 32)
    with pytest.raises(Unreadable):
        READ[kind](TOKENS, MADE[kind](stranger))


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_secret_is_rotated_old_strings_are_read_and_new_ones_need_the_new_secret(kind: str) -> None:
    old, new = Tokens(ISSUER, *[(b"o" * 32,)] * 3), Tokens(ISSUER, *[(b"n" * 32,)] * 3)
    both = Tokens(ISSUER, *[(b"n" * 32, b"o" * 32)] * 3)
    assert READ[kind](both, MADE[kind](old))
    assert READ[kind](new, MADE[kind](both))
    with pytest.raises(Unreadable):
        READ[kind](old, MADE[kind](both))


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [("code", CODE_SECONDS), ("request", LOGIN_SECONDS), ("state", LOGIN_SECONDS), ("browser", 24 * 3600)],
)
def test_a_timed_string_is_read_until_its_time_is_over(kind: str, seconds: int) -> None:
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        text = MADE[kind](TOKENS)
        clock.shift(seconds)
        assert READ[kind](TOKENS, text)
        clock.shift(1)
        with pytest.raises(Unreadable):
            READ[kind](TOKENS, text)


def test_a_string_from_the_future_is_unreadable() -> None:
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        text = TOKENS.code(CODE)
        clock.shift(-60)
        with pytest.raises(Unreadable):
            TOKENS.read_code(text)


def test_an_expired_code_is_read_by_whom_its_age_does_not_matter_to() -> None:
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        text = TOKENS.code(CODE)
        clock.shift(3600)
        assert TOKENS.read_code(text, 3600) == CODE


def test_equal_registrations_give_equal_ids_and_equal_refresh_tokens_are_equal() -> None:
    assert MADE["client id"](TOKENS) == MADE["client id"](tokens_of())
    assert MADE["refresh"](TOKENS) == MADE["refresh"](tokens_of())
    assert TOKENS.refresh(REFRESH) != TOKENS.refresh(replace(REFRESH, generation=4))


def test_browsers_and_identifiers_are_never_the_same() -> None:
    assert len({TOKENS.browser() for _ in range(100)}) == 100
    identifiers = {new_id() for _ in range(100)}
    assert len(identifiers) == 100
    assert not any("." in identifier for identifier in identifiers)


def test_a_payload_with_other_fields_is_unreadable() -> None:
    ours = URLSafeSerializer([KEYS[0]], "refresh", signer_kwargs=TOKENS._refreshes.signer_kwargs)
    assert TOKENS.read_refresh(str(ours.dumps(asdict(REFRESH)))) == REFRESH
    for payload in ({"family": "f"}, ["family"], None, "family", {"strange": 1}, asdict(CODE)):
        with pytest.raises(Unreadable):
            TOKENS.read_refresh(str(ours.dumps(payload)))


# Access tokens


def claims_of(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


def test_an_access_token_has_the_promised_claims() -> None:
    before = int(time.time())
    token = TOKENS.access(REFRESH, [f"{ISSUER}/mcp"])
    claims = claims_of(token)
    assert jwt.get_unverified_header(token) == {"alg": "HS256", "typ": "at+jwt"}
    assert before <= claims["iat"] <= time.time()
    assert claims.pop("exp") == claims.pop("iat") + ACCESS_SECONDS
    assert claims.pop("jti").startswith("family.")
    assert claims == {
        "iss": ISSUER,
        "sub": "sub",
        "email": "me@example.com",
        "aud": [f"{ISSUER}/mcp"],
        "client_id": "client",
        "scope": "ssh",
    }


def test_an_access_token_is_read_with_the_family_that_it_came_of() -> None:
    access = TOKENS.read_access(TOKENS.access(REFRESH, [f"{ISSUER}/mcp"]), BOTH)
    assert (access.client_id, access.audience, access.scope) == ("client", [f"{ISSUER}/mcp"], "ssh")
    assert (access.sub, access.email, access.family) == ("sub", "me@example.com", "family")


def test_an_access_token_ends_to_the_second_and_may_be_of_a_replica_that_is_ahead() -> None:
    with time_machine.travel(1_800_000_000, tick=False) as clock:
        text = TOKENS.access(REFRESH, BOTH)
        clock.shift(-5)
        assert TOKENS.read_access(text, BOTH)
        clock.shift(-1)
        with pytest.raises(Unreadable):
            TOKENS.read_access(text, BOTH)
        clock.move_to(1_800_000_000 + ACCESS_SECONDS - 1)
        assert TOKENS.read_access(text, BOTH)
        clock.shift(1)
        with pytest.raises(Unreadable):
            TOKENS.read_access(text, BOTH)


def test_two_access_tokens_of_one_grant_differ() -> None:
    first, second = (TOKENS.read_access(TOKENS.access(REFRESH, BOTH), BOTH) for _ in range(2))
    assert first.jti != second.jti
    assert first.family == second.family


def signed(changes: dict[str, Any], key: bytes = KEYS[0], algorithm: str = "HS256", **header: Any) -> str:
    claims = {**claims_of(TOKENS.access(REFRESH, BOTH)), **changes}
    kept = {name: value for name, value in claims.items() if value is not None}
    return PyJWS().encode(json.dumps(kept).encode(), key, algorithm, {"typ": "at+jwt"} | header)


def test_an_access_token_made_by_hand_as_ours_are_is_read() -> None:
    assert TOKENS.read_access(signed({}), BOTH)


def unsigned(token: str) -> str:
    header = base64.urlsafe_b64encode(json.dumps({"alg": "none", "typ": "at+jwt"}).encode()).rstrip(b"=")
    return f"{header.decode()}.{token.split('.')[1]}."


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(signed({name: None}), id=f"without {name}")
        for name in ("iss", "sub", "email", "aud", "client_id", "scope", "iat", "exp", "jti")
    ]
    + [
        pytest.param(signed({name: 7}), id=f"{name} is a number")
        for name in ("iss", "sub", "email", "aud", "client_id", "scope", "jti")
    ]
    + [
        pytest.param(signed({"iss": f"{ISSUER}/"}), id="issuer with a slash"),
        pytest.param(signed({"iss": "https://other.example"}), id="other issuer"),
        pytest.param(signed({"aud": ISSUER}), id="audience is the origin"),
        pytest.param(signed({"aud": ["https://other.example/mcp"]}), id="other audience"),
        pytest.param(signed({"aud": [f"{ISSUER}/mcp", 7]}), id="audience with a number"),
        pytest.param(signed({"exp": LONG_AGO}), id="expired"),
        pytest.param(signed({"exp": "never"}), id="expiry is text"),
        pytest.param(signed({"iat": FAR_AHEAD}), id="issued in the future"),
        pytest.param(signed({"nbf": FAR_AHEAD}), id="not valid yet"),
        pytest.param(signed({}, typ="JWT"), id="type JWT"),
        pytest.param(signed({}, typ=None), id="no type"),
        pytest.param(signed({}, algorithm="HS384"), id="HS384 with our key"),
        pytest.param(signed({}, algorithm="HS512"), id="HS512 with our key"),
        pytest.param(unsigned(signed({})), id="algorithm none"),
        pytest.param(signed({})[: -len("signature")], id="cut"),
    ],
)
def test_an_access_token_that_is_not_as_ours_are_is_unreadable(token: str) -> None:
    with pytest.raises(Unreadable):
        TOKENS.read_access(token, BOTH)


# Forms, and what goes to Google


def test_a_forms_token_is_of_one_browser_and_one_request() -> None:
    token = TOKENS.csrf("browser", "request")
    assert TOKENS.is_csrf(token, "browser", "request")
    assert not TOKENS.is_csrf(token, "other", "request")
    assert not TOKENS.is_csrf(token, "browser", "other")
    assert not TOKENS.is_csrf("", "browser", "request")
    assert not TOKENS.is_csrf("é", "browser", "request")
    assert not TOKENS.is_csrf(TOKENS.csrf("browserrequest", ""), "browser", "request")


def test_a_forms_token_survives_the_rotation_of_the_secret() -> None:
    token = tokens_of(session_key=b"o" * 32).csrf("browser", "request")
    assert Tokens(ISSUER, (KEYS[0],), (b"n" * 32, b"o" * 32), (KEYS[2],)).is_csrf(token, "browser", "request")


def test_nonce_and_verifier_differ_and_belong_to_one_state() -> None:
    first, second = TOKENS.state(VISIT), TOKENS.state(replace(VISIT, browser="other"))
    assert len({*TOKENS.google_secrets(first), *TOKENS.google_secrets(second)}) == 4
    assert TOKENS.google_secrets(first) == tokens_of().google_secrets(first)
    assert 43 <= len(TOKENS.google_secrets(first)[1]) <= 128


def test_a_login_that_is_at_google_survives_the_rotation_of_the_secret() -> None:
    old = tokens_of(session_key=b"o" * 32)
    both = Tokens(ISSUER, (KEYS[0],), (b"n" * 32, b"o" * 32), (KEYS[2],))
    state = old.state(VISIT)
    assert both.read_state(state) == VISIT
    assert both.google_secrets(state) == old.google_secrets(state)
