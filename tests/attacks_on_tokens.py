"""Attacks on codes, tokens and the server around them; the table is in test_oauth_attacks.py."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import jwt

from attacks import (
    Move,
    Stage,
    altered,
    consent_page,
    encoded,
    hmac_of,
    json_error,
    unauthorized,
    works,
)
from oauth import INITIALIZE, ME, YOU, App, Tokens, challenge_of, query_of, tokens_of

INVALID_GRANT = json_error("invalid_grant")


# Codes


def code_of_another_client(stage: Stage) -> httpx.Response:
    """A code stolen from one application, redeemed by another that is registered for the same place."""
    victim, thief = stage.app(), stage.app(client_name="Thief")
    assert victim.client_id != thief.client_id
    thief.verifier = victim.verifier
    return thief.redeem(stage.answer(victim))


def code_injected(stage: Stage) -> httpx.Response:
    """A stolen code put into a session of the attacker at the same application: the verifier is another one."""
    app = stage.app()
    stolen = stage.answer(app)
    app.renew()
    return app.redeem(stolen)


def code_twice(stage: Stage) -> httpx.Response:
    """The second time nothing comes, and what the first time gave ends."""
    app = stage.app()
    answer = stage.answer(app)
    tokens = tokens_of(app.redeem(answer))
    works(app.call(tokens.access))
    again = app.redeem(answer)
    unauthorized(app.call(tokens.access))
    INVALID_GRANT(app.refresh(tokens.refresh))
    return again


def code_replayed_without_its_verifier(stage: Stage) -> httpx.Response:
    """Who replays it shows that it leaked, also when he could not have used it."""
    app = stage.app()
    answer = stage.answer(app)
    tokens = tokens_of(app.redeem(answer))
    INVALID_GRANT(app.redeem(answer, code_verifier="v" * 64))
    return app.call(tokens.access)


def code_twice_after_refresh(stage: Stage) -> httpx.Response:
    """What was refreshed in between ends too."""
    app = stage.app()
    answer = stage.answer(app)
    later = tokens_of(app.refresh(tokens_of(app.redeem(answer)).refresh))
    again = app.redeem(answer)
    unauthorized(app.call(later.access))
    INVALID_GRANT(app.refresh(later.refresh))
    return again


def code_many_times_at_once(stage: Stage) -> httpx.Response:
    """However many come at the same moment, one at most gets tokens, and they end: the others were replays."""
    app = stage.app()
    answer = stage.answer(app)
    apps = [stage.app(client_id=app.client_id) for _ in range(12)]
    for other in apps:
        other.verifier = app.verifier
    ready = threading.Barrier(len(apps))

    def redeem(other: App) -> httpx.Response:
        ready.wait()
        return other.redeem(answer)

    with ThreadPoolExecutor(len(apps)) as threads:
        answers = list(threads.map(redeem, apps))
    good = [response for response in answers if response.status_code == 200]
    assert len(good) <= 1
    for response in answers:
        if response not in good:
            INVALID_GRANT(response)
    if not good:
        return app.call(None)
    given = tokens_of(good[0])
    INVALID_GRANT(app.refresh(given.refresh))
    return app.call(given.access)


def as_code(what: Callable[[Stage, App], str]) -> Move:
    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        answer = stage.answer(app)
        return app.redeem(answer, code=what(stage, app))

    return move


def code_altered(stage: Stage) -> httpx.Response:
    app = stage.app()
    answer = stage.answer(app)
    return app.redeem(answer, code=altered(query_of(answer)["code"]))


def code_with_tail(stage: Stage) -> httpx.Response:
    app = stage.app()
    answer = stage.answer(app)
    return app.redeem(answer, code=query_of(answer)["code"] + "x")


def asks_for_token(**values: str | None) -> Move:
    """A request at `/token` of a registered client that has nothing to show."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        return app.token(**({"client_id": app.client_id} | values))

    return move


# Refresh tokens


def refreshes(**changes: str | None) -> Move:
    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        if changes.get("resource"):
            changes["resource"] = str(changes["resource"]).replace("BASE", stage.remote.base_url)
        return app.refresh(stage.tokens(app).refresh, **changes)

    return move


def refresh_of_another_client(stage: Stage) -> httpx.Response:
    stolen = stage.tokens(stage.app()).refresh
    return stage.app(client_name="Thief").refresh(stolen)


def refresh_repeated_by_a_client_that_lost_the_answer(stage: Stage) -> httpx.Response:
    app = stage.app()
    first = stage.tokens(app)
    second = tokens_of(app.refresh(first.refresh))
    again = tokens_of(app.refresh(first.refresh))
    assert again.refresh == second.refresh
    return app.refresh(again.refresh)


def refresh_before_last(stage: Stage) -> httpx.Response:
    """Stolen a while ago and used now: the whole family ends, also what the honest client holds."""
    app = stage.app()
    first = stage.tokens(app)
    second = tokens_of(app.refresh(first.refresh))
    third = tokens_of(app.refresh(second.refresh))
    works(app.call(third.access))
    again = app.refresh(first.refresh)
    unauthorized(app.call(third.access))
    INVALID_GRANT(app.refresh(third.refresh))
    return again


def refresh_whose_successor_was_used(stage: Stage) -> httpx.Response:
    app = stage.app()
    first = stage.tokens(app)
    second = tokens_of(app.refresh(first.refresh))
    third = tokens_of(app.refresh(second.refresh))
    again = app.refresh(first.refresh)
    INVALID_GRANT(app.refresh(third.refresh))
    return again


def refresh_many_times_at_once(stage: Stage) -> httpx.Response:
    """Repetitions at the same moment all get the same successor: one family never has two lines."""
    app = stage.app()
    first = stage.tokens(app)
    apps = [stage.app(client_id=app.client_id) for _ in range(8)]
    ready = threading.Barrier(len(apps))

    def refresh(other: App) -> httpx.Response:
        ready.wait()
        return other.refresh(first.refresh)

    with ThreadPoolExecutor(len(apps)) as threads:
        answers = list(threads.map(refresh, apps))
    assert len({tokens_of(response).refresh for response in answers}) == 1
    return app.refresh(tokens_of(answers[0]).refresh)


def refresh_altered(stage: Stage) -> httpx.Response:
    app = stage.app()
    return app.refresh(altered(stage.tokens(app).refresh))


def as_refresh_token(what: Callable[[Stage, App], str]) -> Move:
    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        return app.refresh(what(stage, app))

    return move


def refresh_asks_for_more(stage: Stage) -> httpx.Response:
    """Another scope, and another resource than was granted, come from no refresh."""
    app = stage.app()
    response = app.refresh(stage.tokens(app).refresh, scope="ssh admin root")
    if response.status_code == 200:
        tokens = tokens_of(response)
        assert set(tokens.claims["scope"].split()) <= {"ssh"}
        assert set(str(tokens.answer.get("scope", "ssh")).split()) <= {"ssh"}
        return app.call(tokens.access)
    json_error("invalid_scope")(response)
    return app.call(stage.tokens(app).access)


# Access tokens


def header_of(make: Callable[[str], dict[str, str]]) -> Move:
    """A good token, presented in a way that does not count."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        return app.call(None, **make(stage.tokens(app).access))

    return move


def token_in_the_url(stage: Stage) -> httpx.Response:
    app = stage.app()
    return app.call(None, f"/sse?access_token={stage.tokens(app, resource=None).access}")


def token_in_the_form(stage: Stage) -> httpx.Response:
    app = stage.app()
    form = {"access_token": stage.tokens(app).access}
    return app.http.post(f"{stage.remote.url}/mcp", data=form, headers={"Accept": "application/json"})


def google_id_token(stage: Stage, _: Tokens) -> str:
    claims = {"iss": stage.google.url, "aud": "our-id-at-google", "email": ME, "email_verified": True}
    return stage.google.sign(claims | {"sub": ME, "exp": 9_999_999_999})


def body_altered(stage: Stage, tokens: Tokens) -> str:
    """Another address, under the signature of the true one."""
    header, _, signature = tokens.access.split(".")
    return f"{header}.{encoded(tokens.claims | {'email': YOU, 'sub': YOU})}.{signature}"


def signature_of_another_token(stage: Stage, tokens: Tokens) -> str:
    other = stage.tokens(sub=YOU).access
    return tokens.access.rpartition(".")[0] + "." + other.rpartition(".")[2]


def key_file_in_header(stage: Stage, tokens: Tokens) -> str:
    """A key id that leads to an empty file, and a signature with the empty key."""
    signed = (
        f"{encoded({'alg': 'HS256', 'typ': 'at+jwt', 'kid': '../../../dev/null'})}.{encoded(tokens.claims)}"
    )
    return f"{signed}.{hmac_of(b'', signed)}"


def consent_request_of(stage: Stage, _: Tokens) -> str:
    _browser, page = consent_page(stage)
    return max(page.fields.values(), key=len)


def code_unspent(stage: Stage, _: Tokens) -> str:
    return query_of(stage.answer(stage.app()))["code"]


def token_for_both(stage: Stage) -> httpx.Response:
    app = stage.app()
    tokens = stage.tokens(app, resource=None)
    works(app.call(tokens.access, "/sse"))
    return app.call(tokens.access, "/mcp")


def token_for_the_origin_with_slash(stage: Stage) -> httpx.Response:
    app = stage.app()
    tokens = stage.tokens(app, resource=stage.remote.base_url + "/")
    works(app.call(tokens.access, "/sse"))
    return app.call(tokens.access, "/mcp")


def session_of_another_person(method: str) -> Move:
    """A session id is no login: with another person's token it neither answers nor ends."""

    def move(stage: Stage) -> httpx.Response:
        mine, yours = stage.app(), stage.app()
        token = stage.tokens(mine, ME).access
        answer = mine.call(token)
        works(answer)
        session = {
            "Mcp-Session-Id": answer.headers["Mcp-Session-Id"],
            "Accept": "application/json, text/event-stream",
            "MCP-Protocol-Version": "2025-06-18",
        }
        listing = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
        url, body = f"{stage.remote.url}/mcp", listing if method == "POST" else None
        foreign = session | {"Authorization": f"Bearer {stage.tokens(yours, YOU).access}"}
        with yours.http.stream(method, url, json=body, headers=foreign) as response:
            if response.status_code != 200:
                response.read()
        own = session | {"Authorization": f"Bearer {token}"}
        again = mine.http.post(url, json=listing, headers=own)
        works(again)
        assert "ssh_execute" in again.text
        return response

    return move


def claims_are_those_of_the_contract(stage: Stage) -> httpx.Response:
    app = stage.app()
    tokens = stage.tokens(app)
    claims = tokens.claims
    assert set(claims) == {"iss", "sub", "email", "aud", "client_id", "scope", "iat", "exp", "jti"}
    assert claims["iss"] == stage.remote.base_url
    assert claims["exp"] - claims["iat"] == tokens.answer["expires_in"] == 3600
    assert claims["email"] == ME
    assert claims["client_id"] == app.client_id
    assert tokens.answer["token_type"].lower() == "bearer"
    return app.call(tokens.access)


def answers_with_tokens_are_not_stored(stage: Stage) -> httpx.Response:
    app = stage.app()
    response = app.redeem(stage.answer(app))
    assert "no-store" in response.headers["Cache-Control"]
    assert "Set-Cookie" not in response.headers
    return response


# Revocation


def revokes_access(stage: Stage) -> httpx.Response:
    app = stage.app()
    tokens = stage.tokens(app)
    works(app.revoke(tokens.access))
    return app.call(tokens.access)


def revokes_refresh(**changes: str) -> Move:
    """The access tokens of the grant end with it (RFC 7009 2.1)."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        tokens = stage.tokens(app)
        works(app.revoke(tokens.refresh, **changes))
        INVALID_GRANT(app.refresh(tokens.refresh))
        return app.call(tokens.access)

    return move


def revokes_for_another_client(stage: Stage) -> httpx.Response:
    """A stranger's request does not log the victim out."""
    app, thief = stage.app(), stage.app(client_name="Thief")
    tokens = stage.tokens(app)
    for token in (tokens.access, tokens.refresh):
        response = thief.revoke(token)
        assert response.status_code in (200, 400, 401)
    works(app.call(tokens.access))
    return app.refresh(tokens.refresh)


def revokes(token: str) -> Move:
    def move(stage: Stage) -> httpx.Response:
        return stage.app().revoke(token)

    return move


def revokes_without_client(stage: Stage) -> httpx.Response:
    app = stage.app()
    tokens = stage.tokens(app)
    response = app.revoke(tokens.refresh, client_id=None)
    works(app.call(tokens.access))
    return response


def challenge_as_verifier(stage: Stage) -> httpx.Response:
    """Who saw the authorization request knows the challenge; with method plain it would do."""
    app = stage.app()
    answer = stage.answer(app)
    return app.redeem(answer, code_verifier=challenge_of(app.verifier))


def message_with_token_for_mcp(stage: Stage) -> httpx.Response:
    app = stage.app()
    headers = {"Authorization": f"Bearer {stage.tokens(app).access}"}
    return app.http.post(
        f"{stage.remote.url}/messages/?session_id={'0' * 32}", json=INITIALIZE, headers=headers
    )


def with_key_of(variable: str) -> Callable[[Stage, Tokens], str]:
    """Signed with another of our keys."""
    return lambda stage, tokens: jwt.encode(
        tokens.claims, stage.remote.environment[variable], "HS256", jwt.get_unverified_header(tokens.access)
    )
