"""The example of docs/api.md does what the page says: connect, confirm, hand out, and again after a 401."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from tests.commands import ROOT
from tests.flows.rig import APP, Rig, landed

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
GRANT = {"integrations": ["sandbox"], "subjects": ["notes:*"], "may": ["connect", "token"]}


def example() -> dict[str, Any]:
    """Run the page's first example, with the constants of this test, and return what it defines."""
    code = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
    ours: dict[str, Any] = {"__name__": "example"}
    code = code.replace("import httpx\n", "import httpx2 as httpx\n")
    exec(compile(code, "docs/api.md", "exec"), ours)  # noqa: S102 - the page's own code
    ours.update(INTEGRATION="sandbox", RETURN_TO=APP)
    return ours


@pytest.fixture
async def app(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, Any]]:
    """Give the example's functions, with a caller of their own."""
    monkeypatch.setenv("BROKER_URL", rig.base)
    monkeypatch.setenv("BROKER_KEY", await rig.caller(GRANT))
    defined = example()
    yield defined
    defined["broker"].close()


async def came_back(rig: Rig, app: dict[str, Any], subject: str) -> dict[str, str]:
    """Click through the example's start URL; return the query that comes back."""
    browser = rig.browser()
    answer = await browser.get(await asyncio.to_thread(app["start_url"], subject))
    answer = await browser.get(answer.headers["location"])
    return landed(await browser.get(await rig.consent(answer.headers["location"])))


async def test_the_example_connects_confirms_and_gets_a_token(rig: Rig, app: dict[str, Any]) -> None:
    query = await came_back(rig, app, "notes:ada")
    connection_id = await asyncio.to_thread(app["finish"], "notes:ada", query)
    first = await asyncio.to_thread(app["token"], connection_id)
    second = await asyncio.to_thread(app["token"], connection_id, first)
    assert (await rig.whoami(second)).status_code == 200
    assert first != second


async def test_the_example_confirms_nothing_for_another_user(rig: Rig, app: dict[str, Any]) -> None:
    query = await came_back(rig, app, "notes:mallory")
    with pytest.raises(httpx2.HTTPStatusError, match="409"):
        await asyncio.to_thread(app["finish"], "notes:grace", query)


async def test_the_example_takes_a_refusal_for_no_connection(app: dict[str, Any]) -> None:
    assert await asyncio.to_thread(app["finish"], "notes:ada", {"status": "error", "error": "access_denied"}) is None
