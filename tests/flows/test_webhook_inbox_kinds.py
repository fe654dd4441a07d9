"""Every kind of webhook in the catalog through HTTP: what it signs is taken in, handshakes are answered and are no events."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from broker.models import WebhookEvent
from providers import load_catalog
from providers.receiving import configured, sign_sample
from providers.spec import Received, Sample, Secret, Webhook
from tests.flows.rig import Rig, open_rig
from tests.flows.webhook_senders import Answered, Fields, events_of, new_source, post, rows

pytestmark = pytest.mark.asyncio(loop_scope="module")
CATALOG = load_catalog()
NEEDED = {"generic_hmac": {"header": "X-Signature"}, "facebook": {"verify_token": "made-up-token"}}
KINDS = {
    f"{name}@{kind}" if kind else name: (name, kind, configured(webhook, NEEDED[name]) if name in NEEDED else webhook)
    for name, provider in CATALOG.items()
    for kind, webhook in provider.webhooks.items()
}
SIGNABLE = [kind for kind, (_, _, one) in KINDS.items() if one.scheme.pair is not None and one.scheme.sign is not None]
BY_THE_PROVIDER_ALONE = {"google@pubsub", "paypal"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give one broker to the whole file; its tests keep apart by sources of their own."""
    async with open_rig(tmp_path_factory.mktemp("kinds")) as made:
        yield made


def pair_of(webhook: Webhook) -> tuple[Secret, Secret]:
    assert webhook.scheme.pair is not None
    return webhook.scheme.pair(b"\x07" * 32)


async def source_of(rig: Rig, kind: str, **config: object) -> tuple[str, Webhook, Secret]:
    """Make a source of a kind; return its id, its webhook as the broker sees it, and what signs for it."""
    provider, name, webhook = KINDS[kind]
    kept, signs = pair_of(webhook)
    said = {"kind": name, "settings": NEEDED.get(provider, {}), **config}
    source_id = await new_source(rig, provider, secret=kept.reveal(), config=said)
    known = await rig.parts.webhooks.sources.known(source_id)
    assert known is not None
    return source_id, known.webhook, signs


def fields_of(received: Received) -> Fields:
    return [(name.decode(), value.decode("latin-1")) for name, value in received.headers]


def body_of(rig: Rig, event: WebhookEvent) -> bytes | None:
    """Return an event's body; one that carries its credential is sealed."""
    if event.sealed_body is None:
        return event.body
    return rig.parts.sealer.open(event.sealed_body, owner=event.id, purpose="event", version=1)


async def sent(rig: Rig, received: Received) -> Answered:
    """Send a signed request to where its URL says that the source is."""
    parts = urlsplit(received.url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    return await post(rig, target, fields_of(received), received.body, method=received.method)


async def test_all_but_those_that_only_the_provider_signs_are_tried() -> None:
    assert KINDS.keys() - {*SIGNABLE} == BY_THE_PROVIDER_ALONE
    assert len(SIGNABLE) > 35


@pytest.mark.parametrize("kind", SIGNABLE)
async def test_what_a_provider_signs_is_an_event_and_what_it_did_not_sign_is_refused(rig: Rig, kind: str) -> None:
    source_id, webhook, signs = await source_of(rig, kind)
    url = f"{rig.base}/webhooks/{source_id}?a=b%20c"
    received = sign_sample(webhook, Sample("push.opened", url, time.time(), "delivery-1"), signs)
    answer = await sent(rig, received)
    assert 200 <= answer.status < 300, answer.body
    (event,) = await events_of(rig, source_id)
    assert body_of(rig, event) == received.body
    assert event.type.startswith(f"{KINDS[kind][0]}.")
    wanted = webhook.acknowledgement
    if wanted is None:
        assert answer.json() == {"event_id": event.id, "duplicate": False}
    else:
        assert (answer.status, answer.body) == (wanted.status, wanted.body)
    assert not {name for name, _ in event.headers} & set(webhook.scheme.carries)
    signed = {*webhook.scheme.carries} & {name.decode() for name, _ in received.headers}
    for name in signed:
        bare = Received(
            received.method, url, tuple(one for one in received.headers if one[0] != name.encode()), received.body
        )
        assert (await sent(rig, bare)).status == 401
    assert len(await events_of(rig, source_id)) == 1


@pytest.mark.parametrize("kind", [one for one in SIGNABLE if "url" in KINDS[one][2].scheme.covers])
async def test_where_the_url_is_signed_the_configured_one_counts_and_never_the_host(rig: Rig, kind: str) -> None:
    public = "https://hooks.acme.test/in/here"
    source_id, webhook, signs = await source_of(rig, kind, public_url=public)
    for query, host in (("", "evil.test"), ("?a=b%20c&d", "hooks.acme.test")):
        signed = sign_sample(webhook, Sample("push.opened", public + query, time.time(), f"d{len(query)}"), signs)
        forwarded = [*fields_of(signed), ("X-Forwarded-Host", host), ("X-Forwarded-Proto", "http")]
        answer = await post(rig, f"/webhooks/{source_id}{query}", forwarded, signed.body)
        assert 200 <= answer.status < 300, answer.body
    of_the_socket = sign_sample(
        webhook, Sample("push.opened", f"{rig.base}/webhooks/{source_id}", time.time(), "d"), signs
    )
    assert (await sent(rig, of_the_socket)).status == 401
    assert len(await events_of(rig, source_id)) == 2


# Handshakes: answered as they are, and no events


async def test_a_signed_challenge_is_echoed_as_text_that_no_browser_reads_as_a_page(rig: Rig) -> None:
    source_id, _, signs = await source_of(rig, "slack")
    body = b'{"type": "url_verification", "challenge": "<script>3eZbrw1aB</script>"}'
    at = str(int(time.time()))
    digest = hmac.new(signs.reveal().encode(), f"v0:{at}:".encode() + body, hashlib.sha256).hexdigest()
    fields = [("X-Slack-Request-Timestamp", at), ("X-Slack-Signature", f"v0={digest}")]
    answer = await post(rig, f"/webhooks/{source_id}", fields, body)
    assert (answer.status, answer.body) == (200, b"<script>3eZbrw1aB</script>")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["x-content-type-options"] == "nosniff"
    forged = await post(rig, f"/webhooks/{source_id}", [*fields[:1], ("X-Slack-Signature", "v0=" + "0" * 64)], body)
    assert forged.status == 401
    assert b"3eZbrw1aB" not in forged.body
    assert await events_of(rig, source_id) == []


async def test_a_subscription_is_confirmed_by_get_to_who_knows_the_token(rig: Rig) -> None:
    source_id, _, _ = await source_of(rig, "facebook")
    target = f"/webhooks/{source_id}?hub.mode=subscribe&hub.challenge=1158201444&hub.verify_token="
    right = await post(rig, target + "made-up-token", [], b"", method="GET")
    assert (right.status, right.body, right.headers["content-type"]) == (
        200,
        b"1158201444",
        "text/plain; charset=utf-8",
    )
    assert (await post(rig, target + "guess", [], b"", method="GET")).status == 401
    assert (await post(rig, f"/webhooks/{source_id}", [], b"", method="GET")).status == 405
    assert await events_of(rig, source_id) == []


async def test_a_question_for_the_secret_is_answered_with_its_proof(rig: Rig) -> None:
    source_id, _, signs = await source_of(rig, "x")
    answer = await post(rig, f"/webhooks/{source_id}?crc_token=abc123", [], b"", method="GET")
    proof = base64.b64encode(hmac.digest(signs.reveal().encode(), b"abc123", "sha256")).decode()
    assert answer.json() == {"response_token": f"sha256={proof}"}
    assert answer.headers["content-type"] == "application/json"
    # The proof over a text that could be asked for is no event.
    forged = [("X-Twitter-Webhooks-Signature", f"sha256={proof}")]
    assert (await post(rig, f"/webhooks/{source_id}", forged, b"abc123")).status == 401


async def test_a_token_in_the_query_is_echoed_and_changes_nothing(rig: Rig) -> None:
    source_id = await new_source(rig, "microsoft", secret="a-shared-client-state")
    answer = await post(rig, f"/webhooks/{source_id}?validationToken=Validation%3A%20me%20%3Cb%3E", [], b"")
    assert (answer.status, answer.body) == (200, b"Validation: me <b>")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert await rows(rig, WebhookEvent, source_id=source_id) == []


async def test_a_ping_without_a_body_to_its_answer_leaves_the_connection_usable(rig: Rig) -> None:
    source_id, webhook, signs = await source_of(rig, "discord")
    url = f"{rig.base}/webhooks/{source_id}"
    ping = sign_sample(webhook, Sample("0", url, time.time(), "d", body=b'{"type": 0, "version": 1}'), signs)
    answer = await sent(rig, ping)
    assert (answer.status, answer.body) == (204, b"")
    assert "content-length" not in answer.headers
    assert await events_of(rig, source_id) == []


async def test_the_secret_that_a_handshake_brings_is_kept_before_the_answer_and_only_once(rig: Rig) -> None:
    source_id = await new_source(rig, "asana", secret=None)
    target, brought = f"/webhooks/{source_id}", [("X-Hook-Secret", "brought-by-the-first")]
    assert (await post(rig, target, signed_by("brought-by-the-first"), b"{}")).status == 401
    answer = await post(rig, target, brought, b"")
    assert (answer.status, answer.headers["x-hook-secret"]) == (200, "brought-by-the-first")
    assert (await post(rig, target, signed_by("brought-by-the-first"), b"{}")).status == 200
    other = await post(rig, target, [("X-Hook-Secret", "brought-by-another")], b"")
    assert other.status == 401
    assert (await post(rig, target, signed_by("brought-by-another"), b'{"a": 1}')).status == 401
    assert len(await events_of(rig, source_id)) == 1


def signed_by(secret: str) -> Fields:
    bodies: Mapping[str, bytes] = {"brought-by-the-first": b"{}", "brought-by-another": b'{"a": 1}'}
    return [("X-Hook-Signature", hmac.new(secret.encode(), bodies[secret], hashlib.sha256).hexdigest())]


async def test_what_a_refusal_says_is_the_same_for_every_kind(rig: Rig) -> None:
    told = set()
    for kind in SIGNABLE:
        source_id, _, _ = await source_of(rig, kind)
        answer = await post(rig, f"/webhooks/{source_id}", [("Content-Type", "application/json")], b'{"a": 1}')
        found = answer.json()
        del found["request_id"]
        told.add((answer.status, json.dumps(found)))
    assert len(told) == 1
