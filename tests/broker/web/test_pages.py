"""The built-in pages as text: valid, accessible, without anything that the browser would have to run, and escaped."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.credentials import Revoked
from broker.errors import FLOW_CODES
from broker.web.pages import ADVICE, NOTICES, Pages, ShownConnection, ShownIntegration, State

PAGES = Pages()
HOSTILE = "\"><script>alert(1)</script><img src=x onerror='x'>{{ 7*7 }}&lt;"
VOID = {"meta", "link", "input", "br"}
BLOCKS = {"main", "h1", "h2", "ul", "li", "section", "form", "dl", "pre", "div", "p"}


class Read(HTMLParser):
    """Reads a page strictly: tags must nest, attributes must not repeat, a paragraph holds no blocks."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is repeated"
        assert not ("p" in self.open and tag in BLOCKS), f"{tag} inside a paragraph"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def every(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of each element of this kind."""
        return [attributes for name, attributes in self.tags if name == tag]


def error(text: str = "The text.", code: str = "state_invalid", status: int = 400, request_id: str = "req_1") -> str:
    return PAGES.error_page(status=status, code=code, text=text, request_id=request_id)


def done(text: str = "con_1", code: str | None = None, *missing: str) -> str:
    return PAGES.done_page(connection_id=text, confirm_code=code, missing_scopes=missing)


def connect(*shown: ShownIntegration, application: str = "app.test", notice: str | None = None) -> str:
    return PAGES.connect_page(
        session_id="ses_1",
        return_to="https://app.test/done?a=1&b=2",
        application=application,
        shown=shown,
        notice=notice,
    )


def disconnect(text: str) -> str:
    connection = ShownConnection("con_1", text, "connected")
    return PAGES.disconnect_page(
        session_id="ses_1", application=text, title=text, connection=connection, form_token="f00"
    )


def one_of_each(text: str) -> ShownIntegration:
    shown = tuple(ShownConnection(f"con_{state}", text, state, partial=True) for state in get_args(State))
    return ShownIntegration(text, "/oauth/x/start?session=ses_1", shown)


EVERY_PAGE: dict[str, Callable[[str], str]] = {
    "error": error,
    "error code": lambda text: error(code=text),
    "error request": lambda text: error(request_id=text),
    "done": done,
    "confirm": lambda text: done("con_1", text, text),
    "connect": lambda text: connect(
        one_of_each(text), ShownIntegration(text, None), ShownIntegration(text, "/x"), application=text, notice=text
    ),
    "nothing to connect": lambda text: connect(application=text),
    "disconnect": disconnect,
}
every_page = pytest.mark.parametrize("page", EVERY_PAGE.values(), ids=EVERY_PAGE.keys())


def check_inert(page: Read) -> None:
    """Nothing to run, no style or picture of its own, nothing fetched from elsewhere."""
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "style", "img", "iframe", "object", "base"})
    for _, attributes in page.tags:
        assert not any(name == "style" or name.startswith("on") for name in attributes)
    fetched = [link["href"] for link in page.every("link")]
    assert fetched == ["data:,", f"/assets/{PAGES.stylesheet_name}"]


@every_page
def test_a_page_is_valid_and_accessible(page: Callable[[str], str]) -> None:
    text = page("octocat")
    assert text.startswith("<!doctype html>")
    read = Read(text)
    assert read.every("html") == [{"lang": "en"}]
    assert len(read.every("main")) == len(read.every("h1")) == len(read.every("title")) == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in read.every("meta")
    assert all(svg["aria-hidden"] == "true" for svg in read.every("svg"))
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)


@every_page
def test_a_hostile_text_stays_text(page: Callable[[str], str]) -> None:
    read = Read(page(HOSTILE))
    check_inert(read)
    assert len(read.tags) == len(Read(page("x")).tags)


@given(text=st.text(max_size=40))
def test_no_text_adds_an_element(text: str) -> None:
    pages = (error, disconnect, lambda text: connect(one_of_each(text), application=text))
    assert all(len(Read(page(text)).tags) == len(Read(page("x")).tags) for page in pages)


def test_an_account_name_is_shown_as_it_is_and_cannot_turn_the_line_around() -> None:
    text = connect(one_of_each(HOSTILE))
    assert HOSTILE in Read(text).text
    assert len(Read(text).every("bdi")) == 3


@pytest.mark.parametrize("code", FLOW_CODES)
def test_every_flow_code_has_a_heading_and_says_what_to_do(code: str) -> None:
    advice = ADVICE[code]
    text = Read(error(text=FLOW_CODES[code], code=code)).text
    assert advice.heading in text
    assert advice.next_step in text
    assert re.search(r"[Pp]lease|again|Check|Wait|go back", FLOW_CODES[code] + advice.next_step)


def test_advice_is_given_for_codes_that_exist() -> None:
    assert ADVICE.keys() - {"not_found"} == FLOW_CODES.keys()


def test_other_errors_say_whose_fault_it_is() -> None:
    assert "our side" in error(code="database_unavailable", status=503)
    assert "cannot be answered" in error(code="invalid_request")


def test_an_error_shows_code_and_request_for_a_report() -> None:
    text = Read(error(code="session_bound", request_id="req_123")).text
    assert "session_bound" in text
    assert "req_123" in text
    assert "Request" not in Read(error(request_id="")).text


def test_a_pending_connection_shows_the_command_that_confirms_it() -> None:
    text = Read(done("con_1", "c0de")).text
    assert "broker connections confirm con_1 \\\n  --code c0de \\\n  --subject subject" in text
    assert "within 2 minutes" in text
    assert "close this window" in text


def test_a_finished_connection_says_that_the_window_may_be_closed() -> None:
    text = Read(done("con_1")).text
    assert "You may close this window" in text
    assert "confirm" not in text
    assert "permissions" not in text


def test_missing_scopes_are_listed() -> None:
    text = Read(done("con_1", None, "repo", "user:email")).text
    assert "Some permissions were not granted" in text
    assert "repo" in text
    assert "user:email" in text


def links(text: str) -> dict[str, str | None]:
    """Return what the page's links say, for a screen reader too, and where they go."""
    found = re.findall(r'<a [^>]*href="([^"]*)"[^>]*>(.*?)</a>', text)
    return {re.sub(r"<[^>]*>", "", label): href.replace("&amp;", "&") for href, label in found}


def test_a_state_brings_the_actions_that_help() -> None:
    start = "/oauth/x/start?session=ses_1"
    ask = "/connect/disconnect?session=ses_1&connection=con_1"
    back = {"Back to app.test": "https://app.test/done?a=1&b=2"}

    def shown(state: State, url: str | None = start) -> dict[str, str | None]:
        connection = ShownConnection("con_1", "ada", state)
        return links(connect(ShownIntegration("X", url, (connection,))))

    both = {"Reconnect X as ada": start, "Disconnect X as ada": ask, **back}
    assert shown("connected") == both
    assert shown("needs_reconnecting") == both
    assert shown("paused") == {"Disconnect X as ada": ask, **back}
    assert shown("connected", None) == {"Disconnect X as ada": ask, **back}
    assert links(connect(ShownIntegration("X", start))) == {"Connect X": start, **back}
    assert links(connect(ShownIntegration("X", None))) == back


def test_connecting_is_a_link_because_a_form_could_not_be_redirected_to_a_provider() -> None:
    assert Read(connect(one_of_each("x"), ShownIntegration("x", "/x"))).every("form") == []
    assert "form-action 'self'" in PAGES.security_headers()["Content-Security-Policy"]


def test_the_disconnect_form_carries_its_proof() -> None:
    read = Read(disconnect("ada"))
    assert [form["method"] for form in read.every("form")] == ["post"]
    fields = {field["name"]: field["value"] for field in read.every("input")}
    assert fields == {"session": "ses_1", "connection": "con_1", "form_token": "f00"}


def test_every_outcome_of_a_disconnect_has_a_notice_and_nothing_else_does() -> None:
    assert NOTICES.keys() == set(get_args(Revoked))
    for code, text in NOTICES.items():
        assert text in connect(notice=code)
    assert "unheard" not in connect(notice="unheard")
    assert 'role="status"' not in connect(notice="unheard")


def test_the_headers_allow_nothing_but_our_style_sheet() -> None:
    headers = PAGES.security_headers()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "form-action": "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"


def test_the_style_sheet_names_its_content_and_fetches_nothing() -> None:
    assert re.fullmatch(r"broker-[0-9a-f]{16}\.css", PAGES.stylesheet_name)
    assert re.search(rb"url\(|@import", PAGES.stylesheet) is None


def luminance(colour: str) -> float:
    """Return the relative luminance of a #rrggbb colour (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast_in_both_schemes(scheme: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", PAGES.stylesheet.decode(), re.DOTALL)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", blocks[["light", "dark"].index(scheme)]))

    def contrast(one: str, other: str) -> float:
        low, high = sorted([luminance(colours[one]), luminance(colours[other])])
        return (high + 0.05) / (low + 0.05)

    for text in ("text", "muted", "accent", "accent-strong", "warning", "good"):
        assert min(contrast(text, "card"), contrast(text, "tint")) >= 4.5, text
    for button in ("accent", "accent-strong", "danger", "danger-strong"):
        assert contrast("on-accent", button) >= 4.5, button
    assert contrast("edge", "card") >= 3
