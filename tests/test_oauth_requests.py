"""Parameters read strictly, bodies in bounds, and errors in the words of their readers."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import oauth_requests
from oauth_requests import MOST_BODY_BYTES, OAuthError, PageError, Parameters, for_people, for_programs
from oauth_state import StateDown

FORM = "application/x-www-form-urlencoded"
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.dictionaries(texts.filter(lambda name: name not in ("", "resource")), texts, max_size=20))
def test_parameters_are_read_as_they_were_sent(sent: dict[str, str]) -> None:
    read = Parameters(urlencode(sent))
    for name, value in sent.items():
        assert read.get(name) == (value or None)


@given(st.lists(texts, max_size=10))
def test_resource_may_stand_several_times(resources: list[str]) -> None:
    read = Parameters(urlencode([("resource", resource) for resource in resources]))
    assert read.resources == [resource for resource in resources if resource]


@pytest.mark.parametrize(
    "encoded",
    [
        "a=1&a=1",
        "a=1&a=",
        "a=&a=1",
        "a=%00",
        "%00=a",
        "resource=%00",
        "a=%ff",
        "%ff=a",
        "a=%ed%a0%80",
        "&".join(f"p{number}=x" for number in range(51)),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(encoded: str) -> None:
    with pytest.raises(OAuthError) as refused:
        Parameters(encoded)
    assert refused.value.code == "invalid_request"


def test_fifty_parameters_are_read() -> None:
    assert Parameters("&".join(f"p{number}=x" for number in range(50))).get("p49") == "x"


@pytest.mark.parametrize("encoded", ["", "a", "a=", "b=1"])
def test_an_empty_parameter_is_missing(encoded: str) -> None:
    assert Parameters(encoded).get("a") is None
    with pytest.raises(OAuthError, match="a is missing"):
        Parameters(encoded).need("a")


@pytest.mark.parametrize("semicolon", ["a=1;b=2", "a=1%3bb=2"])
def test_a_semicolon_separates_nothing(semicolon: str) -> None:
    assert Parameters(semicolon).get("a") == "1;b=2"
    assert Parameters(semicolon).get("b") is None


# Bodies


def arriving(*chunks: bytes, **headers: str) -> Request:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks
    ]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/token", "headers": named}, receive)


def test_a_body_of_the_limit_is_read_whole() -> None:
    request = arriving(b"x" * (MOST_BODY_BYTES - 1), b"x", content_length=str(MOST_BODY_BYTES))
    assert len(asyncio.run(oauth_requests.body(request))) == MOST_BODY_BYTES


@pytest.mark.parametrize(
    "request_",
    [
        lambda: arriving(b"x" * MOST_BODY_BYTES, b"x"),
        lambda: arriving(b"", content_length=str(MOST_BODY_BYTES + 1)),
        lambda: arriving(b"", content_length="9" * 6),
    ],
)
def test_a_longer_body_is_refused(request_: Callable[[], Request]) -> None:
    with pytest.raises(OAuthError) as refused:
        asyncio.run(oauth_requests.body(request_()))
    assert refused.value.status == 413


def test_a_client_that_goes_away_sent_a_bad_request() -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    request = Request({"type": "http", "method": "POST", "path": "/token", "headers": []}, gone)
    with pytest.raises(OAuthError, match="ended early"):
        asyncio.run(oauth_requests.body(request))


@pytest.mark.parametrize("kind", [FORM, FORM.upper(), f"{FORM}; charset=UTF-8", f" {FORM} "])
def test_a_form_is_a_form_however_its_type_is_written(kind: str) -> None:
    assert asyncio.run(oauth_requests.form(arriving(b"a=%C3%A4", content_type=kind))).get("a") == "ä"


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data; boundary=x", "text/plain"])
def test_a_body_of_another_type_is_no_form(kind: str) -> None:
    with pytest.raises(OAuthError, match="must be"):
        asyncio.run(oauth_requests.form(arriving(b"a=1", content_type=kind)))


def test_a_form_with_raw_bytes_is_refused() -> None:
    with pytest.raises(OAuthError, match="percent-encoded"):
        asyncio.run(oauth_requests.form(arriving("a=ä".encode(), content_type=FORM)))


# Errors


def raising(error: Exception) -> Callable[[Any, Request], Awaitable[Response]]:
    async def endpoint(provider: Any, request: Request) -> Response:
        raise error

    return endpoint


def told(answering: Any, **headers: str) -> Response:
    response: Response = asyncio.run(answering(None, arriving(**headers)))
    assert response.headers["Cache-Control"] == "no-store"
    return response


def test_programs_are_told_in_json() -> None:
    answer = told(for_programs(raising(OAuthError("invalid_grant", "it is over"))))
    assert (answer.status_code, json.loads(bytes(answer.body))) == (
        400,
        {"error": "invalid_grant", "error_description": "it is over"},
    )


def test_programs_that_tried_a_password_are_told_the_scheme() -> None:
    answering = for_programs(raising(OAuthError("invalid_client", "no", 401)))
    assert told(answering, authorization="Basic eDp5").headers["WWW-Authenticate"].startswith("Basic ")
    assert "WWW-Authenticate" not in told(answering).headers


@pytest.mark.parametrize("around", [for_programs, for_people])
def test_while_the_store_is_down_everybody_is_told_when_to_come_back(around: Any) -> None:
    answer = told(around(raising(StateDown("down"))))
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0


def test_people_are_told_on_a_page_what_to_do() -> None:
    answer = told(for_people(raising(PageError("Expired", "It is <b>old</b>.", "Connect again.", 403))))
    assert answer.status_code == 403
    for text in ("Expired", "It is &lt;b&gt;old&lt;/b&gt;.", "Connect again."):
        assert text in bytes(answer.body).decode()


def test_people_see_a_page_when_the_application_is_at_fault() -> None:
    answer = told(for_people(raising(OAuthError("invalid_request", "state is missing"))))
    assert answer.status_code == 400
    assert "state is missing" in bytes(answer.body).decode()


def test_what_succeeds_passes() -> None:
    async def endpoint(provider: Any, request: Request) -> Response:
        return JSONResponse({}, headers={"Cache-Control": "no-store"})

    for around in (for_programs, for_people):
        assert told(around(endpoint)).status_code == 200
