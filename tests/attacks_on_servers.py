"""Attacks that need a server of their own: its clock moved, its settings changed, its store gone."""

import signal
from collections.abc import Callable

import httpx

from attacks import Move, Stage, gives_code, unauthorized, works
from attacks_on_tokens import INVALID_GRANT
from oauth import KISS, ME, App, Page, Remote, Tokens, query_of, tokens_of
from redis_process import Redis

MINUTE, HOUR, DAY = 60, 3600, 86_400


# The clock


def code_redeemed_after(seconds: float) -> Move:
    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        answer = stage.answer(app)
        stage.remote.move_clock(seconds)
        return app.redeem(answer)

    return move


def after(seconds: float, use: Callable[[App, Tokens], httpx.Response]) -> Move:
    """Use tokens so long after the login."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        tokens = stage.tokens(app)
        stage.remote.move_clock(seconds)
        return use(app, tokens)

    return move


def access_token_used_after(seconds: float) -> Move:
    return after(seconds, lambda app, tokens: app.call(tokens.access))


def refreshed_after(seconds: float) -> Move:
    return after(seconds, lambda app, tokens: app.refresh(tokens.refresh))


def kept_alive_beyond_the_end(stage: Stage) -> httpx.Response:
    """A family ends 30 days after its login, however often it is used."""
    app = stage.app()
    tokens = stage.tokens(app)
    for day in (10, 20, 29):
        stage.remote.move_clock(day * DAY)
        tokens = tokens_of(app.refresh(tokens.refresh))
    stage.remote.move_clock(30 * DAY + HOUR)
    return app.refresh(tokens.refresh)


def refresh_repeated_after(seconds: float) -> Move:
    """A repetition that comes too late is no retry: somebody else has the token."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        first = stage.tokens(app)
        second = tokens_of(app.refresh(first.refresh))
        stage.remote.move_clock(seconds)
        again = app.refresh(first.refresh)
        if again.status_code != 200:
            unauthorized(app.call(second.access))
            INVALID_GRANT(app.refresh(second.refresh))
        return again

    return move


def consent_sent_after(seconds: float) -> Move:
    def move(stage: Stage) -> httpx.Response:
        browser = stage.browser()
        page = browser.consent(stage.app().authorize_url())
        stage.remote.move_clock(seconds)
        return browser.post(page, page.fields | {"decision": "approve"})

    return move


def google_answers_after(seconds: float) -> Move:
    def move(stage: Stage) -> httpx.Response:
        browser = stage.browser()
        url = browser.callback_url(stage.app().authorize_url())
        stage.remote.move_clock(seconds)
        return browser.get(url)

    return move


def revoked_and_used_after(seconds: float) -> Move:
    """Nothing is forgotten while the token would be good otherwise."""

    def move(stage: Stage) -> httpx.Response:
        app = stage.app()
        tokens = stage.tokens(app)
        works(app.revoke(tokens.access))
        stage.remote.move_clock(seconds)
        return app.call(tokens.access)

    return move


def replayed_at_the_last_moment(stage: Stage) -> httpx.Response:
    app = stage.app()
    answer = stage.answer(app)
    tokens = tokens_of(app.redeem(answer))
    stage.remote.move_clock(54)
    INVALID_GRANT(app.redeem(answer))
    stage.remote.move_clock(HOUR - MINUTE)
    return app.call(tokens.access)


# Settings


def whitelist_shrinks(remote: Remote, stage: Stage) -> None:
    """Who is taken off the list is out with the next start, with access token and refresh token alike."""
    app = stage.app(remote)
    gone, stays = stage.tokens(app, KISS), stage.tokens(app, ME)
    works(app.call(gone.access))
    remote.restart(ALLOWED_EMAIL=ME)
    unauthorized(app.call(gone.access))
    INVALID_GRANT(app.refresh(gone.refresh))
    works(app.call(stays.access))
    works(app.refresh(stays.refresh))


def keys_change(remote: Remote, stage: Stage) -> None:
    """A key behind the comma still verifies; once it is gone, what it signed is gone."""
    app = stage.app(remote)
    tokens = stage.tokens(app)
    old, new = remote.environment["JWT_SECRET"], "n" * 40
    remote.restart(JWT_SECRET=f"{new},{old}")
    works(app.call(tokens.access))
    later = stage.tokens(app)
    remote.restart(JWT_SECRET=new)
    unauthorized(app.call(tokens.access))
    works(app.call(later.access))


def restart_forgets_nothing(remote: Remote, stage: Stage) -> None:
    """Used codes, revoked tokens and the generation of refresh tokens outlive the server, even killed."""
    once, app = stage.app(remote), stage.app(remote)
    answer = stage.answer(once)
    tokens = tokens_of(once.redeem(answer))
    revoked = stage.tokens(app)
    works(app.revoke(revoked.refresh))
    first = stage.tokens(app)
    third = tokens_of(app.refresh(tokens_of(app.refresh(first.refresh)).refresh))
    remote.stop(signal.SIGKILL)
    remote.start()
    works(app.call(third.access))
    unauthorized(app.call(revoked.access))
    INVALID_GRANT(once.redeem(answer))
    unauthorized(app.call(tokens.access))
    INVALID_GRANT(app.refresh(first.refresh))
    unauthorized(app.call(third.access))


def cookie_behind_https(remote: Remote, stage: Stage) -> None:
    """Only our own host, and only over TLS, can have set it (RFC 6265bis 4.1.3.2)."""
    app = stage.app(remote)
    http = stage.http("127.0.0.1")
    headers = {"Host": "mcp.example.com", "X-Forwarded-Proto": "https"}
    response = http.get(app.authorize_url(), headers=headers)
    consent = response.headers["Location"]
    assert consent.startswith("https://mcp.example.com/consent?")
    response = http.get(consent.replace("https://mcp.example.com", remote.url), headers=headers)
    works(response)
    cookie = response.headers["Set-Cookie"]
    assert cookie.startswith("__Host-ssh-mcp=")
    assert {"secure", "httponly", "path=/", "samesite=lax"} <= {p.strip().lower() for p in cookie.split(";")}
    assert "domain" not in cookie.lower()


# The store


def store_goes_and_comes_back(remote: Remote, redis: Redis, stage: Stage) -> None:
    """While nobody can tell what is revoked or used, nothing is let in and nothing is given."""
    app, browser = stage.app(remote), stage.browser(remote)
    tokens = stage.tokens(app)
    answer = stage.answer(app)
    page = browser.consent(app.authorize_url())
    works(app.call(tokens.access))
    redis.stop()
    for response in (
        app.call(tokens.access),
        app.refresh(tokens.refresh),
        app.redeem(answer),
        app.revoke(tokens.access),
    ):
        assert response.status_code == 503, (response.request.url, response.status_code, response.text)
        assert "access_token" not in response.text
        assert "serverInfo" not in response.text
    assert app.refresh(tokens.refresh).json()["error"] == "temporarily_unavailable"
    assert Page(browser.post(page, page.fields | {"decision": "approve"})).status in (200, 503)
    assert stage.http().get(f"{remote.url}/health").status_code == 200
    redis.start()
    works(app.call(tokens.access))
    works(app.redeem(answer))
    works(app.refresh(tokens.refresh))
    gives_code(browser.get(browser.callback_url(app.authorize_url())))
    assert query_of(answer)["code"] not in remote.log()
