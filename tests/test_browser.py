"""The pages in Chromium: a person's ways through a login, and whether everybody can read and use them.

JavaScript is switched off, since no page needs it; only an application that runs inside a browser has it.
"""

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route, expect

import pages
from chromium import FOCUSED, MOST_MILLISECONDS, RELATIVE_LUMINANCE, TEXTS
from oauth import CALLBACK, ME, STRANGER, App, Google, Remote, query_of, tokens_of
from oauth import Browser as Visitor
from pages import PageName
from test_pages import VALUES

pytest_plugins = ["chromium"]


@pytest.fixture
def context_of(chromium: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """Make browser profiles without JavaScript; a violated Content-Security-Policy fails the test at its end."""
    contexts: list[BrowserContext] = []
    violations: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            violations.append(message.text)

    def make(**options: Any) -> BrowserContext:
        context = chromium.new_context(**({"java_script_enabled": False} | options))
        context.set_default_timeout(MOST_MILLISECONDS)
        context.on("console", note)
        context.route(lambda url: urlsplit(url).hostname != "127.0.0.1", lambda route: route.abort())
        contexts.append(context)
        return context

    yield make
    for context in contexts:
        context.close()
    assert not violations


@pytest.fixture
def tab(context_of: Callable[..., BrowserContext]) -> Page:
    return context_of().new_page()


class Callback:
    """The place where an application waits for its answer."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        callback = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/callback"):
                    callback.answers.append(f"{callback.origin}{self.path}")
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(b"<title>Application</title>back at the application")

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Stay silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.origin}/callback"
        self._serving = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._serving.start()

    def close(self) -> None:
        self._server.shutdown()
        self._serving.join()
        self._server.server_close()

    def answer(self, tab: Page) -> str:
        """Wait until the tab is back at the application, and return the URL that it came with."""
        tab.wait_for_url(f"{self.url}*")
        assert tab.url in self.answers
        return tab.url


@pytest.fixture
def callback() -> Iterator[Callback]:
    callback = Callback()
    yield callback
    callback.close()


def approve(tab: Page) -> None:
    tab.get_by_role("button", name="Approve").click()


def log_in_at_google(tab: Page, sub: str = ME) -> None:
    tab.locator("input[name=sub]").fill(sub)
    tab.get_by_role("button", name="Authorize").click()


def test_who_approves_and_logs_in_gives_the_application_a_token_that_works(
    remote: Remote, tab: Page, callback: Callback, app_of: Callable[..., App]
) -> None:
    app = app_of(remote, redirect_uri=callback.url, client_name="Claude")
    tab.goto(app.authorize_url())
    expect(tab.locator(".main-fact .host")).to_have_text(urlsplit(callback.url).netloc)
    expect(tab.get_by_text("its own word: nobody checked it")).to_be_visible()
    approve(tab)
    log_in_at_google(tab)
    answer = callback.answer(tab)
    assert query_of(answer)["state"] == app.state
    assert app.call(tokens_of(app.redeem(answer)).access).status_code == 200


def test_who_denies_is_back_at_the_application_with_nothing_handed_over(
    remote: Remote, tab: Page, callback: Callback, app_of: Callable[..., App]
) -> None:
    app = app_of(remote, redirect_uri=callback.url)
    tab.goto(app.authorize_url())
    tab.get_by_role("button", name="Deny").click()
    answer = query_of(callback.answer(tab))
    assert answer["error"] == "access_denied"
    assert answer["state"] == app.state
    assert answer["iss"] == remote.base_url
    assert "code" not in answer


def test_keyboard_alone_reaches_deny_first_then_approve(
    remote: Remote, tab: Page, callback: Callback, app_of: Callable[..., App]
) -> None:
    app = app_of(remote, redirect_uri=callback.url)
    tab.goto(app.authorize_url())
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("button", name="Deny")).to_be_focused()
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("button", name="Approve")).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.locator("input[name=sub]")).to_be_focused()
    tab.keyboard.type(ME)
    tab.keyboard.press("Enter")
    assert "code" in query_of(callback.answer(tab))


def test_wrong_account_is_told_so_and_its_application_is_told_on_leaving(
    remote: Remote, tab: Page, callback: Callback, app_of: Callable[..., App]
) -> None:
    app = app_of(remote, redirect_uri=callback.url, client_name="Claude")
    tab.goto(app.authorize_url())
    approve(tab)
    with tab.expect_response(f"{remote.url}/google/callback*") as refused:
        log_in_at_google(tab, STRANGER)
    assert refused.value.status == 403
    expect(tab.get_by_text(STRANGER)).to_be_visible()
    assert not callback.answers
    tab.get_by_role("link", name="Back to Claude").click()
    answer = query_of(callback.answer(tab))
    assert answer["error"] == "access_denied"
    assert answer["state"] == app.state
    assert "code" not in answer


def test_right_account_comes_in_after_the_wrong_one_was_refused(
    remote: Remote, tab: Page, callback: Callback, app_of: Callable[..., App]
) -> None:
    app = app_of(remote, redirect_uri=callback.url)
    tab.goto(app.authorize_url())
    approve(tab)
    log_in_at_google(tab, STRANGER)
    expect(tab.get_by_text(STRANGER)).to_be_visible()
    tab.goto(app.authorize_url())
    approve(tab)
    log_in_at_google(tab)
    assert app.redeem(callback.answer(tab)).status_code == 200


def test_two_tabs_go_their_ways_at_the_same_time(
    remote: Remote, context_of: Callable[..., BrowserContext], callback: Callback, app_of: Callable[..., App]
) -> None:
    context = context_of()
    first, second = context.new_page(), context.new_page()
    one, two = (app_of(remote, redirect_uri=callback.url, client_name=name) for name in ("One", "Two"))
    first.goto(one.authorize_url())
    second.goto(two.authorize_url())
    approve(first)
    approve(second)
    log_in_at_google(second)
    log_in_at_google(first)
    for tab, app in ((first, one), (second, two)):
        answer = callback.answer(tab)
        assert query_of(answer)["state"] == app.state
        assert app.redeem(answer).status_code == 200


def test_back_from_google_to_the_consent_page_and_on_again_works(
    remote: Remote, tab: Page, callback: Callback, app_of: Callable[..., App]
) -> None:
    app = app_of(remote, redirect_uri=callback.url)
    tab.goto(app.authorize_url())
    approve(tab)
    expect(tab.locator("input[name=sub]")).to_be_visible()
    tab.go_back()
    approve(tab)
    log_in_at_google(tab)
    assert app.redeem(callback.answer(tab)).status_code == 200


def test_back_from_google_and_denied_after_all_hands_nothing_over(
    remote: Remote, tab: Page, callback: Callback, app_of: Callable[..., App]
) -> None:
    app = app_of(remote, redirect_uri=callback.url)
    tab.goto(app.authorize_url())
    approve(tab)
    expect(tab.locator("input[name=sub]")).to_be_visible()
    tab.go_back()
    tab.get_by_role("button", name="Deny").click()
    assert query_of(callback.answer(tab))["error"] == "access_denied"


def test_callback_page_that_is_loaded_again_says_what_to_do(
    remote: Remote, tab: Page, callback: Callback, google: Google, app_of: Callable[..., App]
) -> None:
    app = app_of(remote, redirect_uri=callback.url)
    tab.goto(app.authorize_url())
    approve(tab)
    with tab.expect_request(f"{remote.url}/google/callback*") as request:
        log_in_at_google(tab)
    callback.answer(tab)
    again = tab.goto(request.value.url)
    assert again is not None
    assert again.status == 400
    expect(tab.get_by_role("heading", level=1)).to_be_visible()
    expect(tab.locator("main")).to_contain_text("again")
    assert len(callback.answers) == 1


def test_consent_page_that_was_open_too_long_says_so(
    own_remote: Callable[..., Remote], tab: Page, callback: Callback, app_of: Callable[..., App]
) -> None:
    remote = own_remote(own_clock=True)
    app = app_of(remote, redirect_uri=callback.url)
    tab.goto(app.authorize_url())
    remote.move_clock(11 * 60)
    with tab.expect_response(f"{remote.url}/consent*") as expired:
        approve(tab)
    assert expired.value.status == 400
    expect(tab.get_by_role("heading", level=1)).to_contain_text("expired")
    expect(tab.locator("main")).to_contain_text("again")
    tab.goto(app.authorize_url())
    approve(tab)
    log_in_at_google(tab)
    assert app.redeem(callback.answer(tab)).status_code == 200


def test_login_at_google_that_took_too_long_says_so(
    own_remote: Callable[..., Remote], tab: Page, callback: Callback, app_of: Callable[..., App]
) -> None:
    remote = own_remote(own_clock=True)
    app = app_of(remote, redirect_uri=callback.url)
    tab.goto(app.authorize_url())
    approve(tab)
    expect(tab.locator("input[name=sub]")).to_be_visible()
    remote.move_clock(11 * 60)
    with tab.expect_response(f"{remote.url}/google/callback*") as expired:
        log_in_at_google(tab)
    assert expired.value.status == 400
    expect(tab.get_by_role("heading", level=1)).to_contain_text("expired")
    assert not callback.answers


def test_landing_page_shows_this_servers_addresses(remote: Remote, tab: Page) -> None:
    answer = tab.goto(remote.url)
    assert answer is not None
    assert answer.status == 200
    expect(tab.get_by_text(f"claude mcp add --transport http ssh {remote.base_url}/mcp")).to_be_visible()
    expect(tab.locator("dl code").nth(1)).to_have_text(f"{remote.base_url}/sse")


def test_click_on_an_address_selects_all_of_it(remote: Remote, tab: Page) -> None:
    tab.goto(remote.url)
    tab.locator("code.copy").first.click()
    assert tab.evaluate("getSelection().toString()") == f"{remote.base_url}/mcp"


# An application inside a browser, whose requests come from another origin

FETCH = """async ([url, options]) => {
  try {
    const answer = await fetch(url, options);
    return [answer.status, await answer.text(), answer.headers.get("www-authenticate")];
  } catch (error) {
    return String(error);
  }
}"""


@pytest.fixture
def fetch(context_of: Callable[..., BrowserContext], callback: Callback) -> Callable[..., Any]:
    """Fetch as a script on another origin's page does: what Chromium lets it see, or the error."""
    tab = context_of(java_script_enabled=True).new_page()
    tab.goto(callback.origin)
    return lambda url, **options: tab.evaluate(FETCH, [url, options])


@pytest.mark.parametrize(
    "path",
    [
        "/.well-known/oauth-protected-resource",
        "/.well-known/oauth-protected-resource/mcp",
        "/.well-known/oauth-protected-resource/sse",
        "/.well-known/oauth-authorization-server",
        "/.well-known/openid-configuration",
    ],
)
def test_application_inside_a_browser_reads_the_metadata(
    path: str, remote: Remote, fetch: Callable[..., Any]
) -> None:
    # a header that makes Chromium ask first (CORS preflight), as the SDK's does
    status, body, _ = fetch(f"{remote.url}{path}", headers={"MCP-Protocol-Version": "2025-11-25"})
    assert status == 200
    assert remote.base_url in body


def test_application_inside_a_browser_registers_gets_tokens_and_revokes_them(
    remote: Remote, fetch: Callable[..., Any], app_of: Callable[..., App], browser_of: Callable[..., Visitor]
) -> None:
    metadata = {
        "client_name": "In a browser",
        "redirect_uris": [CALLBACK],
        "token_endpoint_auth_method": "none",
    }
    in_json = {"Content-Type": "application/json"}
    status, body, _ = fetch(
        f"{remote.url}/register", method="POST", headers=in_json, body=json.dumps(metadata)
    )
    assert status == 201
    app = app_of(remote, client_id=json.loads(body)["client_id"])
    answer = browser_of(remote).log_in(app.authorize_url())
    in_form = {"Content-Type": "application/x-www-form-urlencoded"}
    code = {
        "grant_type": "authorization_code",
        "client_id": app.client_id,
        "code": query_of(answer)["code"],
        "redirect_uri": CALLBACK,
        "code_verifier": app.verifier,
    }
    status, body, _ = fetch(f"{remote.url}/token", method="POST", headers=in_form, body=urlencode(code))
    assert status == 200
    token = json.loads(body)["access_token"]
    assert app.call(token).status_code == 200
    taken = {"client_id": app.client_id, "token": token}
    status, _, _ = fetch(f"{remote.url}/revoke", method="POST", headers=in_form, body=urlencode(taken))
    assert status == 200
    assert app.call(token).status_code == 401


def test_application_inside_a_browser_can_read_why_it_got_no_token(
    remote: Remote, fetch: Callable[..., Any]
) -> None:
    status, body, _ = fetch(
        f"{remote.url}/token",
        method="POST",
        headers={"Content-Type": "application/x-www-form-urlencoded"},
        body="grant_type=authorization_code&client_id=nobody&code=x&code_verifier=y",
    )
    assert status in (400, 401)
    assert json.loads(body)["error"] == "invalid_client"


@pytest.mark.parametrize("path", ["/mcp", "/sse", "/consent?request=x", "/"])
def test_page_of_another_origin_cannot_read_what_is_a_persons_or_behind_the_login(
    path: str, remote: Remote, fetch: Callable[..., Any]
) -> None:
    assert fetch(f"{remote.url}{path}") == "TypeError: Failed to fetch"


# What everybody can read and use

WIDTHS = (320, 768, 1600)
SCHEMES = ("light", "dark")
DECISIONS = ("Deny", "Approve")


@pytest.fixture
def show(context_of: Callable[..., BrowserContext]) -> Callable[..., Page]:
    """Show a page as the server would send it, headers and all, but one that does not go on by itself."""

    def make(name: PageName, scheme: str = "light", width: int = 1100, **values: Any) -> Page:
        context = context_of(color_scheme=scheme, viewport={"width": width, "height": 800})
        answer = pages.page(name, **(VALUES[name] | values))
        body = bytes(answer.body).decode().replace('http-equiv="refresh"', "")

        def fulfill(route: Route) -> None:
            route.fulfill(status=answer.status_code, headers=dict(answer.headers.items()), body=body)

        context.route("http://127.0.0.1:1/", fulfill)
        tab = context.new_page()
        tab.goto("http://127.0.0.1:1/")
        return tab

    return make


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", VALUES)
def test_text_stands_out_from_its_ground(name: PageName, scheme: str, show: Callable[..., Page]) -> None:
    texts = show(name, scheme).evaluate(TEXTS)
    assert texts
    # WCAG 2.2, 1.4.3: 4.5 to 1
    assert [text for text in texts if text[1] < 4.5] == []


@pytest.mark.parametrize("name", VALUES)
def test_dark_scheme_is_dark_and_light_is_light(name: PageName, show: Callable[..., Page]) -> None:
    script = f"() => {{ {RELATIVE_LUMINANCE} return luminance(background(document.body)); }}"
    assert show(name, "light").evaluate(script) > 0.8
    assert show(name, "dark").evaluate(script) < 0.05


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", VALUES)
def test_nothing_sticks_out_sideways(name: PageName, width: int, show: Callable[..., Page]) -> None:
    long = "averylongnamewithoutaspace" * 8
    tab = show(
        name,
        width=width,
        base_url=f"https://{long[:60]}.example.com",
        client_name=long,
        redirect_host=long,
        client_uri_host=long,
        resources=[f"https://{long}/mcp"],
        email=f"{long}@example.com",
        host=long,
        message=long,
    )
    assert tab.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["landing", "consent", "leaving", "refused"])
def test_what_has_the_keyboards_focus_is_seen(name: PageName, scheme: str, show: Callable[..., Page]) -> None:
    tab = show(name, scheme)
    reached = []
    for _ in range(10):
        tab.keyboard.press("Tab")
        focused = tab.evaluate(FOCUSED)
        if focused is None:
            break
        text, style, width, contrast = focused
        reached.append(text)
        assert style == "solid"
        assert width >= 2
        # WCAG 2.2, 1.4.11 and 2.4.13: 3 to 1
        assert contrast >= 3
    assert len(reached) == tab.locator("a, button").count()


@pytest.mark.parametrize("width", WIDTHS)
def test_deny_is_as_big_as_approve(width: int, show: Callable[..., Page]) -> None:
    boxes = [
        show("consent", width=width).get_by_role("button", name=name).bounding_box() for name in DECISIONS
    ]
    deny, approved = boxes
    assert deny is not None
    assert approved is not None
    assert (deny["width"], deny["height"]) == (approved["width"], approved["height"])
    # WCAG 2.2, 2.5.5: big enough for a finger
    assert deny["height"] >= 44


@pytest.mark.parametrize("name", VALUES)
def test_page_has_one_first_heading_a_title_and_a_language(name: PageName, show: Callable[..., Page]) -> None:
    tab = show(name)
    assert tab.locator("h1").count() == 1
    assert tab.locator("main").count() == 1
    assert tab.title().endswith(" · SSH MCP Server")
    assert tab.locator("html").get_attribute("lang") == "en"
    levels = tab.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))")
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_name_of_stacked_marks_paints_over_nothing_else(show: Callable[..., Page]) -> None:
    plain, stacked = (
        show("consent", client_name="Claude" + marks) for marks in ("", "\u0301" * 60 + "\u0323" * 60)
    )
    for part in (".main-fact", "dd .quiet", ".warning", "form"):
        assert plain.locator(part).first.screenshot() == stacked.locator(part).first.screenshot()


def test_redirect_host_is_the_biggest_thing_in_the_box(show: Callable[..., Page]) -> None:
    size = "e => parseFloat(getComputedStyle(e).fontSize)"
    tab = show("consent")
    host = tab.locator(".main-fact .host").evaluate(size)
    others = [part.evaluate(size) for part in tab.locator(".facts dd").all()]
    assert all(host > other for other in others)
