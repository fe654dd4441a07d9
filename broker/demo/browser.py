"""A browser without a screen: keeps cookies, shows where it was sent, and presses a button on the sandbox's consent page.

`python -m broker.demo.browser URL` opens a link the way a person would, consents, and prints where that ended.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import httpx2

MOST_HOPS = 10
REDIRECTS = frozenset({301, 302, 303, 307, 308})


class NoConsentPage(Exception):
    """The page is not the sandbox's question for consent."""


class Browser:
    """One person's browser. It follows no redirect by itself, so that each hop can be looked at."""

    def __init__(self) -> None:
        """Begin with an empty cookie jar; proxies of the environment are not used."""
        self._http = httpx2.AsyncClient(trust_env=False, timeout=30)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def open(self, url: str) -> httpx2.Response:
        """Open a page as a click does."""
        return await self._http.get(url, headers={"Accept": "text/html"})

    async def follow(self, url: str) -> httpx2.Response:
        """Open a page and follow redirects as long as they stay with its server; return the answer that ends this."""
        for _ in range(MOST_HOPS):
            answer = await self.open(url)
            target = redirect_of(answer)
            if target is None or urlsplit(target).netloc != urlsplit(url).netloc:
                return answer
            url = target
        raise httpx2.TooManyRedirects("too many redirects")

    async def allow(self, authorize_url: str, user: str) -> str:
        """Allow everything that the consent page asks for, as ``user``; return where the provider sends the browser.

        Raises ``NoConsentPage`` when there is nothing to consent to.
        """
        form = consent_form((await self.open(authorize_url)).text)
        fields = {"user": user, "decision": "allow", "granted": list(form.scopes)}
        target = redirect_of(await self._http.post(urljoin(authorize_url, form.action), data=fields))
        if target is None:
            raise NoConsentPage("the provider did not send the browser back")
        return target


def redirect_of(answer: httpx2.Response) -> str | None:
    """Return the absolute address that an answer redirects to, or None."""
    if answer.status_code not in REDIRECTS:
        return None
    return urljoin(str(answer.url), answer.headers["location"])


@dataclass(slots=True)
class ConsentForm:
    """What the consent page would send: where to, and the scopes that are ticked."""

    action: str = ""
    scopes: list[str] = field(default_factory=list)


class _FormReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found = ConsentForm()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "form":
            self.found.action = given.get("action") or ""
        elif tag == "input" and given.get("name") == "granted" and "checked" in given:
            self.found.scopes.append(given.get("value") or "")


def consent_form(page: str) -> ConsentForm:
    """Read the consent page's form (``NoConsentPage`` when there is none)."""
    reader = _FormReader()
    reader.feed(page)
    if not reader.found.action:
        raise NoConsentPage("this is not the consent page")
    return reader.found


async def visit(url: str, user: str) -> str:
    """Open a start link, consent as ``user``, come back: return the address that the application is called with.

    When the flow ends on the broker's own page, that page's text is returned.
    """
    browser = Browser()
    try:
        asked = redirect_of(await browser.follow(url))
        if asked is None:
            raise NoConsentPage("the link did not lead to a provider")
        answer = await browser.follow(await browser.allow(asked, user))
        return redirect_of(answer) or answer.text
    finally:
        await browser.aclose()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m broker.demo.browser``."""
    parser = argparse.ArgumentParser(
        prog="python -m broker.demo.browser",
        description="Open a start link of the broker, consent at the sandbox provider, print where that ended.",
    )
    parser.add_argument("url", help="the start link")
    parser.add_argument("--user", default="ada", help="who consents: ada, grace, or any other name")
    chosen = parser.parse_args(arguments)
    try:
        ended = asyncio.run(visit(chosen.url, chosen.user))
    except (NoConsentPage, httpx2.HTTPError, httpx2.InvalidURL) as error:
        sys.stderr.write(f"browser: {str(error) or type(error).__name__}\n")
        return 1
    sys.stdout.write(f"{ended}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
