"""Attacks on registration, consent and the way to Google and back; the table is in test_oauth_attacks.py."""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import jwt
import pytest

from attacks import (
    GOOD,
    Move,
    Stage,
    a_page,
    altered,
    asks,
    asks_as,
    check_page_headers,
    comes_back_with,
    consent_page,
    gives_code,
    json_error,
    listener,
    sent_back,
)
from oauth import CALLBACK, ME, STRANGER, YOU, Page, query_of

REFUSED_URI = json_error("invalid_redirect_uri")
NO_GRANT = json_error("unsupported_grant_type", "unauthorized_client", "invalid_client_metadata")
REFUSED_DATA = json_error("invalid_client_metadata", "invalid_redirect_uri")
BAD_REQUEST = a_page(400)
INVALID = sent_back("invalid_request")
FORBIDDEN = a_page(400, 403)


def registered_name_is_not_markup(stage: Stage) -> httpx.Response:
    app = stage.app(client_name='<script>alert(1)</script><img src=x onerror="x">')
    _, page = consent_page(stage, app)
    assert "<script" not in page.html
    assert "<img src=x" not in page.html
    return page.response


def registered_name_cannot_reverse_the_text(stage: Stage) -> httpx.Response:
    """A right-to-left override makes another host be read than the one that is written."""
    response = stage.app().register(redirect_uris=[CALLBACK], client_name="Bank \u202emoc.live\u202c\u2066")
    if response.status_code == 201:
        app = stage.app(client_id=response.json()["client_id"])
        _, page = consent_page(stage, app)
        assert not re.search("[\u202a-\u202e\u2066-\u2069]", page.html)
        return page.response
    REFUSED_DATA(response)
    return stage.http().get(stage.remote.url)


def registered_host_that_looks_like_another(stage: Stage) -> httpx.Response:
    """Cyrillic letters in a host are shown as they travel, in punycode, or are refused."""
    response = stage.app().register(redirect_uris=["https://\u0430pple.example/callback"])
    if response.status_code == 201:
        app = stage.app(client_id=response.json()["client_id"])
        (uri,) = response.json()["redirect_uris"]
        page = stage.browser().consent(app.authorize_url(redirect_uri=uri))
        assert "\u0430pple" not in page.html
        assert "xn--" in page.html
        return page.response
    REFUSED_URI(response)
    return stage.http().get(stage.remote.url)


def registered_links_are_not_fetched(stage: Stage) -> httpx.Response:
    with listener() as (port, seen):
        here = f"http://127.0.0.1:{port}"
        links = {name: f"{here}/{name}" for name in ("client_uri", "logo_uri", "jwks_uri", "policy_uri")}
        response = stage.app().register(redirect_uris=[CALLBACK], **links)
        app = stage.app(client_id=response.json()["client_id"])
        _, page = consent_page(stage, app)
        assert not seen
        assert f"src={here}" not in page.html.replace('"', "")
    return page.response


def registered_script_is_no_link(stage: Stage) -> httpx.Response:
    response = stage.app().register(redirect_uris=[CALLBACK], client_uri="javascript:alert(1)")
    if response.status_code == 201:
        _, page = consent_page(stage, stage.app(client_id=response.json()["client_id"]))
        assert "javascript:" not in page.html
        return page.response
    REFUSED_DATA(response)
    return stage.http().get(stage.remote.url)


def registration_for_other_grants_gives_none_of_them(stage: Stage) -> httpx.Response:
    response = stage.app().register(
        redirect_uris=[CALLBACK], grant_types=["client_credentials", "password", "implicit"]
    )
    if response.status_code == 400:
        return response
    client_id = response.json()["client_id"]
    return stage.app(client_id=client_id).token(grant_type="client_credentials", client_id=client_id)


def asks_with_client_id_of_another_server(stage: Stage) -> httpx.Response:
    """Signed, but by keys that are not ours."""
    kind, _, rest = stage.app().client_id.partition(".")
    return asks_as(f"{kind}.{altered(rest)}")(stage)


def asks_with_two_redirect_uris(first: str, second: str) -> Move:
    def move(stage: Stage) -> httpx.Response:
        app = stage.app(redirect_uri=GOOD)
        pairs = [pair for pair in app.request().items() if pair[0] != "redirect_uri"]
        pairs += [("redirect_uri", first), ("redirect_uri", second)]
        return stage.browser().get(f"{stage.remote.url}/authorize?{urlencode(pairs)}")

    return move


def uses_as_client_id(what: Callable[[Stage], str]) -> Move:
    return lambda stage: asks_as(what(stage))(stage)


def consent_request(stage: Stage) -> str:
    _, page = consent_page(stage)
    return max(page.fields.values(), key=len)


def code_of(stage: Stage) -> str:
    return query_of(stage.answer(stage.app()))["code"]


def google_state(stage: Stage) -> str:
    return query_of(stage.browser().google_url(stage.app().authorize_url()))["state"]


def authorize_has_no_side_effect(stage: Stage) -> httpx.Response:
    """Clients open it before the browser does, and caches after it (OAuth 2.1: GET is safe)."""
    app, http = stage.app(), stage.http()
    first, second = (http.get(app.authorize_url()) for _ in range(2))
    assert first.status_code == second.status_code == 302
    assert "Set-Cookie" not in first.headers
    assert first.headers["Location"].startswith(f"{stage.remote.base_url}/consent?")
    return stage.browser().get(app.authorize_url())


def state_is_returned_as_it_was(stage: Stage) -> httpx.Response:
    """Line breaks and markup in `state` end in no header and no page, and come back encoded."""
    evil = "x\r\nSet-Cookie: a=b\r\n\r\n<script>alert(1)</script>'\"&code=evil"
    app, browser = stage.app(), stage.browser()
    url = app.authorize_url(state=evil)
    page = browser.consent(url)
    assert "<script>alert" not in page.html
    response = browser.get(browser.callback_url(url))
    assert query_of(response.headers["Location"])["state"] == evil
    assert "a" not in response.cookies
    return response


def long_state(stage: Stage) -> httpx.Response:
    return stage.browser().get(stage.app().authorize_url(state="s" * 30_000))


def request_uri_is_not_fetched(stage: Stage) -> httpx.Response:
    with listener() as (port, seen):
        response = asks(more=f"&request_uri={quote(f'http://127.0.0.1:{port}/x')}")(stage)
        assert not seen
    return response


def prompt_none_gives_no_code(stage: Stage) -> httpx.Response:
    """Also for a browser whose person agreed a moment ago."""
    app, browser = stage.app(), stage.browser()
    app.log_in(ME, browser)
    return browser.get(app.authorize_url(prompt="none"))


def second_login_asks_again(stage: Stage) -> httpx.Response:
    """Anybody may send a browser here in the name of an application that was approved before."""
    app, browser = stage.app(), stage.browser()
    app.log_in(ME, browser)
    page = browser.consent(app.authorize_url())
    assert page.action == f"{stage.remote.url}/consent"
    return page.response


def fragment_as_response_mode(stage: Stage) -> httpx.Response:
    app, browser = stage.app(), stage.browser()
    url = app.authorize_url(response_mode="fragment")
    first = browser.get(url)
    if first.status_code != 200:
        return first
    answer = browser.log_in(url)
    assert "#" not in answer
    return first


def consent_without_cookie(stage: Stage) -> httpx.Response:
    browser, page = consent_page(stage)
    browser.http.cookies.clear()
    return browser.post(page, page.fields | {"decision": "approve"})


def consent_of_another_browser(stage: Stage) -> httpx.Response:
    """The attacker's form, sent by the victim's browser, which has a cookie of its own."""
    _, page = consent_page(stage)
    victim, _ = consent_page(stage)
    return victim.post(page, page.fields | {"decision": "approve"})


def consent_with_a_cookie_that_the_attacker_chose(stage: Stage) -> httpx.Response:
    """A value that we never gave is not adopted."""
    browser = stage.browser()
    browser.http.cookies.set("ssh-mcp", "chosen-by-the-attacker", domain="127.0.0.1")
    page = browser.consent(stage.app().authorize_url())
    values = [cookie.value for cookie in browser.http.cookies.jar if cookie.name == "ssh-mcp"]
    assert any(value != "chosen-by-the-attacker" for value in values)
    browser.http.cookies.clear()
    browser.http.cookies.set("ssh-mcp", "chosen-by-the-attacker", domain="127.0.0.1")
    return browser.post(page, page.fields | {"decision": "approve"})


def consent_with_fields_of_two_requests(stage: Stage) -> httpx.Response:
    """The proof of one request must not approve another one, though of the same browser."""
    browser, page = consent_page(stage)
    _, other = consent_page(stage, stage.app(redirect_uri=GOOD), browser)
    assert page.fields.keys() == other.fields.keys()
    mixed = dict(page.fields)
    request = max(mixed, key=lambda name: len(mixed[name]))
    mixed[request] = other.fields[request]
    if len(mixed) == 1:
        pytest.fail("the consent form has one field only: no CSRF token beside the request")
    return browser.post(page, mixed | {"decision": "approve"})


def consent_by_get(stage: Stage) -> httpx.Response:
    browser, page = consent_page(stage)
    response = browser.http.get(f"{page.action}?{urlencode(page.fields | {'decision': 'approve'})}")
    assert Page(response).leaves is None
    assert "Location" not in response.headers
    return response


def consent_request_replaced_by(what: Callable[[Stage], str]) -> Move:
    def move(stage: Stage) -> httpx.Response:
        browser, page = consent_page(stage)
        request = max(page.fields, key=lambda name: len(page.fields[name]))
        return browser.post(page, page.fields | {request: what(stage), "decision": "approve"})

    return move


def consent_altered(stage: Stage) -> httpx.Response:
    browser, page = consent_page(stage)
    request = max(page.fields, key=lambda name: len(page.fields[name]))
    return browser.post(page, page.fields | {request: altered(page.fields[request]), "decision": "approve"})


def consent_page_opened_with(what: Callable[[Stage], str]) -> Move:
    return lambda stage: stage.browser().get(
        f"{stage.remote.url}/consent?{urlencode({'request': what(stage)})}"
    )


def denied(stage: Stage) -> httpx.Response:
    browser, page = consent_page(stage)
    return browser.post(page, page.fields | {"decision": "deny"})


def oversized_consent(stage: Stage) -> httpx.Response:
    browser, page = consent_page(stage)
    return browser.post(page, page.fields | {"decision": "approve", "filler": "x" * 66_000})


def cookie_flags(stage: Stage) -> httpx.Response:
    _, page = consent_page(stage)
    header = page.response.headers["Set-Cookie"]
    assert header.startswith("ssh-mcp=")
    parts = {part.strip().lower() for part in header.split(";")[1:]}
    assert {"httponly", "samesite=lax", "path=/"} <= parts
    assert not any(part.startswith("domain") for part in parts)
    return page.response


def agreed(response: httpx.Response) -> None:
    """The browser is led to Google, with a page rather than a redirect that would repeat the form (RFC 9700 4.12)."""
    assert response.status_code == 200, (response.status_code, response.text)
    check_page_headers(response)
    leaves = Page(response).leaves
    assert leaves is not None
    got = query_of(leaves)
    assert got["code_challenge_method"] == "S256"
    assert set(got["scope"].split()) == {"openid", "email"}
    assert got.get("access_type", "online") == "online"
    assert got["nonce"]
    assert "our-secret-at-google" not in response.text
    assert got["state"]


def honest_login(stage: Stage) -> httpx.Response:
    browser = stage.browser()
    return browser.get(browser.callback_url(stage.app().authorize_url()))


def callback_in_another_browser(stage: Stage) -> httpx.Response:
    """The victim opens a link with the attacker's answer and would work in the attacker's account."""
    url = stage.browser().callback_url(stage.app().authorize_url())
    victim, _ = consent_page(stage)
    return victim.get(url)


def callback_without_cookie(stage: Stage) -> httpx.Response:
    url = stage.browser().callback_url(stage.app().authorize_url())
    return stage.browser().get(url)


def consent_phished(stage: Stage) -> httpx.Response:
    """The attacker approves in his browser and lets the victim only log in at Google: cross-browser phishing."""
    google_url = stage.browser().google_url(stage.app().authorize_url())
    victim = stage.browser()
    return victim.get(victim.log_in_at_google(google_url))


def callback_changed(**changes: Any) -> Move:
    """The answer in the right browser, with parameters changed; None leaves one out, a function makes one."""

    def move(stage: Stage) -> httpx.Response:
        browser = stage.browser()
        url = browser.callback_url(stage.app().authorize_url())
        values = query_of(url)
        for name, change in changes.items():
            values[name] = change(stage, values[name]) if callable(change) else change
        values = {name: value for name, value in values.items() if value is not None}
        return browser.get(f"{stage.remote.url}/google/callback?{urlencode(values)}")

    return move


def callback_twice(stage: Stage) -> httpx.Response:
    browser = stage.browser()
    url = browser.callback_url(stage.app().authorize_url())
    gives_code(browser.get(url))
    return browser.get(url)


def state_for_a_second_login(stage: Stage) -> httpx.Response:
    """One approval, two logins at Google with its state: the second code of Google is a good one."""
    browser = stage.browser()
    google_url = browser.google_url(stage.app().authorize_url())
    first, second = browser.log_in_at_google(google_url), browser.log_in_at_google(google_url)
    gives_code(browser.get(first))
    return browser.get(second)


def callback_with_doubled(name: str) -> Move:
    def move(stage: Stage) -> httpx.Response:
        browser = stage.browser()
        url = browser.callback_url(stage.app().authorize_url())
        return browser.get(f"{url}&{name}=other")

    return move


def google_code_of_another_login(stage: Stage) -> httpx.Response:
    """The attacker injects a code that Google gave for the victim into a login of his own (RFC 9700 4.5)."""
    stolen = query_of(stage.browser().callback_url(stage.app().authorize_url(), YOU))["code"]
    return callback_changed(code=stolen)(stage)


def callback_of_another_app(stage: Stage) -> httpx.Response:
    """State of one login with the code of another one of the same browser."""
    browser = stage.browser()
    first = query_of(browser.callback_url(stage.app().authorize_url()))
    second = query_of(browser.callback_url(stage.app(redirect_uri=GOOD).authorize_url()))
    mixed = urlencode({"state": first["state"], "code": second["code"]})
    return browser.get(f"{stage.remote.url}/google/callback?{mixed}")


def callback_by_post(stage: Stage) -> httpx.Response:
    browser = stage.browser()
    url = browser.callback_url(stage.app().authorize_url())
    return browser.http.post(f"{stage.remote.url}/google/callback", data=query_of(url))


def google_denies(stage: Stage) -> httpx.Response:
    browser = stage.browser()
    state = query_of(browser.google_url(stage.app().authorize_url()))["state"]
    values = {"error": "access_denied", "error_description": "<script>alert(1)</script>", "state": state}
    response = browser.get(f"{stage.remote.url}/google/callback?{urlencode(values)}")
    assert "<script>alert" not in response.text
    return response


def google_error_for_nobody(stage: Stage) -> httpx.Response:
    """Markup in an error that belongs to no login."""
    values = {"error": "<script>alert(1)</script>", "error_description": "<img src=x onerror=alert(1)>"}
    response = stage.browser().get(f"{stage.remote.url}/google/callback?{urlencode(values)}")
    assert "<script>alert" not in response.text
    assert "<img" not in response.text
    return response


def refused_then_back(stage: Stage) -> httpx.Response:
    """Who is not on the list sees so, and the application is told once they leave."""
    browser = stage.browser()
    app = stage.app()
    response = browser.get(browser.callback_url(app.authorize_url(), STRANGER))
    assert response.status_code == 403
    check_page_headers(response)
    page = Page(response)
    assert STRANGER in page.html
    (way_back,) = [link for link in page.links if link.startswith(CALLBACK)]
    assert query_of(way_back) == {
        "error": "access_denied",
        "state": app.state,
        "iss": stage.remote.base_url,
    } | {k: v for k, v in query_of(way_back).items() if k == "error_description"}
    return response


def token_header(**header: Any) -> Callable[[Stage, dict[str, Any]], str]:
    return lambda stage, claims: jwt.encode(
        claims, stage.google.key, "RS256", {"kid": stage.google.kid} | header
    )


def key_from_elsewhere(stage: Stage) -> httpx.Response:
    with listener() as (port, seen):
        header = {
            "jku": f"http://127.0.0.1:{port}/keys",
            "x5u": f"http://127.0.0.1:{port}/cert",
            "kid": "unknown",
        }
        response = comes_back_with(lambda stage, claims: jwt.encode(claims, other_rsa(), "RS256", header))(
            stage
        )
        assert not seen
    return response


def other_rsa() -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, 2048)


def google_rotates_its_key(stage: Stage) -> httpx.Response:
    honest_login(stage)
    stage.google.rotate()
    return honest_login(stage)


def old_google_key(stage: Stage) -> httpx.Response:
    """A key that Google no longer publishes, after we have seen its successor."""
    old_key, old_kid = stage.google.key, stage.google.kid
    gives_code(google_rotates_its_key(stage))
    return comes_back_with(lambda stage, claims: jwt.encode(claims, old_key, "RS256", {"kid": old_kid}))(
        stage
    )


def google_is_down(stage: Stage) -> httpx.Response:
    browser = stage.browser()
    url = browser.callback_url(stage.app().authorize_url())
    with stage.google.being_down():
        return browser.get(url)


def refused_person(response: httpx.Response) -> None:
    """A page that says who may not come in; its only way on tells the application of the refusal."""
    assert response.status_code == 403, (response.status_code, response.text)
    check_page_headers(response)
    assert "code=" not in response.text
    assert "Location" not in response.headers


def consent_cookie_behind_a_space_that_only_servers_strip(stage: Stage) -> httpx.Response:
    """A neighbour's cookie whose name begins with a no-break space is not ours (RFC 6265bis, 4.1.3)."""
    browser, page = consent_page(stage)
    value = next(cookie.value for cookie in browser.http.cookies.jar if cookie.name == "ssh-mcp")
    browser.http.cookies.clear()
    header = b"\xa0ssh-mcp=" + str(value).encode()
    request = browser.http.build_request(
        "POST", str(page.action), data=page.fields | {"decision": "approve"}, headers=[(b"Cookie", header)]
    )
    return browser.http.send(request)


def consent_cookie_twice(stage: Stage) -> httpx.Response:
    """Of two cookies of one name nobody knows which one is ours."""
    browser, page = consent_page(stage)
    value = next(cookie.value for cookie in browser.http.cookies.jar if cookie.name == "ssh-mcp")
    browser.http.cookies.clear()
    return browser.post(
        page, page.fields | {"decision": "approve"}, Cookie=f"ssh-mcp={value}; ssh-mcp={value}"
    )


def faulty_request_of_a_stranger(stage: Stage) -> httpx.Response:
    """A link with our name in it leads nowhere without a person's click (RFC 9700, 4.11.2)."""
    app = stage.app(redirect_uri=GOOD)
    response = stage.browser().get(app.authorize_url(prompt="none"))
    assert [link for link in Page(response).links if link.startswith(GOOD)]
    return response
