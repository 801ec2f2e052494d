"""Attacks on the login and the tokens, played for real against the running server: a checklist.

Each line of the tables says what the attacker does, which text forbids that it works, and what must come of it. Lines
that begin with "honest" are the positive controls: the same moves without malice, which must go through, so that no
attack fails only because everything does.
"""

import ast
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import attacks_on_login as login
import attacks_on_servers as servers
import attacks_on_tokens as tokens
import attacks_on_wire as wire
from attacks import (
    GOOD,
    Attack,
    Stage,
    altered,
    asks,
    asks_as,
    asks_by_post,
    asks_to_be_sent,
    comes_back_with,
    decides,
    either,
    forges_id_token,
    gives_code,
    hmac_with_client_secret,
    hmac_with_public_key,
    json_error,
    key_in_header,
    knocks_with,
    makes_us_fetch,
    none_algorithm,
    not_logged_in,
    other_key,
    play,
    posts_to_register,
    posts_to_token,
    redeems,
    registers,
    sent_back,
    status,
    table,
    too_many,
    true,
    unauthorized,
    unsigned,
    with_claims,
    with_email,
    with_header,
    works,
)
from attacks_on_login import BAD_REQUEST, FORBIDDEN, INVALID, NO_GRANT, REFUSED_DATA, REFUSED_URI
from attacks_on_servers import DAY, HOUR, MINUTE
from attacks_on_tokens import INVALID_GRANT
from oauth import CALLBACK, ME, STRANGER, YOU, Google, Remote, make_remote, query_of
from redis_process import redis_server

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stage(remote: Remote, google: Google) -> Iterator[Stage]:
    stage = Stage(remote, google)
    yield stage
    stage.close()


# Registration: who may be sent a code at all


# fmt: off
REGISTRATION = [
    Attack("honest: an https redirect URI", "RFC 7591 3.2.1", works, registers(GOOD)),
    Attack("honest: a loopback port", "RFC 8252 7.3", works, registers("http://127.0.0.1:4711/callback")),
    Attack("honest: a loopback port of IPv6", "RFC 8252 7.3", works, registers("http://[::1]:4711/callback")),
    Attack("honest: localhost", "RFC 8252 8.3", works, registers("http://localhost/callback")),
    Attack("honest: a private-use scheme", "RFC 8252 7.1", works, registers("com.example.app:/callback")),
    Attack("honest: a private-use scheme with a host", "RFC 8252 7.1", works, registers("cursor://app/back")),
    Attack("honest: ten redirect URIs", "contract", works, registers(*(f"{GOOD}/{i}" for i in range(10)))),
    Attack("javascript: URI", "RFC 9700 4.1", REFUSED_URI, registers("javascript:alert(document.cookie)")),
    Attack("JavaScript: in mixed case", "RFC 9700 4.1", REFUSED_URI, registers("JaVaScRiPt:alert(1)//x/")),
    Attack("javascript: after a tab", "RFC 9700 4.1", REFUSED_DATA, registers("\tjava\tscript:alert(1)")),
    Attack("data: URI", "RFC 9700 4.1", REFUSED_URI, registers("data:text/html,<script>1</script>")),
    Attack("vbscript: URI", "RFC 9700 4.1", REFUSED_URI, registers("vbscript:msgbox(1)")),
    Attack("file: URI", "RFC 9700 4.1", REFUSED_URI, registers("file:///etc/passwd")),
    Attack("smb: URI", "RFC 9700 4.1", REFUSED_URI, registers("smb://evil.example/x")),
    Attack("search-ms: URI", "RFC 9700 4.1", REFUSED_URI, registers("search-ms:/query")),
    Attack("blob: URI", "RFC 9700 4.1", REFUSED_URI, registers("blob:https://good.example/1")),
    Attack("about: URI", "RFC 9700 4.1", REFUSED_URI, registers("about:blank")),
    Attack("plain http beyond loopback", "RFC 9700 2.6", REFUSED_URI, registers("http://good.example/cb")),
    Attack("host that begins with localhost", "RFC 8252 7.3", REFUSED_URI,
           registers("http://localhost.evil.example/")),
    Attack("host that begins with 127.0.0.1", "RFC 8252 7.3", REFUSED_URI,
           registers("http://127.0.0.1.evil.example/")),
    Attack("loopback as user name", "RFC 9700 4.1.1", REFUSED_URI, registers("http://127.0.0.1:80@evil.example/")),
    Attack("good host as user name", "RFC 9700 4.1.1", REFUSED_URI, registers("https://good.example@evil.example/")),
    Attack("loopback as a decimal number", "RFC 8252 7.3", REFUSED_URI, registers("http://2130706433/callback")),
    Attack("web host that browsers read as an address", "WHATWG URL 3.5", REFUSED_URI,
           registers("https://0x7f.1/callback")),
    Attack("address that means every interface", "RFC 8252 7.3", REFUSED_URI, registers("http://0.0.0.0/callback")),
    Attack("fragment", "RFC 6749 3.1.2", REFUSED_URI, registers(f"{GOOD}#fragment")),
    Attack("empty fragment", "RFC 6749 3.1.2", REFUSED_URI, registers(f"{GOOD}#")),
    Attack("wildcard host", "RFC 9700 4.1.3", REFUSED_URI, registers("https://*.good.example/callback")),
    Attack("backslash before the host", "RFC 9700 4.1.1", REFUSED_URI,
           registers("https://evil.example\\@good.example/")),
    Attack("line break", "RFC 9700 4.1", REFUSED_DATA, registers("https://good.example/\r\nX-Header: 1")),
    Attack("relative URI", "RFC 6749 3.1.2", REFUSED_DATA, registers("/callback")),
    Attack("https without a host", "RFC 6749 3.1.2", REFUSED_DATA, registers("https:///callback")),
    Attack("no redirect URI", "RFC 7591 2", REFUSED_DATA, registers()),
    Attack("one bad URI among good ones", "RFC 7591 2", REFUSED_URI, registers(GOOD, "javascript:alert(1)")),
    Attack("eleven redirect URIs", "contract", REFUSED_DATA, registers(*(f"{GOOD}/{i}" for i in range(11)))),
    Attack("name of 201 characters", "contract", REFUSED_DATA, registers(GOOD, client_name="n" * 201)),
    Attack("honest: name of 200 characters", "contract", works, registers(GOOD, client_name="n" * 200)),
    Attack("more than 64 kB", "contract", status(413), posts_to_register(b'{"a":"' + b"a" * 66_000 + b'"}')),
    Attack("text that is no JSON", "RFC 7591 3.2.2", REFUSED_DATA, posts_to_register(b"{")),
    Attack("JSON that is no object", "RFC 7591 3.2.2", REFUSED_DATA, posts_to_register(b'["x"]')),
    Attack("JSON nested 30,000 deep", "RFC 7591 3.2.2", REFUSED_DATA, posts_to_register(b"[" * 30_000)),
    Attack("text that is not UTF-8", "RFC 7591 3.2.2", REFUSED_DATA, posts_to_register(b'{"client_name":"\xff"}')),
    Attack("markup as the client's name", "RFC 7591 5", works, login.registered_name_is_not_markup),
    Attack("text reversal in the name", "RFC 7591 5", works, login.registered_name_cannot_reverse_the_text),
    Attack("look-alike letters in the host", "RFC 9700 4.1", works, login.registered_host_that_looks_like_another),
    Attack("links into our network", "RFC 7591 5", works, login.registered_links_are_not_fetched),
    Attack("script as the client's link", "RFC 7591 5", works, login.registered_script_is_no_link),
    Attack("grants that nobody should have", "RFC 9700 2.4", NO_GRANT,
           login.registration_for_other_grants_gives_none_of_them),
]
# fmt: on


@table(REGISTRATION)
def test_registration(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# Authorization: where the browser is sent


# fmt: off
REDIRECTS = [
    Attack("honest: the registered URI", "RFC 6749 4.1.1", works, asks(GOOD)),
    Attack("honest: another port of loopback", "RFC 8252 7.3", works,
           asks_to_be_sent("http://127.0.0.1:5/callback", CALLBACK)),
    Attack("honest: without redirect URI, one being registered", "RFC 6749 3.1.2.3", works, asks(redirect_uri=None)),
    Attack("other host", "RFC 9700 2.1", BAD_REQUEST, asks_to_be_sent("https://evil.example/callback")),
    Attack("subdomain", "RFC 9700 4.1.3", BAD_REQUEST, asks_to_be_sent("https://evil.good.example/callback")),
    Attack("host that begins alike", "RFC 9700 4.1.1", BAD_REQUEST,
           asks_to_be_sent("https://good.example.evil.example/callback")),
    Attack("path that begins alike", "RFC 9700 4.1.3", BAD_REQUEST, asks_to_be_sent(f"{GOOD}/more")),
    Attack("path traversal", "RFC 9700 4.1.3", BAD_REQUEST, asks_to_be_sent(f"{GOOD}/../evil")),
    Attack("encoded path traversal", "RFC 9700 4.1.3", BAD_REQUEST, asks_to_be_sent(f"{GOOD}/%2e%2e/evil")),
    Attack("encoded slash", "RFC 9700 4.1.3", BAD_REQUEST, asks_to_be_sent("https://good.example%2fcallback")),
    Attack("trailing slash", "RFC 9700 4.1.3", BAD_REQUEST, asks_to_be_sent(f"{GOOD}/")),
    Attack("path in other case", "RFC 9700 4.1.3", BAD_REQUEST, asks_to_be_sent("https://good.example/Callback")),
    Attack("additional query", "RFC 9700 4.1.3", BAD_REQUEST, asks_to_be_sent(f"{GOOD}?next=https://evil.example")),
    Attack("fragment", "RFC 9700 4.1.1", BAD_REQUEST, asks_to_be_sent(f"{GOOD}#x")),
    Attack("user name before the host", "RFC 9700 4.1.1", BAD_REQUEST,
           asks_to_be_sent("https://good.example:x@evil.example/callback")),
    Attack("backslash before the host", "RFC 9700 4.1.1", BAD_REQUEST,
           asks_to_be_sent("https://evil.example\\@good.example/callback")),
    Attack("other port on the web", "RFC 9700 4.1.3", BAD_REQUEST,
           asks_to_be_sent("https://good.example:8443/callback")),
    Attack("plain http", "RFC 9700 4.1.3", BAD_REQUEST, asks_to_be_sent("http://good.example/callback")),
    Attack("full-width dot in the host", "RFC 9700 4.1.3", BAD_REQUEST,
           asks_to_be_sent("https://good\u3002evil.example/callback")),
    Attack("line break", "RFC 9700 4.1.3", BAD_REQUEST, asks_to_be_sent(f"{GOOD}\r\nX: y")),
    Attack("other path of loopback", "RFC 8252 7.3", BAD_REQUEST,
           asks_to_be_sent("http://127.0.0.1:5/evil", CALLBACK)),
    Attack("localhost for 127.0.0.1", "RFC 8252 8.3", BAD_REQUEST,
           asks_to_be_sent("http://localhost:39999/callback", CALLBACK)),
    Attack("[::1] for 127.0.0.1", "RFC 8252 7.3", BAD_REQUEST,
           asks_to_be_sent("http://[::1]:39999/callback", CALLBACK)),
    Attack("https for http on loopback", "RFC 8252 7.3", BAD_REQUEST,
           asks_to_be_sent("https://127.0.0.1:39999/callback", CALLBACK)),
    Attack("loopback as user name", "RFC 8252 7.3", BAD_REQUEST,
           asks_to_be_sent("http://127.0.0.1:1@evil.example/callback", CALLBACK)),
    Attack("port that is no number", "RFC 8252 7.3", BAD_REQUEST,
           asks_to_be_sent("http://127.0.0.1:x.evil.example/callback", CALLBACK)),
    Attack("other path of a private-use scheme", "RFC 8252 7.1", BAD_REQUEST,
           asks_to_be_sent("com.example.app:/evil", "com.example.app:/callback")),
    Attack("two redirect URIs, the evil one last", "RFC 6749 3.1", BAD_REQUEST,
           login.asks_with_two_redirect_uris(GOOD, "https://evil.example/")),
    Attack("two redirect URIs, the evil one first", "RFC 6749 3.1", BAD_REQUEST,
           login.asks_with_two_redirect_uris("https://evil.example/", GOOD)),
    Attack("no client id", "RFC 6749 4.1.2.1", BAD_REQUEST, asks(client_id=None)),
    Attack("client id that nobody registered", "RFC 6749 4.1.2.1", BAD_REQUEST, asks_as("nobody")),
    Attack("client id twice", "RFC 6749 3.1", BAD_REQUEST, asks(more="&client_id=other")),
    Attack("client id with another signature", "RFC 7591 5", BAD_REQUEST,
           login.asks_with_client_id_of_another_server),
    Attack("client id with a NUL byte", "RFC 6749 3.1", BAD_REQUEST, asks_as("x\0y")),
    Attack("access token as client id", "RFC 8725 2.8", BAD_REQUEST,
           login.uses_as_client_id(lambda s: s.tokens().access)),
    Attack("refresh token as client id", "RFC 8725 2.8", BAD_REQUEST,
           login.uses_as_client_id(lambda s: s.tokens().refresh)),
    Attack("authorization code as client id", "RFC 8725 2.8", BAD_REQUEST, login.uses_as_client_id(login.code_of)),
    Attack("consent request as client id", "RFC 8725 2.8", BAD_REQUEST,
           login.uses_as_client_id(login.consent_request)),
    Attack("request has a side effect", "RFC 9110 9.2.1", works, login.authorize_has_no_side_effect),
    Attack("headers and markup in state", "RFC 9700 4.1", gives_code, login.state_is_returned_as_it_was),
    Attack("state of 30,000 characters", "RFC 6749 10", either(status(400, 414, 431), INVALID), login.long_state),
]
# fmt: on


@table(REDIRECTS)
def test_redirect(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# Authorization: what is asked for

NO_REQUEST_URI = sent_back("request_uri_not_supported", "invalid_request")
ASKS_A_PERSON = sent_back("login_required", "consent_required", "interaction_required")
NO_TARGET = sent_back("invalid_target")
DUPLICATE = either(BAD_REQUEST, INVALID)


# fmt: off
REQUESTS = [
    Attack("honest: the resource /mcp", "RFC 8707 2", works, asks(resource="BASE/mcp")),
    Attack("honest: the resource /sse", "RFC 8707 2", works, asks(resource="BASE/sse")),
    Attack("honest: the bare origin", "RFC 8707 2", works, asks(resource="BASE")),
    Attack("honest: the bare origin with a slash", "RFC 8707 2", works, asks(resource="BASE/")),
    Attack("honest: no resource", "RFC 8707 2", works, asks(resource=None)),
    Attack("honest: a scope of Claude's", "RFC 6749 3.3", works, asks(scope="claudeai")),
    Attack("honest: the request by POST", "RFC 6749 3.1", either(works, status(302, 303, 405)), asks_by_post()),
    Attack("no PKCE challenge", "RFC 9700 4.8.2", INVALID, asks(code_challenge=None, code_challenge_method=None)),
    Attack("no PKCE challenge, by POST", "RFC 9700 4.8.2", either(INVALID, status(405)),
           asks_by_post(code_challenge=None, code_challenge_method=None)),
    Attack("PKCE method plain", "RFC 9700 2.1.1", INVALID, asks(code_challenge_method="plain")),
    Attack("no PKCE method, which means plain", "RFC 7636 4.3", INVALID, asks(code_challenge_method=None)),
    Attack("unknown PKCE method", "RFC 7636 4.4.1", INVALID, asks(code_challenge_method="S512")),
    Attack("challenge too short for S256", "RFC 7636 4.2", INVALID, asks(code_challenge="short")),
    Attack("empty challenge", "RFC 7636 4.2", INVALID, asks(code_challenge="")),
    Attack("challenge twice", "RFC 6749 3.1", DUPLICATE, asks(more=f"&code_challenge={'A' * 43}")),
    Attack("state twice", "RFC 6749 3.1", DUPLICATE, asks(more="&state=other")),
    Attack("response type token", "RFC 9700 2.1.2", sent_back("unsupported_response_type"),
           asks(response_type="token")),
    Attack("response type code token", "RFC 9700 2.1.2", sent_back("unsupported_response_type"),
           asks(response_type="code token")),
    Attack("response type code id_token", "RFC 9700 2.1.2", sent_back("unsupported_response_type"),
           asks(response_type="code id_token")),
    Attack("no response type", "RFC 6749 4.1.2.1", INVALID, asks(response_type=None)),
    Attack("code in the fragment", "RFC 9700 4.1.1", either(works, INVALID), login.fragment_as_response_mode),
    Attack("resource of another server", "RFC 8707 2", NO_TARGET, asks(resource="https://evil.example/mcp")),
    Attack("resource whose host begins alike", "RFC 8707 2", NO_TARGET, asks(resource="BASE.evil.example/mcp")),
    Attack("resource with us as user name", "RFC 8707 2", NO_TARGET, asks(resource="BASE@evil.example/mcp")),
    Attack("resource with a fragment", "RFC 8707 2", NO_TARGET, asks(resource="BASE/mcp#x")),
    Attack("resource by path traversal", "RFC 8707 2", NO_TARGET, asks(resource="BASE/x/../mcp")),
    Attack("path that is no resource", "RFC 8707 2", NO_TARGET, asks(resource="BASE/token")),
    Attack("relative resource", "RFC 8707 2", NO_TARGET, asks(resource="/mcp")),
    Attack("another resource beside ours", "RFC 8707 2", either(NO_TARGET, DUPLICATE),
           asks(more="&resource=https%3A%2F%2Fevil.example%2Fmcp")),
    Attack("request URI into our network", "RFC 9101 10.4", either(works, NO_REQUEST_URI),
           login.request_uri_is_not_fetched),
    Attack("faulty request as a link to a stranger", "RFC 9700 4.11.2", BAD_REQUEST,
           login.faulty_request_of_a_stranger),
    Attack("prompt=none after a consent", "OIDC Core 3.1.2.1", either(works, ASKS_A_PERSON),
           login.prompt_none_gives_no_code),
    Attack("second login rides on the first consent", "MCP security: confused deputy", works,
           login.second_login_asks_again),
    Attack("client document on loopback", "draft CIMD 6.5", BAD_REQUEST,
           makes_us_fetch("https://127.0.0.1:PORT/client.json")),
    Attack("client document on localhost", "draft CIMD 6.5", BAD_REQUEST,
           makes_us_fetch("https://localhost:PORT/client.json")),
    Attack("client document on [::ffff:127.0.0.1]", "draft CIMD 6.5", BAD_REQUEST,
           makes_us_fetch("https://[::ffff:127.0.0.1]:PORT/client.json")),
    Attack("client document at a decimal address", "draft CIMD 6.5", BAD_REQUEST,
           makes_us_fetch("https://2130706433:PORT/client.json")),
    Attack("client document on 0.0.0.0", "draft CIMD 6.5", BAD_REQUEST,
           makes_us_fetch("https://0.0.0.0:PORT/client.json")),
    Attack("client document by plain http", "draft CIMD 3", BAD_REQUEST,
           makes_us_fetch("http://127.0.0.1:PORT/client.json")),
    Attack("client document with a user name", "draft CIMD 3", BAD_REQUEST,
           makes_us_fetch("https://good.example@127.0.0.1:PORT/c")),
    Attack("client document at the cloud's metadata", "draft CIMD 6.5", BAD_REQUEST,
           asks_as("https://169.254.169.254/latest/meta-data")),
    Attack("client document in a private network", "draft CIMD 6.5", BAD_REQUEST,
           asks_as("https://10.0.0.1/client.json")),
    Attack("client document at the root", "draft CIMD 3", BAD_REQUEST, asks_as("https://good.example/")),
]
# fmt: on


@table(REQUESTS)
def test_authorization_request(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# Consent: who agrees to what


# fmt: off
CONSENT = [
    Attack("honest: approval", "MCP security: confused deputy", login.agreed, decides()),
    Attack("honest: denial", "RFC 6749 4.1.2.1", sent_back("access_denied"), login.denied),
    Attack("form sent without the browser's cookie", "RFC 9700 4.7", FORBIDDEN, login.consent_without_cookie),
    Attack("attacker's form in the victim's browser", "RFC 9700 4.7", FORBIDDEN, login.consent_of_another_browser),
    Attack("cookie behind a space that only servers strip", "RFC 6265bis 4.1.3", FORBIDDEN,
           login.consent_cookie_behind_a_space_that_only_servers_strip),
    Attack("cookie twice", "RFC 6265 8.6", FORBIDDEN, login.consent_cookie_twice),
    Attack("cookie that the attacker chose", "RFC 9700 4.7", FORBIDDEN,
           login.consent_with_a_cookie_that_the_attacker_chose),
    Attack("proof of another request", "RFC 9700 4.7", FORBIDDEN, login.consent_with_fields_of_two_requests),
    Attack("form from another origin", "RFC 9700 4.7", FORBIDDEN,
           decides(Origin="https://evil.example", Referer="https://evil.example/")),
    Attack("form from a sandboxed frame", "RFC 9700 4.7", FORBIDDEN, decides(Origin="null", Referer="")),
    Attack("approval by a link", "RFC 9110 9.2.1", status(200, 400, 405), login.consent_by_get),
    Attack("no decision", "MCP security: confused deputy", FORBIDDEN, decides(decision=None)),
    Attack("unknown decision", "MCP security: confused deputy", FORBIDDEN, decides(decision="yes")),
    Attack("altered request", "RFC 9700 4.7", FORBIDDEN, login.consent_altered),
    Attack("code in the request's place", "RFC 8725 2.8", FORBIDDEN,
           login.consent_request_replaced_by(login.code_of)),
    Attack("Google's state in the request's place", "RFC 8725 2.8", FORBIDDEN,
           login.consent_request_replaced_by(login.google_state)),
    Attack("client id in the request's place", "RFC 8725 2.8", FORBIDDEN,
           login.consent_request_replaced_by(lambda s: s.app().client_id)),
    Attack("page for a made-up request", "RFC 9700 4.7", FORBIDDEN,
           login.consent_page_opened_with(lambda s: "made.up")),
    Attack("page for Google's state", "RFC 8725 2.8", FORBIDDEN, login.consent_page_opened_with(login.google_state)),
    Attack("page for a refresh token", "RFC 8725 2.8", FORBIDDEN,
           login.consent_page_opened_with(lambda s: s.tokens().refresh)),
    Attack("form of more than 64 kB", "contract", status(413), login.oversized_consent),
    Attack("script reads the cookie, site sends it", "RFC 6265bis 4.1.2", works, login.cookie_flags),
]
# fmt: on


@table(CONSENT)
def test_consent(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# The way back from Google


NOW = int(time.time())


# fmt: off
WAY_BACK = [
    Attack("honest: a login", "OIDC Core 3.1", gives_code, login.honest_login),
    Attack("honest: an ID token made by hand", "OIDC Core 3.1.3.7", gives_code, forges_id_token()),
    Attack("honest: the address in capitals", "contract", gives_code, with_email(ME.upper())),
    Attack("honest: Google's key changes", "OIDC Core 10.1.1", gives_code, login.google_rotates_its_key),
    Attack("honest: Google says access denied", "RFC 6749 4.1.2.1", sent_back("access_denied"), login.google_denies),
    Attack("answer opened without a cookie", "RFC 9700 4.7", FORBIDDEN, login.callback_without_cookie),
    Attack("attacker's answer in the victim's browser", "RFC 9700 4.7", FORBIDDEN, login.callback_in_another_browser),
    Attack("consent by the attacker, login by the victim", "MCP security: confused deputy", FORBIDDEN,
           login.consent_phished),
    Attack("no state", "RFC 9700 4.7", FORBIDDEN, login.callback_changed(state=None)),
    Attack("altered state", "RFC 9700 4.7", FORBIDDEN, login.callback_changed(state=lambda s, v: altered(v))),
    Attack("consent request as state", "RFC 8725 2.8", FORBIDDEN,
           login.callback_changed(state=lambda s, v: login.consent_request(s))),
    Attack("state of another browser", "RFC 9700 4.7", FORBIDDEN,
           login.callback_changed(state=lambda s, v: login.google_state(s))),
    Attack("no code", "RFC 6749 4.1.2", not_logged_in, login.callback_changed(code=None)),
    Attack("code that Google does not know", "RFC 9700 4.5", not_logged_in, login.callback_changed(code="made-up")),
    Attack("code of Google for the victim", "RFC 9700 4.5", not_logged_in, login.google_code_of_another_login),
    Attack("code of another login of this browser", "RFC 9700 4.5", not_logged_in, login.callback_of_another_app),
    Attack("answer of another provider", "RFC 9207 2.4", not_logged_in,
           login.callback_changed(iss="https://evil.example")),
    Attack("answer replayed", "RFC 9700 4.5", not_logged_in, login.callback_twice),
    Attack("state used for a second login", "RFC 9700 4.7", not_logged_in, login.state_for_a_second_login),
    Attack("state twice", "RFC 6749 3.1", FORBIDDEN, login.callback_with_doubled("state")),
    Attack("code twice", "RFC 6749 3.1", not_logged_in, login.callback_with_doubled("code")),
    Attack("answer by POST", "RFC 9110 15.5.6", status(405), login.callback_by_post),
    Attack("markup in an error for nobody", "RFC 6749 10.14", FORBIDDEN, login.google_error_for_nobody),
    Attack("Google down", "RFC 6749 4.1.2.1", not_logged_in, login.google_is_down),
    Attack("nonce of another login", "OIDC Core 3.1.3.7 11", not_logged_in, forges_id_token(nonce="other")),
    Attack("no nonce", "OIDC Core 3.1.3.7 11", not_logged_in, forges_id_token(nonce=None)),
    Attack("other issuer", "OIDC Core 3.1.3.7 2", not_logged_in, forges_id_token(iss="https://evil.example")),
    Attack("no issuer", "OIDC Core 3.1.3.7 2", not_logged_in, forges_id_token(iss=None)),
    Attack("other audience", "OIDC Core 3.1.3.7 3", not_logged_in, forges_id_token(aud="other")),
    Attack("no audience", "OIDC Core 3.1.3.7 3", not_logged_in, forges_id_token(aud=None)),
    Attack("ours among audiences, given to another party", "OIDC Core 3.1.3.7 5", not_logged_in,
           forges_id_token(aud=["our-id-at-google", "other"], azp="other")),
    Attack("expired", "OIDC Core 3.1.3.7 9", not_logged_in, forges_id_token(exp=NOW - HOUR, iat=NOW - 2 * HOUR)),
    Attack("without expiry", "OIDC Core 2", not_logged_in, forges_id_token(exp=None)),
    Attack("issued tomorrow", "OIDC Core 3.1.3.7 10", not_logged_in,
           forges_id_token(iat=NOW + 24 * HOUR, exp=NOW + 25 * HOUR)),
    Attack("without subject", "OIDC Core 2", not_logged_in, forges_id_token(sub=None)),
    Attack("algorithm none", "RFC 8725 3.2", not_logged_in, comes_back_with(none_algorithm)),
    Attack("HS256 with the client secret", "RFC 8725 2.1", not_logged_in, comes_back_with(hmac_with_client_secret)),
    Attack("HS256 with Google's public key", "RFC 8725 2.1", not_logged_in, comes_back_with(hmac_with_public_key)),
    Attack("signed with another key", "RFC 8725 3.3", not_logged_in, comes_back_with(other_key)),
    Attack("key brought along in the header", "RFC 8725 3.10", not_logged_in, comes_back_with(key_in_header)),
    Attack("key to be fetched from the attacker", "RFC 8725 3.10", not_logged_in, login.key_from_elsewhere),
    Attack("critical header that nobody knows", "RFC 7515 4.1.11", not_logged_in,
           comes_back_with(login.token_header(crit=["x"], x=1))),
    Attack("key that Google withdrew", "OIDC Core 10.1.1", not_logged_in, login.old_google_key),
    Attack("no ID token but text", "OIDC Core 3.1.3.7", not_logged_in, comes_back_with(lambda s, c: "nonsense")),
    Attack("unverified address", "OIDC Core 5.7", login.refused_person, forges_id_token(email_verified=False)),
    Attack("verified being the text false", "OIDC Core 5.1", login.refused_person,
           forges_id_token(email_verified="false")),
    Attack("nothing said of verification", "OIDC Core 5.7", login.refused_person,
           forges_id_token(email_verified=None)),
    Attack("no address", "OIDC Core 5.7", not_logged_in, forges_id_token(email=None)),
    Attack("address that is a list", "OIDC Core 5.1", not_logged_in, with_email([ME])),
    Attack("somebody not on the list", "contract", login.refused_person, login.refused_then_back),
    Attack("honest: an address with k and s", "contract", gives_code, with_email("Kiss@Example.com")),
    Attack("Kelvin sign for k in an address", "RFC 9700 / UTS 39", login.refused_person,
           with_email("\u212aiss@example.com")),
    Attack("long s for s in an address", "RFC 9700 / UTS 39", login.refused_person,
           with_email("ki\u017f\u017f@example.com")),
    Attack("sharp s for ss in an address", "RFC 9700 / UTS 39", login.refused_person,
           with_email("ki\u00df@example.com")),
    Attack("full-width letter in an address", "RFC 9700 / UTS 39", login.refused_person,
           with_email("\uff4de@example.com")),
    Attack("Cyrillic letter in an address", "RFC 9700 / UTS 39", login.refused_person,
           with_email("m\u0435@example.com")),
    Attack("invisible letter in an address", "RFC 9700 / UTS 39", login.refused_person,
           with_email("me\u200b@example.com")),
    Attack("space behind an address", "RFC 5321 2.3.11", login.refused_person, with_email(f"{ME} ")),
    Attack("line break behind an address", "RFC 5321 2.3.11", login.refused_person, with_email(f"{ME}\n")),
    Attack("two addresses in one", "RFC 5321 2.3.11", login.refused_person, with_email(f"{ME},{YOU}")),
    Attack("address inside another one", "RFC 5321 2.3.11", login.refused_person, with_email(f'"{ME}"@evil.example')),
    Attack("dots as Gmail ignores them", "RFC 5321 2.3.11", login.refused_person, with_email("m.e@example.com")),
    Attack("part behind a plus sign", "RFC 5321 2.3.11", login.refused_person, with_email("me+x@example.com")),
]
# fmt: on


@table(WAY_BACK)
def test_callback(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# The token endpoint

INVALID_REQUEST = json_error("invalid_request", "invalid_grant", "unsupported_grant_type", "invalid_client")
NO_GRANT_TYPE = json_error("unsupported_grant_type", "invalid_request")
NO_SUCH_TARGET = json_error("invalid_target")
UNKNOWN = json_error("invalid_client", "invalid_grant", status=(400, 401))
NO_CLIENT = json_error("invalid_client", "invalid_request", status=(400, 401))
NO_FORM = status(400, 413, 415)

# fmt: off
CODES = [
    Attack("honest: a code", "RFC 6749 4.1.3", works, redeems()),
    Attack("honest: a code without redirect URI", "OAuth 2.1 4.1.3", works, redeems(redirect_uri=None)),
    Attack("honest: the resource again", "RFC 8707 2.2", works, redeems(resource="BASE/mcp")),
    Attack("honest: answer is not stored", "RFC 6749 5.1", works, tokens.answers_with_tokens_are_not_stored),
    Attack("no verifier", "RFC 9700 4.8.2", INVALID_REQUEST, redeems(code_verifier=None)),
    Attack("empty verifier", "RFC 7636 4.6", INVALID_REQUEST, redeems(code_verifier="")),
    Attack("other verifier", "RFC 7636 4.6", INVALID_GRANT, redeems(code_verifier="v" * 64)),
    Attack("challenge as verifier", "RFC 7636 7.2", INVALID_GRANT, tokens.challenge_as_verifier),
    Attack("stolen code in another session", "RFC 9700 4.5", INVALID_GRANT, tokens.code_injected),
    Attack("stolen code at another client", "RFC 6749 4.1.3", INVALID_GRANT, tokens.code_of_another_client),
    Attack("other redirect URI", "RFC 6749 4.1.3", INVALID_GRANT, redeems(redirect_uri=GOOD)),
    Attack("other port in the redirect URI", "RFC 6749 4.1.3", INVALID_GRANT,
           redeems(redirect_uri="http://127.0.0.1:1/callback")),
    Attack("code twice", "RFC 6749 4.1.2", INVALID_GRANT, tokens.code_twice),
    Attack("code twice, its tokens refreshed in between", "RFC 9700 4.5", INVALID_GRANT,
           tokens.code_twice_after_refresh),
    Attack("code replayed without its verifier", "RFC 6749 4.1.2", unauthorized,
           tokens.code_replayed_without_its_verifier),
    Attack("code many times at one moment", "RFC 6749 4.1.2", unauthorized, tokens.code_many_times_at_once),
    Attack("altered code", "RFC 6749 10.5", INVALID_GRANT, tokens.code_altered),
    Attack("code with something behind it", "RFC 6749 10.5", INVALID_GRANT, tokens.code_with_tail),
    Attack("access token as code", "RFC 8725 2.8", INVALID_GRANT,
           tokens.as_code(lambda s, app: s.tokens(app).access)),
    Attack("refresh token as code", "RFC 8725 2.8", INVALID_GRANT,
           tokens.as_code(lambda s, app: s.tokens(app).refresh)),
    Attack("Google's state as code", "RFC 8725 2.8", INVALID_GRANT,
           tokens.as_code(lambda s, app: login.google_state(s))),
    Attack("consent request as code", "RFC 8725 2.8", INVALID_GRANT,
           tokens.as_code(lambda s, app: login.consent_request(s))),
    Attack("client id as code", "RFC 8725 2.8", INVALID_GRANT, tokens.as_code(lambda s, app: app.client_id)),
    Attack("Google's code as code", "RFC 9700 4.5", INVALID_GRANT,
           tokens.as_code(lambda s, app: query_of(s.browser().callback_url(app.authorize_url()))["code"])),
    Attack("other resource than was granted", "RFC 8707 2.2", NO_SUCH_TARGET, redeems(resource="BASE/sse")),
    Attack("resource of another server", "RFC 8707 2.2", NO_SUCH_TARGET,
           redeems(resource="https://evil.example/mcp")),
    Attack("no client id", "RFC 6749 4.1.3", NO_CLIENT, redeems(client_id=None)),
    Attack("unknown client id", "RFC 6749 5.2", UNKNOWN, redeems(client_id="nobody")),
    Attack("no code", "RFC 6749 5.2", INVALID_REQUEST, redeems(code=None)),
    Attack("no grant type", "RFC 6749 5.2", NO_GRANT_TYPE, redeems(grant_type=None)),
    Attack("grant type password", "RFC 9700 2.4", NO_GRANT_TYPE,
           tokens.asks_for_token(grant_type="password", username=ME, password="x")),
    Attack("grant type client_credentials", "RFC 6749 4.4", NO_GRANT_TYPE,
           tokens.asks_for_token(grant_type="client_credentials")),
    Attack("grant type jwt-bearer", "RFC 7523 2.1", NO_GRANT_TYPE,
           tokens.asks_for_token(grant_type="urn:ietf:params:oauth:grant-type:jwt-bearer", assertion="x.y.z")),
    Attack("grant type token-exchange", "RFC 8693 2.1", NO_GRANT_TYPE,
           tokens.asks_for_token(grant_type="urn:ietf:params:oauth:grant-type:token-exchange", subject_token="x")),
    Attack("honest: parameters by hand", "RFC 6749 4.1.3", works, posts_to_token("CODE")),
    Attack("parameter twice", "RFC 6749 3.2", INVALID_REQUEST, posts_to_token("CODE&code=other")),
    Attack("verifier twice", "RFC 6749 3.2", INVALID_REQUEST, posts_to_token(f"code_verifier={'v' * 43}&CODE")),
    Attack("parameters in the URL", "RFC 6749 3.2", NO_CLIENT, posts_to_token(query="?CODE")),
    Attack("JSON", "RFC 6749 4.1.3", NO_FORM, posts_to_token("CODE", "application/json")),
    Attack("form in plain text", "RFC 6749 4.1.3", NO_FORM, posts_to_token("CODE", "text/plain")),
    Attack("body of more than 64 kB", "contract", status(413), posts_to_token("CODE&x=" + "x" * 66_000)),
    Attack("GET at the token endpoint", "RFC 6749 3.2", status(405), wire.gets("/token")),
]
# fmt: on


@table(CODES)
def test_code(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# fmt: off
REFRESHING = [
    Attack("honest: a refresh", "RFC 6749 6", works, tokens.refreshes()),
    Attack("honest: the answer was lost, once more", "contract", works,
           tokens.refresh_repeated_by_a_client_that_lost_the_answer),
    Attack("honest: many windows at one moment", "contract", works, tokens.refresh_many_times_at_once),
    Attack("token before the last", "RFC 9700 4.14.2", INVALID_GRANT, tokens.refresh_before_last),
    Attack("token whose successor was used", "RFC 9700 4.14.2", INVALID_GRANT,
           tokens.refresh_whose_successor_was_used),
    Attack("token of another client", "RFC 6749 6", INVALID_GRANT, tokens.refresh_of_another_client),
    Attack("altered token", "RFC 6749 10.4", INVALID_GRANT, tokens.refresh_altered),
    Attack("empty token", "RFC 6749 5.2", INVALID_REQUEST, tokens.as_refresh_token(lambda s, app: "")),
    Attack("access token as refresh token", "RFC 8725 2.8", INVALID_GRANT,
           tokens.as_refresh_token(lambda s, app: s.tokens(app).access)),
    Attack("code as refresh token", "RFC 8725 2.8", INVALID_GRANT,
           tokens.as_refresh_token(lambda s, app: query_of(s.answer(app))["code"])),
    Attack("consent request as refresh token", "RFC 8725 2.8", INVALID_GRANT,
           tokens.as_refresh_token(lambda s, app: login.consent_request(s))),
    Attack("no client id", "RFC 6749 6", NO_CLIENT, tokens.refreshes(client_id=None)),
    Attack("more scope than was granted", "RFC 6749 6", works, tokens.refresh_asks_for_more),
    Attack("other resource than was granted", "RFC 8707 2.2", NO_SUCH_TARGET, tokens.refreshes(resource="BASE/sse")),
    Attack("resource of another server", "RFC 8707 2.2", NO_SUCH_TARGET,
           tokens.refreshes(resource="https://evil.example/")),
]
# fmt: on


@table(REFRESHING)
def test_refresh(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# Access tokens

NOTHING = status(400, 401, 403, 404, 405)

# fmt: off
ACCESS = [
    Attack("honest: a token", "RFC 6750 2.1", works, knocks_with(true)),
    Attack("honest: a token for /sse", "RFC 6750 2.1", works, knocks_with(true, "/sse", "BASE/sse")),
    Attack("honest: a token for both", "contract", works, tokens.token_for_both),
    Attack("honest: a token for the origin with a slash", "contract", works, tokens.token_for_the_origin_with_slash),
    Attack("honest: a token signed anew", "RFC 7519 7.2", works, knocks_with(with_claims())),
    Attack("honest: bearer in small letters", "RFC 9110 11.1", works,
           tokens.header_of(lambda t: {"Authorization": f"bearer {t}"})),
    Attack("honest: its claims", "RFC 9068 2.2", works, tokens.claims_are_those_of_the_contract),
    Attack("no token", "RFC 6750 3", unauthorized, lambda s: s.app().call(None)),
    Attack("no token at /sse", "RFC 6750 3", unauthorized, lambda s: s.app().call(None, "/sse")),
    Attack("empty token", "RFC 6750 3", unauthorized, lambda s: s.app().call(None, Authorization="Bearer")),
    Attack("token as Basic", "RFC 6750 2.1", unauthorized,
           tokens.header_of(lambda t: {"Authorization": f"Basic {t}"})),
    Attack("token in another header", "RFC 6750 2.1", unauthorized,
           tokens.header_of(lambda t: {"X-Access-Token": t})),
    Attack("token in a cookie", "RFC 6750 2", unauthorized,
           tokens.header_of(lambda t: {"Cookie": f"access_token={t}; ssh-mcp={t}"})),
    Attack("token in the URL", "RFC 9700 4.3.2", unauthorized, tokens.token_in_the_url),
    Attack("token in a form", "RFC 6750 2.2", unauthorized, tokens.token_in_the_form),
    Attack("two tokens in one header", "RFC 6750 2.1", unauthorized,
           tokens.header_of(lambda t: {"Authorization": f"Bearer {t}, Bearer {t}"})),
    Attack("token of 100,000 characters", "RFC 6750 3.1", status(400, 401, 431),
           lambda s: s.app().call("x" * 100_000)),
    Attack("token for /mcp at /sse", "RFC 8707 2", unauthorized, knocks_with(true, "/sse", "BASE/mcp")),
    Attack("token for /sse at /mcp", "RFC 8707 2", unauthorized, knocks_with(true, "/mcp", "BASE/sse")),
    Attack("token for /mcp at /sse/", "RFC 8707 2", status(401, 404, 307, 308),
           knocks_with(true, "/sse/", "BASE/mcp")),
    Attack("token for another server", "RFC 9068 4", unauthorized,
           knocks_with(with_claims(aud="https://evil.example/mcp"))),
    Attack("token for the bare host's namesake", "RFC 9068 4", unauthorized,
           knocks_with(with_claims(aud="http://127.0.0.1/mcp"))),
    Attack("no audience", "RFC 9068 4", unauthorized, knocks_with(with_claims(aud=None))),
    Attack("audience that is no text", "RFC 7519 4.1.3", unauthorized, knocks_with(with_claims(aud={"a": 1}))),
    Attack("other issuer", "RFC 9068 4", unauthorized, knocks_with(with_claims(iss="https://evil.example"))),
    Attack("no issuer", "RFC 9068 4", unauthorized, knocks_with(with_claims(iss=None))),
    Attack("expired", "RFC 9068 4", unauthorized, knocks_with(with_claims(exp=NOW - 10))),
    Attack("no expiry", "RFC 9068 2.2", unauthorized, knocks_with(with_claims(exp=None))),
    Attack("expiry that is a text", "RFC 7519 4.1.4", unauthorized, knocks_with(with_claims(exp="never"))),
    Attack("expiry beyond all numbers", "RFC 7519 4.1.4", unauthorized, knocks_with(with_claims(exp=1e400))),
    Attack("no token id", "RFC 9068 2.2", unauthorized, knocks_with(with_claims(jti=None))),
    Attack("no address", "contract", unauthorized, knocks_with(with_claims(email=None))),
    Attack("address not on the list", "contract", unauthorized, knocks_with(with_claims(email=STRANGER))),
    Attack("address that is a list", "RFC 7519 7.2", unauthorized, knocks_with(with_claims(email=[ME]))),
    Attack("honest: a header made by hand", "RFC 7519 7.2", works, knocks_with(with_header())),
    Attack("algorithm none", "RFC 8725 3.1", unauthorized, knocks_with(unsigned("none"))),
    Attack("algorithm nOnE", "RFC 8725 3.1", unauthorized, knocks_with(unsigned("nOnE"))),
    Attack("no algorithm", "RFC 7515 4.1.1", unauthorized, knocks_with(unsigned(""))),
    Attack("HS512 with the true key", "RFC 8725 3.1", unauthorized, knocks_with(with_header(algorithm="HS512"))),
    Attack("another key", "RFC 8725 3.3", unauthorized, knocks_with(with_header(key="k" * 64))),
    Attack("empty key", "RFC 8725 3.5", unauthorized, knocks_with(tokens.key_file_in_header)),
    Attack("session key in the place of the token key", "RFC 8725 2.8", unauthorized,
           knocks_with(tokens.with_key_of("SESSION_SECRET"))),
    Attack("code key in the place of the token key", "RFC 8725 2.8", unauthorized,
           knocks_with(tokens.with_key_of("OAUTH_CODE_SECRET"))),
    Attack("critical header that nobody knows", "RFC 7515 4.1.11", unauthorized,
           knocks_with(with_header(crit=["x"], x=1))),
    Attack("type of another kind of token", "RFC 9068 4", unauthorized, knocks_with(with_header(typ="logout+jwt"))),
    Attack("no signature", "RFC 7519 7.2", unauthorized, knocks_with(lambda s, t: t.access.rpartition(".")[0] + ".")),
    Attack("two parts of three", "RFC 7519 7.2", unauthorized, knocks_with(lambda s, t: t.access.rpartition(".")[0])),
    Attack("altered body", "RFC 7519 7.2", unauthorized, knocks_with(tokens.body_altered)),
    Attack("signature of another token", "RFC 7519 7.2", unauthorized,
           knocks_with(tokens.signature_of_another_token)),
    Attack("altered signature", "RFC 7519 7.2", unauthorized,
           knocks_with(lambda s, t: t.access[:-20] + altered(t.access[-20:]))),
    Attack("refresh token as access token", "RFC 8725 2.8", unauthorized, knocks_with(lambda s, t: t.refresh)),
    Attack("code as access token", "RFC 8725 2.8", unauthorized, knocks_with(tokens.code_unspent)),
    Attack("consent request as access token", "RFC 8725 2.8", unauthorized, knocks_with(tokens.consent_request_of)),
    Attack("Google's ID token as access token", "RFC 9068 4", unauthorized, knocks_with(tokens.google_id_token)),
    Attack("client id as access token", "RFC 8725 2.8", unauthorized,
           knocks_with(lambda s, t: str(t.claims["client_id"]))),
    Attack("other spellings of the path", "RFC 3986 6.2", unauthorized, wire.spelled_otherwise),
    Attack("WebSocket at /mcp", "RFC 6455 4.2", status(400, 401, 403, 404, 405),
           wire.upgraded_to_a_websocket("/mcp")),
    Attack("WebSocket at /sse", "RFC 6455 4.2", status(400, 401, 403, 404, 405),
           wire.upgraded_to_a_websocket("/sse")),
    Attack("call in another person's session", "MCP security: session hijacking", NOTHING,
           tokens.session_of_another_person("POST")),
    Attack("stream of another person's session", "MCP security: session hijacking", NOTHING,
           tokens.session_of_another_person("GET")),
    Attack("end of another person's session", "MCP security: session hijacking", NOTHING,
           tokens.session_of_another_person("DELETE")),
    Attack("message without a token", "MCP authorization", unauthorized,
           wire.sends("POST", "/messages/?session_id=" + "0" * 32)),
    Attack("token for /mcp at /messages/", "RFC 8707 2", unauthorized, tokens.message_with_token_for_mcp),
    Attack("SSH health without a token", "contract", status(401), wire.gets("/health?ssh=1")),
    Attack("SSH health with a forged token", "contract", status(401),
           wire.gets("/health?ssh=1", Authorization="Bearer x.y.z")),
]
# fmt: on


@table(ACCESS)
def test_access_token(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# fmt: off
REVOCATION = [
    Attack("honest: an access token is revoked", "RFC 7009 2.1", unauthorized, tokens.revokes_access),
    Attack("honest: a refresh token and its access tokens", "RFC 7009 2.1", unauthorized, tokens.revokes_refresh()),
    Attack("honest: with the wrong hint", "RFC 7009 2.1", unauthorized,
           tokens.revokes_refresh(token_type_hint="access_token")),
    Attack("honest: with an unknown hint", "RFC 7009 2.2.1", unauthorized,
           tokens.revokes_refresh(token_type_hint="x")),
    Attack("token of another client", "RFC 7009 2.1", works, tokens.revokes_for_another_client),
    Attack("token that nobody gave", "RFC 7009 2.2", status(200), tokens.revokes("made-up")),
    Attack("token that is a JWT of somebody else", "RFC 7009 2.2", status(200),
           tokens.revokes("eyJhbGciOiJub25lIn0.e30.")),
    Attack("no client", "RFC 7009 2.1", NO_CLIENT, tokens.revokes_without_client),
    Attack("by GET", "RFC 7009 2.1", status(405), wire.gets("/revoke?token=x")),
    Attack("body of more than 64 kB", "contract", status(413), lambda s: s.app().revoke("x" * 66_000)),
]
# fmt: on


@table(REVOCATION)
def test_revocation(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# Headers, hosts, and the wire

AS_METADATA = "/.well-known/oauth-authorization-server"
MCP_METADATA = "/.well-known/oauth-protected-resource/mcp"
EVIL = "evil.example"
NOT_OURS = status(400, 403, 421)
SMUGGLED = "POST /token HTTP/1.1\nHost: HOST\nContent-Length: 4\nTransfer-Encoding: chunked\n\n0\n\nGET /x HTTP/1.1\n\n"

# fmt: off
WIRE = [
    Attack("honest: the metadata", "RFC 8414 2", works, wire.metadata_promises),
    Attack("honest: no page can be framed", "RFC 9700 4.16", works, wire.pages_cannot_be_framed),
    Attack("foreign Host for the metadata", "RFC 8414 6.2", either(works, NOT_OURS),
           wire.metadata_asked(AS_METADATA, Host=EVIL)),
    Attack("forwarded host for the metadata", "RFC 7239 8.1", works,
           wire.metadata_asked(AS_METADATA, **{"X-Forwarded-Host": EVIL})),
    Attack("forwarded scheme for the metadata", "RFC 7239 8.1", works,
           wire.metadata_asked(AS_METADATA, **{"X-Forwarded-Proto": "https"})),
    Attack("forwarded prefix for the metadata", "RFC 7239 8.1", works,
           wire.metadata_asked(AS_METADATA, **{"X-Forwarded-Prefix": "/evil.example"})),
    Attack("foreign Host for the resource's metadata", "RFC 9728 3.3", either(works, NOT_OURS),
           wire.metadata_asked(MCP_METADATA, Host=EVIL)),
    Attack("path in the Host for the resource's metadata", "RFC 9728 3.3", either(works, NOT_OURS),
           wire.metadata_asked(MCP_METADATA, Host="127.0.0.1/evil.example?")),
    Attack("user name in the Host for the resource's metadata", "RFC 9728 3.3", either(works, NOT_OURS),
           wire.metadata_asked(MCP_METADATA, Host="127.0.0.1@evil.example")),
    Attack("metadata of a resource that is not ours", "RFC 9728 3", status(404),
           wire.gets("/.well-known/oauth-protected-resource/evil")),
    Attack("foreign Host for the challenge", "RFC 9728 5.1", either(unauthorized, NOT_OURS),
           wire.challenge_asked(Host=EVIL)),
    Attack("forwarded host for the challenge", "RFC 9728 5.1", unauthorized,
           wire.challenge_asked(**{"X-Forwarded-Host": EVIL})),
    Attack("foreign Host at /mcp", "MCP transports: DNS rebinding", NOT_OURS, wire.mcp_with(Host=EVIL)),
    Attack("Host that begins alike at /mcp", "MCP transports: DNS rebinding", NOT_OURS,
           wire.mcp_with(Host=f"127.0.0.1.{EVIL}")),
    Attack("foreign Origin at /mcp", "MCP transports: DNS rebinding", NOT_OURS,
           wire.mcp_with(Origin=f"https://{EVIL}")),
    Attack("foreign Origin at another spelling of /mcp", "MCP transports: DNS rebinding", status(404),
           wire.mcp_spelled("/mcp%0a", Origin=f"https://{EVIL}")),
    Attack("Origin null at /mcp", "MCP transports: DNS rebinding", NOT_OURS, wire.mcp_with(Origin="null")),
    Attack("foreign Host at /sse", "MCP transports: DNS rebinding", NOT_OURS, wire.sse_with(Host=EVIL)),
    Attack("foreign Origin at /sse", "MCP transports: DNS rebinding", NOT_OURS,
           wire.sse_with(Origin=f"https://{EVIL}")),
    Attack("two slashes before a host", "RFC 9700 4.11", status(307, 308, 400, 404),
           wire.leads_nowhere("//evil.example/..")),
    Attack("slash and backslash before a host", "RFC 9700 4.11", status(307, 308, 400, 404),
           wire.leads_nowhere("/\\evil.example/")),
    Attack("host behind our path", "RFC 9700 4.11", status(307, 308, 400, 404, 405),
           wire.leads_nowhere("/mcp//evil.example/")),
    Attack("absolute URL of another host", "RFC 9112 3.2.2", status(307, 308, 400, 403, 404, 421),
           wire.leads_nowhere("http://evil.example/sse/")),
    Attack("encoded line break in the path", "RFC 9110 5.5", status(400, 404),
           wire.leads_nowhere("/x%0d%0aLocation:%20https://evil.example")),
    Attack("page of another site reads /consent", "Fetch 3.3.5", status(400, 403, 405),
           wire.cross_origin("/consent")),
    Attack("page of another site reads /authorize", "Fetch 3.3.5", status(400, 403),
           wire.cross_origin("/authorize", "GET")),
    Attack("page of another site reads the callback", "Fetch 3.3.5", status(400, 403),
           wire.cross_origin("/google/callback", "GET")),
    Attack("page of another site uses /token", "Fetch 3.3.5", status(400, 401), wire.cross_origin("/token")),
    Attack("length given in two ways", "RFC 9112 6.1", status(400), wire.sends_raw(SMUGGLED)),
    Attack("two lengths", "RFC 9112 6.3", status(400),
           wire.sends_raw("POST /token HTTP/1.1\nHost: HOST\nContent-Length: 4\nContent-Length: 5\n\nabcde")),
    Attack("no Host", "RFC 9112 3.2", status(400), wire.sends_raw("GET / HTTP/1.1\n\n")),
    Attack("two Hosts", "RFC 9112 3.2", status(400),
           wire.sends_raw("GET / HTTP/1.1\nHost: HOST\nHost: evil.example\n\n")),
    Attack("TRACE", "RFC 9110 9.3.8", status(405, 404), wire.sends("TRACE", "/")),
    Attack("PUT at /register", "RFC 9110 15.5.6", status(405), wire.sends("PUT", "/register")),
    Attack("DELETE at /consent", "RFC 9110 15.5.6", status(405), wire.sends("DELETE", "/consent")),
    Attack("two hundred half requests", "CWE-400", works, wire.half_requests_hold_nobody),
    Attack("nonsense in every parameter", "RFC 6749 10.14", works, wire.nonsense_everywhere),
    Attack("secrets in the log", "RFC 9700 4.2, RFC 6819 4.3.3", works, wire.nothing_secret_is_logged),
    Attack("forged lines in the log", "CWE-117", works, wire.log_lines_cannot_be_forged),
]
# fmt: on


@table(WIRE)
def test_wire(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# fmt: off
LIMITS = [
    Attack("honest: sixty failures", "contract", INVALID_GRANT, wire.fails_often(60)),
    Attack("honest: seventy successes", "contract", works, wire.successes_do_not_count),
    Attack("sixty-one failures at /token", "RFC 6749 10.10", too_many, wire.fails_often(61)),
    Attack("sixty-one failures at /register", "RFC 6749 10.10", too_many, wire.fails_often(61, "/register")),
    Attack("sixty-one failures at /authorize", "RFC 6749 10.10", too_many, wire.fails_often(61, "/authorize")),
    Attack("sixty-one failures at /consent", "RFC 6749 10.10", too_many, wire.fails_often(61, "/consent")),
    Attack("sixty-one failures at the callback", "RFC 6749 10.10", too_many,
           wire.fails_often(61, "/google/callback")),
    Attack("failures at another spelling of /token", "RFC 6749 10.10", status(404), wire.fails_where_nobody_counts),
    Attack("new forwarded address for each try", "RFC 7239 8.1", too_many, wire.fails_with_forged_forwarding),
    Attack("new client id for each try", "RFC 6749 10.10", too_many, wire.fails_with_many_client_ids),
    Attack("address written left of the proxy's", "RFC 7239 8.1", too_many, wire.proxies_clients_cannot_prepend),
    Attack("one client of a proxy stops the others", "RFC 7239 8.1", too_many, wire.proxies_are_believed),
    Attack("one failing client stops the others", "contract", works, wire.fails_beside_others),
]
# fmt: on


@table(LIMITS)
def test_limit(attack: Attack, stage: Stage) -> None:
    play(attack, stage)


# The clock

# fmt: off
CLOCK = [
    Attack("honest: code after 50 s", "RFC 6749 4.1.2", works, servers.code_redeemed_after(50)),
    Attack("honest: access token after 59 minutes", "contract", works, servers.access_token_used_after(59 * MINUTE)),
    Attack("honest: refresh after 29 days", "contract", works, servers.refreshed_after(29 * DAY)),
    Attack("honest: refresh repeated after 20 s", "contract", works, servers.refresh_repeated_after(20)),
    Attack("honest: consent after 9 minutes", "contract", login.agreed, servers.consent_sent_after(9 * MINUTE)),
    Attack("code after 62 s", "RFC 6749 4.1.2", INVALID_GRANT, servers.code_redeemed_after(62)),
    Attack("code replayed just before its end", "RFC 6749 4.1.2", unauthorized, servers.replayed_at_the_last_moment),
    Attack("access token after an hour", "RFC 9068 4", unauthorized, servers.access_token_used_after(HOUR + 2)),
    Attack("refresh after 31 days", "RFC 9700 4.14.2", INVALID_GRANT, servers.refreshed_after(31 * DAY)),
    Attack("refresh kept alive beyond 30 days", "RFC 9700 4.14.2", INVALID_GRANT, servers.kept_alive_beyond_the_end),
    Attack("refresh repeated after 32 s", "RFC 9700 4.14.2", INVALID_GRANT, servers.refresh_repeated_after(32)),
    Attack("consent after 11 minutes", "RFC 9700 4.7", FORBIDDEN, servers.consent_sent_after(11 * MINUTE)),
    Attack("Google's answer after 11 minutes", "RFC 9700 4.7", FORBIDDEN, servers.google_answers_after(11 * MINUTE)),
    Attack("revoked token near its end", "RFC 7009 2.1", unauthorized, servers.revoked_and_used_after(59 * MINUTE)),
]
# fmt: on


@pytest.fixture(scope="module")
def clocked(google: Google, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    remote = make_remote(tmp_path_factory.mktemp("clocked"), google, own_clock=True)
    remote.start()
    yield remote
    remote.stop()


@table(CLOCK)
def test_clock(attack: Attack, clocked: Remote, google: Google) -> None:
    clocked.move_clock(0)
    stage = Stage(clocked, google)
    try:
        play(attack, stage)
    finally:
        stage.close()


# Servers of their own


def test_shorter_whitelist_ends_what_was_given(own_remote: Callable[..., Remote], stage: Stage) -> None:
    servers.whitelist_shrinks(own_remote(), stage)


def test_old_key_verifies_until_it_is_taken_away(own_remote: Callable[..., Remote], stage: Stage) -> None:
    servers.keys_change(own_remote(), stage)


def test_killed_server_forgets_no_use_and_no_revocation(
    own_remote: Callable[..., Remote], stage: Stage
) -> None:
    servers.restart_forgets_nothing(own_remote(), stage)


def test_cookie_belongs_to_the_host_behind_https(own_remote: Callable[..., Remote], stage: Stage) -> None:
    servers.cookie_behind_https(own_remote(PUBLIC_BASE_URL="https://mcp.example.com"), stage)


def test_store_that_is_down_lets_nobody_in(
    own_remote: Callable[..., Remote], stage: Stage, tmp_path: Path
) -> None:
    with redis_server(tmp_path / "redis", durable=True) as redis:
        servers.store_goes_and_comes_back(own_remote(STATE_URL=redis.url), redis, stage)


# The source

SECRET_NAMES = re.compile(
    r"secret|signature|csrf|digest|verifier|challenge|hmac|\bmac\b|cookie|nonce|password", re.I
)


def test_secrets_are_compared_in_constant_time() -> None:
    """RFC 9700 says nothing of it, CWE-208 does: `==` tells by its duration how far a guess was right."""
    compared, constant = [], 0
    for path in [*ROOT.glob("oauth_*.py"), *ROOT.glob("http_*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            constant += isinstance(node, ast.Attribute | ast.Name) and "compare_digest" in ast.unparse(node)
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                literal = any(isinstance(side, ast.Constant) for side in (node.left, *node.comparators))
                if not literal and any(SECRET_NAMES.search(side) for side in sides):
                    compared.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert compared == []
    assert constant
