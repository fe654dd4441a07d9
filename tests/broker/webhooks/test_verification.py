"""Checks that ask their provider for a key: which address, how often, and what a missing answer means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from broker.egress import Egress
from broker.settings import Settings
from broker.webhooks import verification as module
from broker.webhooks.configured import Source, SourceSecret
from broker.webhooks.verification import PublishedKeys, Verification
from providers import load_catalog
from providers.spec import (
    Dialogue,
    Incoming,
    Outgoing,
    Proof,
    ProviderAnswerError,
    Received,
    Refused,
    Scheme,
    Secret,
    SourceKeys,
    Verified,
    Webhook,
    WebhookRefused,
)
from tests.fakes import Fake, Seen, listening

FRESH = {"Cache-Control": "no-cache"}


@pytest.fixture
async def egress() -> AsyncIterator[Egress]:
    made = Egress(Settings(env="development"))
    yield made
    await made.aclose()


def source_of(webhook: Webhook, *secrets: str) -> Source:
    held = [SourceSecret(f"whs_{at}", Secret(text)) for at, text in enumerate(secrets)]
    return Source(
        id="src_a",
        name="a",
        provider="made_up",
        kind="",
        webhook=webhook,
        secrets=held,
        settings={},
        tolerance_seconds=None,
        public_url=None,
        connection_id=None,
        seal=False,
        park_unmatched=False,
        enabled=True,
    )


def asking(*requests: Outgoing, origin: str) -> Webhook:
    """Return a webhook whose check asks for these, and believes the last answer where it is the body."""

    def verify(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
        del keys
        answer = Incoming(0)
        for request in requests:
            answer = yield request
        if answer.body != received.body:
            raise WebhookRefused("signature_mismatch")
        return Proof(None, frozenset())

    return Webhook(Scheme("Made up", verify, frozenset(), asks=(origin,), needs_secret=False), "https://docs.test")


async def judged(verification: Verification, webhook: Webhook, body: bytes = b'"key"') -> object:
    found = await verification.judged(source_of(webhook), Received("POST", "https://broker.test/x", (), body))
    return found.step if isinstance(found, Refused) else type(found)


async def test_a_published_key_is_asked_for_once_and_kept(egress: Egress) -> None:
    async with listening(lambda _: (200, "key")) as fake:
        webhook, verification = asking(Outgoing("GET", f"{fake.base}/keys"), origin=fake.base), Verification(egress)
        answers = await asyncio.gather(*(judged(verification, webhook) for _ in range(20)))
        assert set(answers) == {Verified}
        assert await judged(verification, webhook, b'"other"') == "signature_mismatch"
        assert fake.connections == 1


async def test_an_address_of_another_origin_is_not_asked(egress: Egress) -> None:
    async with listening(lambda _: (200, "key")) as evil, listening(lambda _: (200, "key")) as good:
        for url in (f"{evil.base}/keys", f"{good.base}@{evil.base.removeprefix('http://')}/keys", "no address"):
            webhook = asking(Outgoing("GET", url), origin=good.base)
            assert await judged(Verification(egress), webhook) == "key_unavailable"
        posting = asking(Outgoing("POST", f"{good.base}/keys"), origin=good.base)
        assert await judged(Verification(egress), posting) == "key_unavailable"
        assert (evil.connections, good.connections) == (0, 0)


@pytest.mark.parametrize("answer", [(500, "key"), (503, "key"), (429, "key"), (403, "key"), (404, "key"), (204, "")])
async def test_a_provider_that_does_not_answer_proves_nothing_and_is_left_alone_for_a_while(
    egress: Egress, answer: tuple[int, str]
) -> None:
    async with listening(lambda _: answer) as fake:
        webhook, verification = asking(Outgoing("GET", f"{fake.base}/keys"), origin=fake.base), Verification(egress)
        for _ in range(5):
            assert await judged(verification, webhook) == "key_unavailable"
        assert fake.connections == 1


async def test_a_check_that_never_ends_asking_is_ended(egress: Egress) -> None:
    async with listening(lambda _: (200, "key")) as fake:
        requests = [Outgoing("GET", f"{fake.base}/{at}") for at in range(20)]
        assert await judged(Verification(egress), asking(*requests, origin=fake.base)) == "key_unavailable"
        assert fake.connections == module.MOST_REQUESTS


class Clock:
    """A monotonic clock that a test turns."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


async def body_of(keys: PublishedKeys, fake: Fake, path: str = "/keys", *, fresh: bool = False) -> bytes | None:
    request = Outgoing("GET", f"{fake.base}{path}", FRESH if fresh else {})
    answer = await keys.answer(request, (fake.base,))
    return answer.body if isinstance(answer, Incoming) else None


async def test_a_request_past_any_cache_is_answered_anew_but_not_in_a_flood(egress: Egress) -> None:
    count = 0

    def numbered(_: Seen) -> tuple[int, bytes]:
        nonlocal count
        count += 1
        return 200, b"%d" % count

    clock = Clock()
    async with listening(numbered) as fake:
        keys = PublishedKeys(egress, monotonic=clock)
        assert [await body_of(keys, fake), await body_of(keys, fake, fresh=True)] == [b"1", b"1"]
        clock.at += module.FRESH_SECONDS
        assert [await body_of(keys, fake), await body_of(keys, fake, fresh=True)] == [b"1", b"2"]
        assert await body_of(keys, fake) == b"2"
        clock.at += module.KEPT_SECONDS
        assert await body_of(keys, fake) == b"3"


async def test_a_try_that_fails_takes_away_no_key_that_is_kept(egress: Egress) -> None:
    """A stranger names a key that nobody has, while the provider is not well."""
    clock, said = Clock(), [200]
    async with listening(lambda _: (said[0], b"key")) as fake:
        keys = PublishedKeys(egress, monotonic=clock)
        assert await body_of(keys, fake) == b"key"
        for status in (500, 403, 404):
            said[0] = status
            clock.at += module.FRESH_SECONDS
            assert await body_of(keys, fake, fresh=True) is None
            assert [await body_of(keys, fake), await body_of(keys, fake, fresh=True)] == [b"key", None]
        assert fake.connections == 4
        clock.at += module.KEPT_SECONDS
        assert await body_of(keys, fake) is None  # too old to be believed
        clock.at += module.FRESH_SECONDS
        said[0] = 200
        assert await body_of(keys, fake) == b"key"


async def test_addresses_that_strangers_make_up_are_not_all_asked_for_and_known_ones_are(egress: Egress) -> None:
    clock = Clock()
    async with listening(lambda seen: (200 if seen.path == "/known" else 404, b"key")) as fake:
        keys = PublishedKeys(egress, monotonic=clock)
        assert await body_of(keys, fake, "/known") == b"key"
        for at in range(2 * module.MOST_UNKNOWN):
            assert await body_of(keys, fake, f"/{at}") is None
        assert fake.connections == module.MOST_UNKNOWN
        assert await body_of(keys, fake, "/known") == b"key"
        clock.at += module.FRESH_SECONDS
        assert await body_of(keys, fake, "/known", fresh=True) == b"key"
        assert fake.connections == module.MOST_UNKNOWN + 1
        clock.at += module.UNKNOWN_SECONDS
        assert await body_of(keys, fake, "/new") is None
        assert fake.connections == module.MOST_UNKNOWN + 2


async def test_only_so_many_addresses_are_kept(egress: Egress) -> None:
    clock = Clock()
    async with listening(lambda seen: (200, seen.path.encode())) as fake:
        keys = PublishedKeys(egress, monotonic=clock)
        for at in range(module.MOST_KEPT + 1):
            clock.at += module.UNKNOWN_SECONDS / module.MOST_UNKNOWN
            assert await body_of(keys, fake, f"/{at}") == b"/%d" % at
        asked = fake.connections
        assert await body_of(keys, fake, f"/{module.MOST_KEPT}") is not None
        assert fake.connections == asked
        clock.at += module.UNKNOWN_SECONDS
        assert await body_of(keys, fake, "/0") is not None
        assert fake.connections == asked + 1


async def test_only_so_many_are_asked_for_at_once(egress: Egress) -> None:
    async with listening(lambda _: (200, "key")) as fake:
        keys = PublishedKeys(egress)
        found = await asyncio.gather(*(body_of(keys, fake, f"/{at}") for at in range(module.MOST_FETCHES + 5)))
        assert found.count(None) == 5
        assert await body_of(keys, fake, f"/{module.MOST_FETCHES + 4}") is not None


async def test_a_large_body_is_judged_like_a_small_one(egress: Egress) -> None:
    webhook = load_catalog()["github"].webhooks[""]
    made = webhook.scheme.sign
    assert made is not None
    for size in (10, module.LARGE_BODY_BYTES + 1):
        signed = made(Received("POST", "https://broker.test/x", (), b"x" * size), Secret("right"), 0.0)
        verification = Verification(egress)
        found = await verification.judged(source_of(webhook, "wrong", "right"), signed)
        assert isinstance(found, Verified)
        assert found.secret_index == 1
        refused = await verification.judged(source_of(webhook, "wrong"), signed)
        assert refused == Refused("signature_mismatch")


async def test_an_address_where_nobody_listens_has_no_answer(egress: Egress) -> None:
    answer = await PublishedKeys(egress).answer(Outgoing("GET", "http://127.0.0.1:9/x"), ("http://127.0.0.1:9",))
    assert isinstance(answer, ProviderAnswerError)
