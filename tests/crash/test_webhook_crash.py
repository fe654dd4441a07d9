"""Thousands of webhooks under `kill -9` of broker and worker: what was acknowledged is delivered, signed, under one id.

A quick run on each database; ``TEST_LONG=1`` posts 20,000 events under 50 kills. ``TEST_SEED`` repeats a run's choices, as far
as the machine's timing lets it.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from broker.demo.sandbox import SandboxOptions
from tests.crash.campaign import open_forks
from tests.crash.processes import open_site
from tests.crash.webhook_campaign import Stored, WebhookCampaign, show
from tests.crash.webhook_parties import EVENT_TYPE, Provider, make_source, open_receiver, operator, subscribe

LONG = os.environ.get("TEST_LONG") == "1"
EVENTS, KILLS = (20_000, 50) if LONG else (1_500, 6)
SEED = os.environ.get("TEST_SEED", "20261121")
PATH = "/deliveries"


@pytest.mark.timeout(1800 if LONG else 180)
async def test_every_acknowledged_event_is_delivered_whatever_is_killed(tmp_path: Path, database_url: str) -> None:
    began = time.monotonic()
    seed = f"{SEED} {database_url.partition(':')[0]}"
    async with (
        open_receiver() as receiver,
        open_site(tmp_path, database_url, SandboxOptions()) as site,
        open_forks(site, BROKER_WEBHOOKS_PER_MINUTE="10000000") as forks,
    ):
        campaign = WebhookCampaign(site, forks, Provider("", seed), receiver, patient=LONG)
        await campaign.start()
        async with operator(campaign.provider.port, site.admin_key) as client:
            campaign.provider.target = await make_source(client)
            await subscribe(client, receiver, PATH)
        await campaign.run(EVENTS, KILLS)
        stored = await campaign.stored()
    report(campaign, stored, time.monotonic() - began)
    check_what_was_answered(campaign)
    check_what_was_stored(campaign, stored)
    check_what_was_delivered(campaign, stored)
    check_what_came_twice(campaign)


def check_what_was_answered(campaign: WebhookCampaign) -> None:
    """Nothing that was signed is refused for good, nothing that was forged is taken, and an event keeps its id."""
    provider = campaign.provider
    assert len(provider.posted) + len(provider.forged) == EVENTS
    assert set(provider.forged.values()) == {401}
    for one in provider.posted.values():
        assert set(one.refused) <= {503}, one.refused
        assert one.event_ids or one.unanswered, "what was answered was taken"
        assert len(set(one.event_ids)) <= 1
        told = len(one.event_ids)
        assert one.duplicates in {max(0, told - 1), told if one.unanswered else 0}, (
            "the first is none, every other one is"
        )


def check_what_was_stored(campaign: WebhookCampaign, stored: Stored) -> None:
    """Each acknowledged event is there, each posted one at most once, nothing else is, and each is delivered."""
    posted = campaign.provider.posted
    nonces = list(stored.nonces.values())
    assert len(set(nonces)) == len(nonces), "an event is stored once"
    assert set(nonces) <= posted.keys(), "nothing is stored that was never posted"
    for nonce, one in posted.items():
        assert all(stored.nonces.get(event_id) == nonce for event_id in one.event_ids), "what was acknowledged is there"
    assert all(stored.deliveries.get(event_id) == ["delivered"] for event_id in stored.nonces)


def check_what_was_delivered(campaign: WebhookCampaign, stored: Stored) -> None:
    """Each arrival is signed, is of a posted event byte for byte, under that event's one id; no stored event is missing."""
    posted = campaign.provider.posted
    for arrival in campaign.receiver.arrivals:
        assert arrival.problem == ""
        assert stored.nonces[arrival.event_id] == arrival.nonce
        assert arrival.body == posted[arrival.nonce].body
        assert arrival.headers["content-type"] == "application/json"
        assert arrival.headers["x-broker-event-type"] == EVENT_TYPE
        assert arrival.headers["x-broker-provider-event-id"] == arrival.nonce
    arrived = {arrival.event_id for arrival in campaign.receiver.arrivals}
    assert {event_id for one in posted.values() for event_id in one.event_ids} <= arrived
    assert arrived == stored.nonces.keys()


def check_what_came_twice(campaign: WebhookCampaign) -> None:
    """Bound the repeats: at most one for each attempt of the event that was under way at a kill of the worker."""
    arrived = Counter(arrival.event_id for arrival in campaign.receiver.arrivals)
    assert any(kill.in_flight or kill.under_way for kill in campaign.kills), "the kills fell into work"
    cut_off = Counter(event_id for event_id, _ in campaign.cut_off())
    for event_id, times in arrived.items():
        assert times - 1 <= cut_off[event_id], f"{event_id} came {times} times"


def report(campaign: WebhookCampaign, stored: Stored, seconds: float) -> None:
    """Print what the kills came to."""
    posted, arrivals = campaign.provider.posted.values(), campaign.receiver.arrivals
    victims = Counter(kill.victim for kill in campaign.kills)
    arrived = Counter(arrival.event_id for arrival in arrivals)
    known = set(stored.nonces.values())
    unsure = [nonce for nonce, one in campaign.provider.posted.items() if not one.event_ids]
    show(
        f"-- webhooks, {campaign.provider.seed}: {len(posted)} events, {len(campaign.provider.forged)} forged ones, "
        f"{len(campaign.kills)} kills ({', '.join(f'{name} {count}' for name, count in victims.items())}), {seconds:.0f} s"
    )
    show(
        f"acknowledged {sum(bool(one.event_ids) for one in posted)}, died over {sum(one.unanswered for one in posted)}, "
        f"never acknowledged {len(unsure)}, of them stored {sum(nonce in known for nonce in unsure)}; "
        f"posted again and known already {sum(one.duplicates for one in posted)}; "
        f"503: {sum(len(one.refused) for one in posted)}"
    )
    show(
        f"delivered {len(arrived)} events in {len(arrivals)} arrivals: {len(arrivals) - len(arrived)} again, "
        f"with {len(campaign.cut_off())} attempts cut off; unsigned {sum(bool(one.problem) for one in arrivals)}"
    )
