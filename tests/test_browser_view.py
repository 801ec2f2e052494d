"""The view of a system report in Chromium, inside an application made of the official code for such applications.

The application talks to a server as it is started, in both eras of the protocol; behind that is a real sshd. The view
stands in two frames, as MCP Apps wants it for applications that are pages: a sandbox of another origin, and one of no
origin within that.
"""

import re
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from playwright.sync_api import Browser, BrowserContext, FrameLocator, Locator, Page, Route, expect

from chromium import FOCUSED, MOST_MILLISECONDS, RELATIVE_LUMINANCE, TEXTS
from clients import HERE, MODULES
from conftest import Server, marker, wait_for
from oauth import App, Remote

pytest_plugins = ["chromium"]

ERAS = ("legacy", "2026-07-28")
SCHEMES = ("light", "dark")
SERVER: dict[str, Any] = {"serverTools": {}, "serverResources": {}}
KINDS = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript"}
NASTY = "<img src=x onerror=\"document.body.textContent='taken over'\">"
GIB = 1024**3

# what MCP Apps have an application allow to a view that asks for nothing
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "media-src 'self' data:; connect-src 'none'; frame-src 'none'; object-src 'none'; base-uri 'self'"
)


def memory(percent: int) -> dict[str, int]:
    return {"total_bytes": 100 * GIB, "used_bytes": percent * GIB, "available_bytes": (100 - percent) * GIB}


def disk(mount: str, percent: int, filesystem: str | None = "ext4") -> dict[str, Any]:
    sizes = {"total_bytes": 100 * GIB, "used_bytes": percent * GIB, "free_bytes": (100 - percent) * GIB}
    return {"mount": mount, "device": "/dev/sda1", "filesystem": filesystem} | sizes


def report(**changes: Any) -> dict[str, Any]:
    """Return what the tool answers of a machine that nobody has."""
    fields = {
        "hostname": "web1",
        "os": {"name": "Debian GNU/Linux", "version": "12", "kernel": "6.1.0", "architecture": "x86_64"},
        "uptime_seconds": 277_500.0,
        "load_average": [0.5, 1.25, 2.0],
        "cpu": {"model": "Some processor", "cores": 8, "usage_percent": 12.5},
        "memory": memory(25),
        "swap": memory(88),
        "disks": [disk("/", 50), disk("/srv", 83), disk("/var", 97)],
    }
    return {"content": [{"type": "text", "text": "host web1"}], "structuredContent": fields | changes}


class Host:
    """The application in a tab, and what the view in it says."""

    def __init__(self, tab: Page, remote: Remote, token: str) -> None:
        self.tab = tab
        self._remote = remote
        self._token = token

    @property
    def view(self) -> FrameLocator:
        return self.tab.frame_locator("iframe").frame_locator("iframe")

    @property
    def refresh(self) -> Locator:
        return self.view.get_by_role("button", name="Refresh")

    def show(
        self,
        result: dict[str, Any] | None = None,
        *,
        mode: str = "2026-07-28",
        offers: dict[str, Any] | None = None,
        context: dict[str, Any] | None = None,
        instead: dict[str, str] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Show the view with a result, or with that of a call of the tool; `instead` says what its page has instead."""
        self.tab.goto(f"{self._remote.url}/host/view_host.html")
        self.tab.wait_for_function("() => window.show !== undefined")
        asked = {
            "url": f"{self._remote.url}/mcp",
            "token": self._token,
            "mode": mode if mode == "legacy" else {"pin": mode},
            "sandbox": f"http://localhost:{self._remote.port}/host/view_sandbox.html",
            "offers": SERVER if offers is None else offers,
            "context": context or {},
            "input": arguments,
            "result": result,
            "instead": instead or {},
        }
        return cast("dict[str, Any]", self.tab.evaluate("(asked) => window.show(asked)", asked))

    def call(self, tool: str, **arguments: Any) -> Any:
        """Call a tool as the model would."""
        asked = {"name": tool, "arguments": arguments}
        return self.tab.evaluate("(asked) => window.client.callTool(asked)", asked)

    def said(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of these messages of the view."""
        said: list[dict[str, Any]] = self.tab.evaluate("window.said")
        return [message.get("params", {}) for message in said if message.get("method") == method]

    def answered(self, request: str) -> Any:
        """Return what the view answers."""
        return self.tab.evaluate(f"window.bridge.{request}")

    def meter(self, name: str) -> Locator:
        return self.view.get_by_role("meter", name=name, exact=True)

    def in_view(self, script: str) -> Any:
        return self.tab.frames[-1].evaluate(script)


@pytest.fixture
def host_of(chromium: Browser, remote: Remote, app_of: Callable[..., App]) -> Iterator[Callable[..., Host]]:
    """Open applications; what was fetched from elsewhere, and what the console complains of, fails the test."""
    contexts: list[BrowserContext] = []
    amiss: list[str] = []

    def serve(route: Route) -> None:
        folder, _, name = route.request.url.partition("/host/")
        if folder in (remote.url, f"http://localhost:{remote.port}") and name:
            route.fulfill(**part_of_the_host(name))
        elif route.request.url == f"{remote.url}/mcp":
            route.continue_()
        else:
            amiss.append(route.request.url)
            route.abort()

    def make(**options: Any) -> Host:
        context = chromium.new_context(**options)
        context.set_default_timeout(MOST_MILLISECONDS)
        context.on(
            "console", lambda said: amiss.append(said.text) if said.type in ("error", "warning") else None
        )
        context.on("weberror", lambda error: amiss.append(str(error.error)))
        context.route("**", serve)
        contexts.append(context)
        return Host(context.new_page(), remote, app_of(remote).log_in().access)

    yield make
    for context in contexts:
        context.close()
    assert amiss == []


def part_of_the_host(name: str) -> dict[str, Any]:
    path = MODULES / name.removeprefix("modules/") if name.startswith("modules/") else HERE / name
    policy = {"Content-Security-Policy": POLICY} if name == "view_sandbox.html" else {}
    return {"path": path, "headers": {"Content-Type": KINDS[path.suffix]} | policy}


@pytest.fixture
def host(host_of: Callable[..., Host]) -> Host:
    return host_of()


@pytest.mark.parametrize("mode", ERAS)
def test_report_of_a_real_machine_is_shown(mode: str, host: Host) -> None:
    shown = host.show(mode=mode)
    assert shown["app"]["name"] == "ssh-mcp-server"
    assert shown["version"] == (mode if mode != "legacy" else "2025-11-25")
    expect(host.view.get_by_role("heading", level=1)).to_have_text(socket.gethostname())
    expect(host.meter("Memory")).to_have_attribute("aria-valuetext", re.compile(r"^\d+ %"))
    expect(host.meter("/")).to_be_visible()
    expect(host.view.get_by_role("status")).to_have_text(re.compile("^As of "))


def test_everything_that_is_known_is_shown(host: Host) -> None:
    host.show(report())
    for words in (
        "Debian GNU/Linux 12 · 6.1.0 x86_64",
        "up 3 d 5 h 5 min",
        "load 0.50 1.25 2.00, 8 cores, Some processor",
        "25.0 GiB of 100 GiB, 75.0 GiB free",
        "97.0 GiB of 100 GiB, 3.0 GiB free, ext4",
    ):
        expect(host.view.get_by_text(words, exact=True)).to_be_visible()


def test_what_is_nearly_full_is_told_in_words(host: Host) -> None:
    host.show(report())
    told = {
        "Processor": "13 %",
        "Memory": "25 %",
        "Swap": "88 %, filling up",
        "/": "50 %",
        "/srv": "83 %, filling up",
        "/var": "97 %, nearly full",
    }
    for name, words in told.items():
        expect(host.meter(name)).to_have_attribute("aria-valuetext", words)
        expect(host.view.get_by_text(words, exact=True)).to_be_visible()
        share = "e => Math.round(100 * e.firstChild.offsetWidth / e.clientWidth)"
        assert abs(host.meter(name).evaluate(share) - int(words.split()[0])) <= 1
    assert host.view.get_by_role("meter").count() == len(told)


def test_what_is_not_known_is_left_out(host: Host) -> None:
    nothing = dict.fromkeys(("name", "version", "kernel", "architecture"))
    host.show(
        report(
            os=nothing,
            uptime_seconds=None,
            load_average=None,
            cpu={"model": None, "cores": None, "usage_percent": None},
            memory=None,
            swap=None,
            disks=[disk("/", 1, None)],
        ),
        offers={},
    )
    expect(host.view.get_by_role("meter")).to_have_count(1)
    words = host.view.locator("main").inner_text().split("\n")
    assert [word for word in words if word] == [
        "web1",
        "/",
        "1 %",
        "1.0 GiB of 100 GiB, 99.0 GiB free",
        host.view.get_by_role("status").inner_text(),
    ]


def test_jobs_that_run_are_listed_and_those_that_ended_are_not(host: Host, sshd: Server) -> None:
    running, back, ended = (f"sleep 600 # {marker()}" for _ in range(3))
    host.show(report())
    waiting = host.call("ssh_execute", command=running, timeout=1)["structuredContent"]["job_id"]
    host.call("ssh_execute", command=back, background=True)
    killed = host.call("ssh_execute", command=ended, timeout=1)["structuredContent"]["job_id"]
    host.call("ssh_execute", job_id=killed, signal="KILL")
    host.show(report())
    jobs = host.view.get_by_role("region", name="Your jobs").get_by_role("listitem")
    expect(jobs.filter(has_text=running)).to_contain_text(f"{sshd.target} · since ")
    expect(jobs.filter(has_text=running)).to_contain_text(" · runs")
    expect(jobs.filter(has_text=back)).to_contain_text("in the background")
    assert jobs.filter(has_text=ended).count() == 0
    host.call("ssh_execute", job_id=waiting, signal="KILL")


def test_jobs_are_read_again_now_and_then_while_they_are_seen(host: Host) -> None:
    def readings() -> int:
        return len(host.said("resources/read"))

    def goes_on() -> bool:
        before = readings()
        host.tab.wait_for_timeout(1000)
        return readings() > before

    host.show(report(), instead={"JOBS_MS = 30000": "JOBS_MS = 300"})
    wait_for(lambda: readings() > 2, 60)
    host.tab.evaluate("document.querySelector('iframe').style.marginTop = '9999px'")
    wait_for(lambda: not goes_on(), 60)
    host.tab.evaluate("document.querySelector('iframe').style.marginTop = '0'")
    wait_for(goes_on, 60)
    assert host.answered("teardownResource({})") == {}
    wait_for(lambda: not goes_on(), 60)


def test_refresh_calls_the_tool_again_through_the_application(host: Host) -> None:
    host.show(report(), host="127.0.0.1")
    host.refresh.click()
    expect(host.view.get_by_role("heading", level=1)).to_have_text(socket.gethostname())
    assert host.said("tools/call") == [{"name": "ssh_system_info", "arguments": {"host": "127.0.0.1"}}]


def test_refused_refresh_says_why_and_leaves_the_report(host: Host) -> None:
    host.show(report(), host="elsewhere.example.com")
    expect(host.view.get_by_role("alert")).to_be_hidden()
    host.refresh.click()
    expect(host.view.get_by_role("alert")).to_contain_text("SSH_ALLOWED_HOSTS")
    expect(host.view.get_by_role("heading", level=1)).to_have_text("web1")
    expect(host.meter("/var")).to_be_visible()


def test_failed_or_cancelled_call_is_told(host: Host) -> None:
    failed = {"content": [{"type": "text", "text": "no route to web1"}], "isError": True}
    host.show(failed)
    expect(host.view.get_by_role("alert")).to_have_text("no route to web1")
    expect(host.view.get_by_role("status")).to_be_empty()
    host.answered("sendToolCancelled({ reason: 'the person changed their mind' })")
    expect(host.view.get_by_role("alert")).to_have_text("The call was cancelled.")


def test_what_a_machine_says_is_text_and_no_markup(host: Host) -> None:
    host.show(report())
    host.call("ssh_execute", command=f"true # {NASTY}", background=True)
    nasty = dict.fromkeys(("name", "version", "kernel", "architecture"), NASTY)
    cpu = {"model": NASTY, "cores": 8, "usage_percent": 12.5}
    host.show(report(hostname=NASTY, os=nasty, cpu=cpu, disks=[disk(NASTY, 50, NASTY)]))
    expect(host.view.get_by_role("heading", level=1)).to_have_text(NASTY)
    expect(host.meter(NASTY)).to_be_visible()
    expect(host.view.get_by_role("listitem").filter(has_text=f"true # {NASTY}").first).to_be_visible()
    host.show({"content": [{"type": "text", "text": NASTY}], "isError": True})
    expect(host.view.get_by_role("alert")).to_have_text(NASTY)
    assert host.view.locator("img").count() == 0


def test_only_the_application_is_listened_to(host: Host) -> None:
    host.show(report())
    message = {
        "jsonrpc": "2.0",
        "method": "ui/notifications/tool-result",
        "params": report(hostname="forged"),
    }
    host.tab.frames[-1].evaluate("(message) => postMessage(message, '*')", message)
    host.tab.evaluate("(message) => frames[0].frames[0].postMessage(message, '*')", message)
    assert host.answered("request({ method: 'ping' })") == {}
    expect(host.view.get_by_role("heading", level=1)).to_have_text("web1")


@pytest.mark.parametrize("offers", [{}, {"serverTools": {}}, {"serverResources": {}}])
def test_what_the_application_does_not_offer_is_not_asked_for(offers: dict[str, Any], host: Host) -> None:
    host.show(report(), offers=offers)
    jobs = host.view.get_by_role("region", name="Your jobs")
    expect(host.refresh).to_have_count(int("serverTools" in offers))
    expect(jobs).to_have_count(int("serverResources" in offers))
    assert len(host.said("resources/read")) == int("serverResources" in offers)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_stands_out_from_its_ground(scheme: str, host: Host) -> None:
    host.show(report(), context={"theme": scheme})
    host.answered("sendToolCancelled({})")
    expect(host.view.get_by_role("alert")).to_be_visible()
    expect(host.view.get_by_role("region", name="Your jobs")).to_be_visible()
    texts = host.in_view(TEXTS)
    # WCAG 2.2, 1.4.3: 4.5 to 1
    assert [text for text in texts if text[1] < 4.5] == []
    bars = f"""() => {{ {RELATIVE_LUMINANCE}
      const of = (e) => contrast(getComputedStyle(e).backgroundColor, background(document.body));
      return [...document.querySelectorAll("[role=meter] div")].map(of); }}"""
    # 1.4.11: 3 to 1
    assert min(host.in_view(bars)) >= 3


def test_theme_is_that_of_the_application(host_of: Callable[..., Host]) -> None:
    host = host_of(color_scheme="light")
    ground = f"() => {{ {RELATIVE_LUMINANCE} return luminance(background(document.body)); }}"
    host.show(report(), context={"theme": "dark"})
    assert host.in_view(ground) < 0.05
    host.answered("sendHostContextChange({ theme: 'light' })")
    assert host.answered("request({ method: 'ping' })") == {}
    assert host.in_view(ground) > 0.8
    variables = {"--color-background-primary": "rgb(1, 2, 3)", "--font-sans": "serif"}
    host.show(report(), context={"theme": "dark", "styles": {"variables": variables}})
    expect(host.view.locator("body")).to_have_css("background-color", "rgb(1, 2, 3)")
    expect(host.view.locator("body")).to_have_css("font-family", "serif")


@pytest.mark.parametrize("width", [320, 360, 800])
def test_nothing_sticks_out_sideways_and_the_frame_is_as_high_as_the_view(
    width: int, host_of: Callable[..., Host]
) -> None:
    long = "averylongnamewithoutaspace" * 8
    host = host_of(viewport={"width": width, "height": 700})
    system = {"name": long, "version": long, "kernel": long, "architecture": long}
    host.show(report(hostname=long, os=system, disks=[disk(f"/{long}", 97, long)]))
    host.call("ssh_execute", command=f"true {long}", background=True)
    host.show(report(hostname=long, os=system, disks=[disk(f"/{long}", 97, long)]))
    expect(host.view.get_by_text(f"true {long}").first).to_be_visible()
    assert host.in_view("document.documentElement.scrollWidth") == width
    height = "Math.ceil(document.documentElement.getBoundingClientRect().height)"
    expect(host.tab.locator("iframe")).to_have_css("height", f"{host.in_view(height)}px")
    wait_for(lambda: host.in_view("document.documentElement.scrollHeight <= innerHeight"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_keyboard_reaches_refresh_and_stays_there(scheme: str, host: Host) -> None:
    host.show(report(), context={"theme": scheme})
    expect(host.refresh).to_be_visible()
    host.tab.keyboard.press("Tab")
    expect(host.refresh).to_be_focused()
    text, style, width, contrast = host.in_view(FOCUSED)
    assert (text, style) == ("Refresh", "solid")
    assert width >= 2
    assert contrast >= 3
    host.tab.keyboard.press("Enter")
    expect(host.view.get_by_role("heading", level=1)).to_have_text(socket.gethostname())
    expect(host.refresh).to_be_focused()
    box = host.refresh.bounding_box()
    assert box is not None
    # WCAG 2.2, 2.5.5: big enough for a finger
    assert box["height"] >= 44
