"""The pages as text: what they say, what they escape, what they allow a browser."""

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

import pages
from pages import PageName

ROOT = Path(__file__).parents[1]
NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
VALUES: dict[PageName, dict[str, Any]] = {
    "landing": {"base_url": "https://mcp.example.com", "version": "1.2.3"},
    "consent": {
        "client_name": "Claude",
        "client_uri_host": "claude.ai",
        "redirect_host": "callback.example.net",
        "resources": ["https://mcp.example.com/mcp", "https://mcp.example.com/sse"],
        "fields": {"request": "signed.transaction", "csrf": "token-of-the-form"},
    },
    "leaving": {"url": "https://accounts.example.com/login?a=1&b=2", "host": "accounts.example.com"},
    "refused": {
        "email": "mallory@example.com",
        "client_name": "Claude",
        "leave_url": "https://claude.ai/callback?error=access_denied&state=x",
    },
    "faulty": {
        "url": "https://claude.ai/callback?error=invalid_request&state=x",
        "host": "claude.ai",
        "client_name": "Claude",
        "reason": "code_challenge is missing",
    },
    "error": {"title": "This page has expired", "message": "It was open too long.", "hint": "Connect again."},
}
each_page = pytest.mark.parametrize("name", VALUES)


def html(name: PageName, **changed: Any) -> str:
    return bytes(pages.page(name, **(VALUES[name] | changed)).body).decode()


@each_page
def test_page_allows_the_browser_nothing_but_its_own_style(name: PageName) -> None:
    answer = pages.page(name, **VALUES[name])
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["form-action"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["base-uri"] == "'none'"
    assert policy["img-src"] == "data:"
    (style,) = re.findall(r"<style>(.*?)</style>", html(name), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy["style-src"] == f"'sha256-{digest}'"
    assert set(policy) == {
        "default-src",
        "style-src",
        "img-src",
        "form-action",
        "frame-ancestors",
        "base-uri",
    }


@each_page
def test_page_is_not_stored_nor_framed_nor_sniffed(name: PageName) -> None:
    headers = pages.page(name, **VALUES[name]).headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["content-type"] == "text/html; charset=utf-8"


@each_page
def test_page_has_no_script_no_inline_style_and_loads_nothing(name: PageName) -> None:
    text = html(name)
    assert not re.search(r"<script|<link(?! rel=\"icon\" href=\"data:)|<img|<iframe|\son\w+=|\sstyle=", text)


@each_page
def test_each_value_is_escaped(name: PageName) -> None:
    for value, given in VALUES[name].items():
        nasty: Any = [NASTY] if isinstance(given, list) else NASTY
        text = html(name, **{value: {NASTY: NASTY} if isinstance(given, dict) else nasty})
        assert "<script" not in text
        assert "<img" not in text
        assert "&lt;script" in text


@each_page
def test_missing_value_is_an_error_and_not_a_gap(name: PageName) -> None:
    for value in VALUES[name]:
        with pytest.raises(UndefinedError, match=value):
            pages.page(name, **{key: given for key, given in VALUES[name].items() if key != value})


def test_status_is_the_one_asked_for() -> None:
    assert pages.page("refused", 403, **VALUES["refused"]).status_code == 403


def test_landing_shows_this_servers_own_addresses() -> None:
    text = html("landing", base_url="https://ssh.example.org")
    assert ">https://ssh.example.org/mcp</code>" in text
    assert ">https://ssh.example.org/sse</code>" in text
    assert "claude mcp add --transport http ssh https://ssh.example.org/mcp" in text
    assert "mcp.example.com" not in text
    for client in ("Claude", "Claude Code", "ChatGPT", "Cursor"):
        assert f"<h3>{client}</h3>" in text


def test_consent_names_the_redirect_host_before_the_name_that_the_client_gave_itself() -> None:
    text = html("consent")
    assert text.index("callback.example.net") < text.index("Claude")
    assert "nobody checked it" in text


def test_consent_form_carries_its_fields_and_two_equal_buttons() -> None:
    text = html("consent")
    (form,) = re.findall(r"<form.*?</form>", text, re.DOTALL)
    assert '<form method="post" action="/consent">' in form
    assert '<input type="hidden" name="request" value="signed.transaction">' in form
    assert '<input type="hidden" name="csrf" value="token-of-the-form">' in form
    assert re.findall(r"<button (.*?)>", form) == [
        'name="decision" value="deny"',
        'name="decision" value="approve"',
    ]


def test_consent_says_where_a_client_describes_itself_only_if_it_does() -> None:
    assert "It describes itself at" in html("consent")
    assert "It describes itself at" not in html("consent", client_uri_host=None)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "127.0.0.1", "127.0.0.1:33418", "[::1]:80", "[::1]", "::1"]
)
def test_consent_says_that_a_loopback_address_is_this_computer(host: str) -> None:
    assert "the computer that you sit at" in html("consent", redirect_host=host)


@pytest.mark.parametrize(
    "host", ["localhost.example.com", "127.0.0.1.example.com", "xn--localhst-p4a", "10.0.0.1:80", "[::2]:80"]
)
def test_consent_takes_no_other_address_for_this_computer(host: str) -> None:
    assert "the computer that you sit at" not in html("consent", redirect_host=host)


def test_consent_says_that_a_scheme_of_its_own_is_opened_by_some_program() -> None:
    assert "whichever program on this device" in html("consent", redirect_host="cursor:")
    assert "whichever program on this device" not in html("consent", redirect_host="cursor.example.com:443")


@pytest.mark.parametrize(
    "unseen",
    ["\u202e", "\u200b", "\u2066", "\u2028", "\x00", "\n", "\ufeff", "\u00ad", "\ue000", "\U000e0041"],
)
@pytest.mark.parametrize(
    ("name", "value"), [("consent", "client_name"), ("consent", "redirect_host"), ("refused", "email")]
)
def test_unseen_characters_and_turned_directions_are_made_visible(
    name: PageName, value: str, unseen: str
) -> None:
    text = html(name, **{value: f"left{unseen}right"})
    assert "left\N{REPLACEMENT CHARACTER}right" in text
    assert f"left{unseen}right" not in text


def test_long_name_is_cut() -> None:
    text = html("consent", client_name="n" * 5000)
    assert "n" * 199 + "…" in text
    assert "n" * 200 not in text


def test_leaving_goes_on_by_itself_and_by_a_link() -> None:
    text = html("leaving")
    escaped = "https://accounts.example.com/login?a=1&amp;b=2"
    assert f'<meta http-equiv="refresh" content="0;url={escaped}">' in text
    assert f'href="{escaped}"' in text


def test_only_leaving_goes_on_by_itself() -> None:
    assert [name for name in VALUES if 'http-equiv="refresh"' in html(name)] == ["leaving"]


def test_templates_are_in_the_wheel(tmp_path: Path) -> None:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "build", "--wheel", "-q", "--out-dir", tmp_path], cwd=ROOT, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"templates/{path.name}" for path in (ROOT / "templates").iterdir()} <= names
