"""Sources as requests see them: current within half a second, cheap meanwhile, and whole or not at all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa

from broker.errors import NotFound, Overloaded, SecretStoreUnavailable
from broker.models import WebhookSecret, WebhookSource
from broker.vault import SecretNotFound
from broker.webhooks.revision import BELIEVED_SECONDS
from broker.webhooks.secrets import sweep_unreferenced, vault_owner
from providers.spec import Secret
from tests.broker.webhooks.configuring import OPERATOR, AnyDatabase, counting, process


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


async def test_many_requests_share_one_small_query_in_half_a_second(database: AnyDatabase, tmp_path: Path) -> None:
    clock = Clock()
    one = await process(database, tmp_path, clock=clock)
    source_id, secret = await one.source()
    with counting(database) as asked:
        found = await asyncio.gather(*(one.sources.known(source_id) for _ in range(50)))
    assert all(source is found[0] for source in found)
    assert found[0] is not None
    assert [held.value.reveal() for held in found[0].secrets] == [secret]
    first = len(asked)
    assert first <= 4  # the revision, the source, its secrets, and what the vault keeps of them
    with counting(database) as asked:
        assert await one.sources.known(source_id) is found[0]
    assert asked == []
    clock.at += BELIEVED_SECONDS
    with counting(database) as asked:
        again = await asyncio.gather(*(one.sources.known(source_id) for _ in range(50)))
    assert again == [found[0]] * 50
    assert len(asked) == 1
    assert "revision" in asked[0]


async def test_a_change_elsewhere_is_seen_after_half_a_second(database: AnyDatabase, tmp_path: Path) -> None:
    clock = Clock()
    here, elsewhere = await process(database, tmp_path, clock=clock), await process(database, tmp_path)
    source_id, _ = await elsewhere.source()
    other_id, _ = await elsewhere.source()
    assert await here.sources.known(source_id) is not None
    assert await here.sources.known(other_id) is not None
    await elsewhere.sources.update(source_id, {"enabled": False, "tolerance_seconds": 30.0}, OPERATOR)
    await elsewhere.sources.delete(other_id, OPERATOR)
    clock.at += BELIEVED_SECONDS - 0.01
    stale = await here.sources.known(source_id)
    assert stale is not None
    assert stale.enabled
    clock.at += 0.01
    seen = await here.sources.known(source_id)
    assert seen is not None
    assert (seen.enabled, seen.tolerance_seconds) == (False, 30.0)
    assert await here.sources.known(other_id) is None


async def test_a_process_sees_its_own_change_at_once(database: AnyDatabase, tmp_path: Path) -> None:
    one = await process(database, tmp_path, clock=Clock())
    source_id, _ = await one.source()
    assert await one.sources.known(source_id) is not None
    await one.sources.update(source_id, {"enabled": False}, OPERATOR)
    seen = await one.sources.known(source_id)
    assert seen is not None
    assert not seen.enabled


async def test_strangers_ids_are_not_kept_and_odd_ones_are_not_asked_for(database: AnyDatabase, tmp_path: Path) -> None:
    one = await process(database, tmp_path)
    with counting(database) as asked:
        for odd in ("", "src_", "src_" + "A" * 26, "sub_" + "a" * 26, "src_" + "a" * 26 + "\n", "src_ä" + "a" * 25):
            assert await one.sources.known(odd) is None
    assert asked == []
    assert await one.sources.known("src_" + "a" * 26) is None
    assert one.sources._known._held == {}


async def test_secrets_stay_in_memory_no_longer_than_the_setting_says(database: AnyDatabase, tmp_path: Path) -> None:
    clock = Clock()
    one = await process(database, tmp_path, clock=clock, secret_cache_seconds=2)
    source_id, _ = await one.source()
    assert await one.sources.known(source_id) is not None
    for row in await database.read(lambda session: list(session.execute(sa.select(WebhookSecret)).scalars())):
        await one.vault._vault.destroy(vault_owner(row.id))  # the store itself: as if it were sealed
    clock.at += 1.9
    assert await one.sources.known(source_id) is not None
    clock.at += 0.2
    with pytest.raises(SecretStoreUnavailable):
        await one.sources.known(source_id)


async def test_a_source_of_a_file_that_changed_is_used_by_nobody(database: AnyDatabase, tmp_path: Path) -> None:
    one = await process(database, tmp_path)
    source_id, _ = await one.source()
    config = {"settings": {"a_setting_of_before": "x"}}
    await database.transaction(lambda session: session.execute(sa.update(WebhookSource).values(config=config)))
    with pytest.raises(Overloaded):
        await one.sources.known(source_id)
    view = await one.sources.get(source_id)
    assert (view.status, view.webhook) == ("error", None)


async def test_of_two_changes_at_once_none_is_lost(database: AnyDatabase, tmp_path: Path) -> None:
    one, two = await process(database, tmp_path), await process(database, tmp_path)
    settings = {"settings": {"verify_token": "token-1"}}
    source_id, _ = await one.source(provider="facebook", config=settings)
    patches = [{"config": {"settings": {"verify_token": f"token-{number}"}}} for number in range(2, 8)]
    by = [(one, two)[number % 2].sources.update(source_id, patch, OPERATOR) for number, patch in enumerate(patches)]
    done = await asyncio.gather(*by, return_exceptions=True)
    assert {type(outcome).__name__ for outcome in done} <= {"SourceView", "Conflict", "SecretStoreUnavailable"}
    won = [patch for patch, outcome in zip(patches, done, strict=True) if not isinstance(outcome, Exception)]
    assert won
    seen = await one.sources.known(source_id)
    assert seen is not None
    last = {patch["config"]["settings"]["verify_token"] for patch in won}
    assert seen.settings["verify_token"].reveal() in last
    assert len(await one.vault.owners("webhook_settings/")) == 1


async def test_secrets_that_no_row_names_are_swept(database: AnyDatabase, tmp_path: Path) -> None:
    one = await process(database, tmp_path)
    source_id, secret = await one.source()
    facebook, _ = await one.source(provider="facebook", config={"settings": {"verify_token": "token"}})
    await one.vault.put("webhook_secrets/key_left", {"value": "x"}, expected_version=0)
    await one.vault.put("webhook_settings/src_left/7", {"verify_token": "x"}, expected_version=0)
    assert await sweep_unreferenced(database, one.vault, older_than_seconds=3600) == 0
    assert await sweep_unreferenced(database, one.vault, older_than_seconds=-60) == 2
    for owner in ("webhook_secrets/key_left", "webhook_settings/src_left/7"):
        with pytest.raises(SecretNotFound):
            await one.vault.get(owner)
    fresh = await process(database, tmp_path)
    seen = await fresh.sources.known(source_id)
    assert seen is not None
    assert [held.value.reveal() for held in seen.secrets] == [secret]
    told = await fresh.sources.known(facebook)
    assert told is not None
    assert told.settings["verify_token"].reveal() == "token"


async def test_use_is_written_once_and_in_the_background(database: AnyDatabase, tmp_path: Path) -> None:
    one = await process(database, tmp_path)
    source_id, _ = await one.source()
    seen = await one.sources.known(source_id)
    assert seen is not None
    for _ in range(100):
        one.sources.note_used(seen.secrets[0].id)
    await one.sources.aclose()
    view = await one.sources.get(source_id)
    assert view.secrets[0].last_used_at is not None


async def test_nothing_is_learned_for_a_source_that_is_gone(database: AnyDatabase, tmp_path: Path) -> None:
    one = await process(database, tmp_path)
    source_id, _ = await one.source(provider="asana")
    seen = await one.sources.known(source_id)
    assert seen is not None
    await one.sources.delete(source_id, OPERATOR)
    with pytest.raises(NotFound):
        await one.sources.learn(seen, Secret("brought-by-a-handshake"))
    assert await one.vault.owners("webhook_secrets/") == []
