"""Callers: keys and where they stand, who they belong to on every replica, and the last admin, on both databases."""

from __future__ import annotations

import asyncio
import base64
import re
import string
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlmodel import Session, col, select

from broker.audit import Audit
from broker.callers import CACHE_ENTRIES, MAX_NAME, Callers, ParsedKey, mint_key, parse_key, presented_keys
from broker.callers.rows import TAKEN_OVER
from broker.database import Database
from broker.errors import AuditUnavailable, Conflict, DatabaseUnavailable, InvalidRequest, NotFound, Unauthenticated
from broker.models import AuditRecord, Caller, CallerKey
from broker.policy import Principal, Target, allowed
from broker.settings import SettingsError
from providers.spec import Secret
from tests.broker.callers.made import made_callers, resigned

T = TypeVar("T")
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
READER: dict[str, Any] = {"integrations": ["mail"], "may": ["read"], "subjects": ["acme:*"]}


def whole_key(key_id: str, secret: str) -> str:
    """Return the key of these parts with the right checksum, counted here in another way than in the code."""
    body = f"brk_{key_id.removeprefix('key_')}_{secret}"
    number = zlib.crc32(body.encode())
    return body + "".join(BASE62[number // 62**place % 62] for place in (5, 4, 3, 2, 1, 0))


# --- the text of a key ----------------------------------------------------------------------------------------------------


def test_a_minted_key_is_read_back() -> None:
    key_id, key = mint_key()
    parsed = parse_key(key.reveal())
    assert parsed is not None
    assert parsed.key_id == key_id
    assert re.fullmatch(r"key_[a-z0-9]{26}", key_id)
    assert re.fullmatch(r"brk_[a-z0-9]{26}_[0-9A-Za-z]{49}", key.reveal())
    assert key.reveal() not in repr((key, parsed))


def test_minted_keys_differ() -> None:
    assert len({mint_key()[1] for _ in range(100)}) == 100


@given(
    st.text(string.ascii_lowercase + string.digits, min_size=26, max_size=26), st.text(BASE62, min_size=43, max_size=43)
)
def test_every_id_and_secret_with_its_checksum_is_a_key(key_id: str, secret: str) -> None:
    parsed = parse_key(whole_key(key_id, secret))
    assert parsed is not None
    assert parsed.key_id == f"key_{key_id}"


@given(st.integers(0, 79), st.sampled_from(BASE62 + "_-. \n\x00é"))
def test_any_other_character_anywhere_is_refused_without_a_look_up(place: int, character: str) -> None:
    text = mint_key()[1].reveal()
    assert len(text) == 80
    changed = text[:place] + character + text[place + 1 :]
    assert (parse_key(changed) is None) is (changed != text)


@given(st.integers(0, 80), st.text(BASE62 + "_ \n", min_size=1, max_size=3))
def test_a_key_with_more_or_less_text_is_refused(place: int, more: str) -> None:
    text = mint_key()[1].reveal()
    assert parse_key(text[:place] + more + text[place:]) is None
    assert parse_key(text[:place]) is None or place == 80


@pytest.mark.parametrize("change", [str.upper, str.lower, str.swapcase])
def test_the_case_of_a_key_counts(change: Callable[[str], str]) -> None:
    assert parse_key(change(whole_key("a" * 26, "aB" * 21 + "C"))) is None


# --- where keys stand in a request ----------------------------------------------------------------------------------------

KEY, OTHER = whole_key("a" * 26, "A" * 43), whole_key("b" * 26, "B" * 43)


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def keys_in(*headers: tuple[str, str], extra: Sequence[str] = (), sigv4: bool = False) -> list[str]:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return presented_keys(raw, extra_headers=extra, sigv4=sigv4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("authorization", f"Bearer {KEY}"),
        ("AUTHORIZATION", f"bearer  {KEY} "),
        ("Authorization", f"token {KEY}"),
        ("authorization", f"Token {KEY}"),
        ("authorization", basic(KEY, "")),
        ("authorization", basic("x-access-token", KEY)),
        ("authorization", basic(KEY, KEY)),
        ("authorization", basic(KEY, "x").replace("Basic", "bAsIc")),
        ("X-API-Key", KEY),
        ("x-api-key", f"\t{KEY} "),
        ("x-api-key", f"Bearer {KEY}"),
    ],
)
def test_a_key_is_found_where_vendors_sdks_put_it(name: str, value: str) -> None:
    assert keys_in((name, value)) == [KEY]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("authorization", KEY),
        ("authorization", f"Digest {KEY}"),
        ("authorization", "Bearer"),
        ("authorization", "Bearer ghp_someone_elses"),
        ("authorization", ""),
        ("authorization", "Basic %%%"),
        ("authorization", "Basic " + base64.b64encode(b"\xff\xfe").decode()),
        ("authorization", basic("a", "b")),
        ("authorization", f"Basic {KEY}"),
        ("authorization", f"AWS4-HMAC-SHA256 Credential={KEY}/20250101/eu/s3/aws4_request, Signature=0"),
        ("cookie", KEY),
        ("x-api-key2", KEY),
        ("private-token", KEY),
        ("x-api-key", "sk_live_1"),
        ("x-api-key", f"x{KEY}"),
    ],
)
def test_what_is_no_key_or_stands_elsewhere_is_ignored(name: str, value: str) -> None:
    assert keys_in((name, value)) == []


def test_at_the_proxy_the_providers_own_header_counts_too() -> None:
    assert keys_in(("PRIVATE-TOKEN", KEY), extra=["Private-Token"]) == [KEY]
    assert keys_in(("x-auth", f"Bearer {KEY}"), extra=["x-auth"]) == [KEY]
    assert keys_in(("authorization", KEY), extra=["Authorization"]) == [KEY]
    assert keys_in(("x-auth", "Bearer vendor"), ("authorization", f"Bearer {KEY}"), extra=["x-auth"]) == [KEY]


def test_at_the_proxy_the_credential_of_an_aws_signature_counts_too() -> None:
    scope = "/20250101/eu/s3/aws4_request"
    for value in (
        f"AWS4-HMAC-SHA256 Credential={KEY}{scope}, SignedHeaders=host, Signature=0",
        f"AWS4-HMAC-SHA256 SignedHeaders=host,Credential={KEY}{scope},Signature=0",
        f"AWS4-ECDSA-P256-SHA256 Credential={KEY}{scope}, Signature=0",
    ):
        assert keys_in(("authorization", value), sigv4=True) == [KEY]
    assert keys_in(("authorization", f"AWS4-HMAC-SHA256 XCredential={KEY}{scope}"), sigv4=True) == []
    assert keys_in(("authorization", f"Digest Credential={KEY}{scope}"), sigv4=True) == []
    with pytest.raises(InvalidRequest):
        keys_in(("authorization", f"AWS4-HMAC-SHA256 Credential={KEY}/x, Credential={OTHER}/x"), sigv4=True)


def test_the_same_key_twice_is_one_key() -> None:
    assert keys_in(("authorization", f"Bearer {KEY}"), ("x-api-key", KEY), ("authorization", basic("u", KEY))) == [KEY]


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", f"Bearer {KEY}"), ("x-api-key", OTHER)],
        [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {OTHER}")],
        [("authorization", basic(KEY, OTHER))],
        [("authorization", f"Bearer {KEY}"), ("x-api-key", "brk_broken")],
    ],
)
def test_two_different_keys_are_a_bad_request_that_quotes_none(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        keys_in(*headers)
    assert "brk_" not in str(refused.value)


header_names = st.sampled_from([b"authorization", b"X-Api-Key", b"x-own", b"cookie"])
header_values = st.binary(max_size=12) | st.sampled_from(
    [
        b"Bearer brk_1",
        b"token brk_1",
        b"Basic YnJrXzE6",
        b"brk_1",
        b"AWS4-X Credential=brk_1/x",
        b"Basic",
        b"Bearer \xff",
    ]
)


@given(st.lists(st.tuples(header_names, header_values), max_size=4), st.booleans())
def test_any_headers_give_at_most_one_key(headers: list[tuple[bytes, bytes]], sigv4: bool) -> None:  # noqa: FBT001 - drawn
    found = presented_keys(headers, extra_headers=["x-own"], sigv4=sigv4)
    assert found in ([], ["brk_1"])


# --- callers in the database ----------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """A clock that stands still until it is moved."""

    seconds: float = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def audit(database: Database) -> AsyncIterator[Audit]:
    """Give a real audit chain over the test's database."""
    made = Audit(database, bytes(32), sinks=("database",), checkpoints=())
    yield made
    await made.aclose()


@pytest.fixture
async def callers(database: Database, audit: Audit, clock: Clock) -> AsyncIterator[Callers]:
    """Give one replica's callers."""
    made = await made_callers(database, audit, clock=clock)
    yield made
    await made.aclose()


@pytest.fixture
async def replica(database: Database, audit: Audit, clock: Clock) -> AsyncIterator[Callers]:
    """Give another replica's callers over the same database."""
    made = await made_callers(database, audit, clock=clock)
    yield made
    await made.aclose()


async def dies(callers: Callers, key: Secret) -> bool:
    try:
        await callers.identify(key)
    except Unauthenticated:
        return True
    return False


async def service(callers: Callers, **fields: Any) -> tuple[Caller, Secret]:
    return await callers.add(fields.pop("name", "backend"), ["service"], [READER], actor="test", **fields)


async def admin(callers: Callers) -> tuple[Caller, Secret]:
    return await callers.add("root", ["admin"], actor="test")


def key_id_of(key: Secret) -> str:
    parsed = parse_key(key.reveal())
    assert isinstance(parsed, ParsedKey)
    return parsed.key_id


async def change_rows(database: Database, statement: sa.Update) -> None:
    await database.transaction(lambda session: session.execute(statement))


async def test_a_key_names_its_caller_with_roles_and_grants(callers: Callers) -> None:
    caller, key = await callers.add("backend", ["service", "service"], [READER], actor="clr_me")
    principal = await callers.authenticate([(b"authorization", b"Bearer " + key.reveal().encode())])
    assert isinstance(principal, Principal)
    assert (principal.caller_id, principal.name, *principal.roles) == (caller.id, "backend", "service")
    assert principal.key_id == key_id_of(key)
    assert allowed(principal, "read", Target("mail", "acme:1", {}))
    assert not allowed(principal, "read", Target("mail", "globex:1", {}))


async def test_at_the_proxy_other_places_authenticate_too(callers: Callers) -> None:
    _, key = await service(callers)
    text = key.reveal().encode()
    own = await callers.authenticate([(b"private-token", text)], extra_headers=["PRIVATE-TOKEN"])
    signed = await callers.authenticate([(b"authorization", b"AWS4-X Credential=" + text + b"/x")], sigv4=True)
    assert own == signed


async def test_every_kind_of_wrong_key_gets_the_same_answer(callers: Callers, database: Database) -> None:
    answers = []
    _, revoked = caller, expired = await service(callers)
    await callers.revoke_key(caller.id, key_id_of(revoked), actor="test")
    outlived, of_expired = await service(callers, expires_at=1.0)
    live, key = await service(callers)
    _, expired = await callers.add_key(live.id, actor="test", expires_at=1.0)
    gone, of_gone = await service(callers)
    await callers.delete(gone.id, actor="test")
    forged = whole_key(key_id_of(key), "0" * 43)
    unknown = whole_key("z" * 26, "0" * 43)
    for text in (
        *(one.reveal() for one in (revoked, of_expired, expired, of_gone)),
        forged,
        unknown,
        "brk_x",
        "nothing",
    ):
        with pytest.raises(Unauthenticated) as refused:
            await callers.authenticate([(b"authorization", f"Bearer {text}".encode())])
        answers.append((refused.value.status, refused.value.detail, tuple(refused.value.headers.items())))
    with pytest.raises(Unauthenticated) as refused:
        await callers.authenticate([])
    answers.append((refused.value.status, refused.value.detail, tuple(refused.value.headers.items())))
    assert len(set(answers)) == 1
    assert outlived.expires_at == 1.0
    assert not await dies(callers, key)


async def test_two_different_keys_are_a_bad_request_before_any_look_up(callers: Callers) -> None:
    with pytest.raises(InvalidRequest):
        await callers.authenticate([(b"authorization", f"Bearer {KEY}".encode()), (b"x-api-key", OTHER.encode())])


async def test_only_a_hash_of_the_key_is_stored(callers: Callers, database: Database) -> None:
    caller, key = await service(callers)
    tables = ("callers", "caller_keys", "audit_records")
    rows = await database.read(lambda s: [str(s.execute(sa.text(f"SELECT * FROM {t}")).all()) for t in tables])  # noqa: S608 - constants
    secret = key.reveal().rpartition("_")[2]
    assert caller.id in "".join(rows)
    assert not any(secret in row or secret[:20] in row for row in rows)


async def test_a_revoked_key_is_dead_here_at_once_and_elsewhere_within_a_second(
    callers: Callers, replica: Callers, clock: Clock
) -> None:
    caller, key = await service(callers)
    assert not await dies(callers, key)
    assert not await dies(replica, key)
    await callers.revoke_key(caller.id, key_id_of(key), actor="test")
    assert await dies(callers, key)
    clock.seconds += 0.5
    assert await dies(replica, key)
    clock.seconds -= 0.5  # not even what was remembered before comes back
    assert await dies(replica, key)


async def test_an_answer_is_remembered_for_less_than_half_a_second(
    callers: Callers, replica: Callers, clock: Clock
) -> None:
    caller, key = await service(callers)
    first = await replica.identify(key)
    await callers.update(caller.id, {"roles": ["auditor"], "grants": []}, actor="test")
    clock.seconds += 0.49
    assert await replica.identify(key) is first
    clock.seconds += 0.01
    assert (await replica.identify(key)).roles == {"auditor"}
    assert (await replica.identify(key)).grants == ()


async def test_what_is_remembered_is_bounded(callers: Callers) -> None:
    _, key = await service(callers)
    known = await callers.identify(key)
    remembered = next(iter(callers._known.values()))
    callers._known.update({str(number): remembered for number in range(CACHE_ENTRIES)})
    callers._known.pop(parse_key(key.reveal()).digest)  # type: ignore[union-attr]
    assert await callers.identify(key) == known
    assert len(callers._known) == 1


class Slow:
    """A database whose answers are on the way until they are let through."""

    def __init__(self, database: Database) -> None:
        """Ask ``database``."""
        self.database, self.dialect = database, database.dialect
        self.asked, self.gate = asyncio.Event(), asyncio.Event()

    async def query(self, work: Callable[[sa.Connection], T]) -> T:
        """Answer at once."""
        return await self.database.query(work)

    async def read(self, work: Callable[[Session], T]) -> T:
        """Answer when the gate is open."""
        result = await self.database.read(work)
        self.asked.set()
        await self.gate.wait()
        return result

    async def read_aside(self, work: Callable[[Session], T]) -> T:
        """Answer when the gate is open."""
        return await self.read(work)

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """Write at once."""
        return await self.database.transaction(work)

    async def migrate(self) -> None:
        """Do nothing."""

    async def schema_revision(self) -> str | None:
        """Return what the database says."""
        return await self.database.schema_revision()

    async def aclose(self) -> None:
        """Leave the database open."""


class Full(Slow):
    """A database that can be read but not written."""

    async def transaction(self, work: Callable[[Session], T]) -> T:
        """Fail, whatever ``work`` is."""
        del work
        raise DatabaseUnavailable


async def test_an_answer_from_before_a_change_is_not_remembered(
    database: Database, audit: Audit, callers: Callers
) -> None:
    caller, key = await service(callers)
    slow = Slow(database)
    here = await made_callers(database, audit, over=slow)
    asking = asyncio.create_task(here.identify(key))
    await slow.asked.wait()
    await here.revoke_key(caller.id, key_id_of(key), actor="test")
    slow.gate.set()
    assert (await asking).caller_id == caller.id
    assert await dies(here, key)
    await here.aclose()


async def last_used_at(database: Database, key: Secret) -> float | None:
    row = await database.read(lambda session: session.get(CallerKey, key_id_of(key)))
    assert row is not None
    return row.last_used_at


async def test_last_use_is_written_beside_the_request_and_once_a_minute(
    callers: Callers, database: Database, clock: Clock
) -> None:
    _, key = await service(callers)
    assert await last_used_at(database, key) is None
    for _ in range(3):
        await callers.identify(key)
        clock.seconds += 1
    await callers.aclose()
    first = await last_used_at(database, key)
    assert first is not None
    written = []
    for age in (30, 61):
        used = sa.update(CallerKey).values(last_used_at=first - age)
        await change_rows(database, used)
        clock.seconds += 1
        await callers.identify(key)
        await callers.aclose()
        written.append(await last_used_at(database, key))
    assert written[0] == first - 30
    assert written[1] is not None
    assert written[1] >= first


async def test_two_replicas_write_one_last_use(callers: Callers, replica: Callers, database: Database) -> None:
    _, key = await service(callers)
    await asyncio.gather(callers.identify(key), replica.identify(key))
    await callers.aclose()
    first = await last_used_at(database, key)
    await replica.aclose()
    assert first is not None
    assert await last_used_at(database, key) == pytest.approx(first, abs=5)


async def test_a_last_use_that_cannot_be_written_fails_nobody(
    callers: Callers, database: Database, audit: Audit
) -> None:
    _, key = await service(callers)
    full = Full(database)
    full.gate.set()
    here = await made_callers(database, audit, over=full)
    assert (await here.identify(key)).name == "backend"
    await here.aclose()
    assert await last_used_at(database, key) is None


async def test_roles_and_grants_that_this_version_does_not_know_allow_nothing(
    callers: Callers, database: Database, audit: Audit
) -> None:
    caller, key = await service(callers)
    strange = [{**READER, "regions": ["eu"]}, READER, {"integrations": ["*"]}]
    await resigned(database, audit, sa.update(Caller).values(roles=["service", "emperor"], grants=strange))
    principal = await callers.identify(key)
    assert principal.caller_id == caller.id
    assert principal.roles == {"service"}
    assert len(principal.grants) == 1


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"name": ""}, "/name"),
        ({"name": "  "}, "/name"),
        ({"name": "x" * (MAX_NAME + 1)}, "/name"),
        ({"name": "a\nb"}, "/name"),
        ({"name": None}, "/name"),
        ({"name": 7}, "/name"),
        ({"roles": None}, "/roles"),
        ({"roles": "admin"}, "/roles"),
        ({"roles": ["service", "root"]}, "/roles/1"),
        ({"grants": None}, "/grants"),
        ({"grants": [{}]}, "/grants/0/integrations"),
        ({"expires_at": "2030-01-01"}, "/expires_at"),
        ({"expires_at": "2030-01-01T00:00:00"}, "/expires_at"),
        ({"expires_at": "2030-13-01T00:00:00Z"}, "/expires_at"),
        ({"expires_at": "0001-01-01T00:00:00+23:59"}, "/expires_at"),
        ({"expires_at": "1969-12-31T23:59:59Z"}, "/expires_at"),
        ({"expires_at": []}, "/expires_at"),
        ({"expires_at": True}, "/expires_at"),
        ({"expires_at": float("nan")}, "/expires_at"),
        ({"expires_at": float("inf")}, "/expires_at"),
        ({"expires_at": -1}, "/expires_at"),
    ],
)
async def test_a_wrong_field_is_refused_by_name(callers: Callers, fields: dict[str, Any], pointer: str) -> None:
    caller, _ = await service(callers)
    with pytest.raises(InvalidRequest) as added:
        await callers.add(**{"name": "x", "roles": [], "actor": "test", **fields})
    with pytest.raises(InvalidRequest) as updated:
        await callers.update(caller.id, fields, actor="test")
    assert added.value.errors[0].pointer == updated.value.errors[0].pointer == pointer
    assert len(await callers.page(limit=10)) == 1


async def test_unknown_fields_of_a_patch_are_refused_and_not_quoted(callers: Callers) -> None:
    caller, _ = await service(callers)
    with pytest.raises(InvalidRequest) as refused:
        await callers.update(caller.id, {"id": "clr_x", "CANARY": 1, "name": ""}, actor="test")
    assert [error.pointer for error in refused.value.errors] == ["", "/name"]
    assert "CANARY" not in str(refused.value.errors)


async def test_a_patch_changes_what_it_names_and_null_takes_the_expiry_away(callers: Callers) -> None:
    caller, key = await service(callers, expires_at=4e9)
    changed = await callers.update(caller.id, {"name": "new", "grants": []}, actor="test")
    assert (changed.name, changed.roles, changed.grants, changed.expires_at) == ("new", ["service"], [], 4e9)
    assert (await callers.update(caller.id, {"expires_at": None}, actor="test")).expires_at is None
    assert (await callers.get(caller.id)).name == "new"
    assert (await callers.identify(key)).grants == ()
    await callers.update(caller.id, {"expires_at": 5}, actor="test")
    assert await dies(callers, key)


async def test_an_expiry_is_a_time_in_text_or_in_seconds(callers: Callers) -> None:
    caller, _ = await service(callers, expires_at="2030-01-01T01:00:00.5+01:00")
    assert caller.expires_at == 1893456000.5
    key, _ = await callers.add_key(caller.id, actor="test", expires_at="2030-01-01t00:00:00z")
    assert key.expires_at == 1893456000.0


async def test_what_is_not_there_is_not_found(callers: Callers) -> None:
    caller, key = await service(callers)
    other, _ = await service(callers)
    for work in (
        callers.get("clr_\x00"),
        callers.get(key_id_of(key)),
        callers.revoke_key(caller.id, "\x00", actor="test"),
        callers.revoke_key(caller.id, caller.id, actor="test"),
        callers.get("clr_x"),
        callers.update("clr_x", {"name": "x"}, actor="test"),
        callers.delete("clr_x", actor="test"),
        callers.add_key("clr_x", actor="test"),
        callers.revoke_key(caller.id, "key_x", actor="test"),
        callers.revoke_key(other.id, key_id_of(key), actor="test"),
    ):
        with pytest.raises(NotFound):
            await work
    assert not await dies(callers, key)


async def test_lists_are_newest_first_and_go_on_after_the_last_one_seen(callers: Callers, database: Database) -> None:
    made = [(await service(callers, name=f"c{number}"))[0] for number in range(5)]
    await change_rows(
        database, sa.update(Caller).where(col(Caller.id).in_([made[1].id, made[2].id])).values(created_at=9.0)
    )
    expected = [made[4].id, made[3].id, made[0].id, *sorted([made[1].id, made[2].id], reverse=True)]
    seen: list[str] = []
    before = None
    while page := await callers.page(limit=2, before=before):
        seen += [caller.id for caller in page]
        before = (page[-1].created_at, page[-1].id)
    assert seen == expected


async def test_the_keys_of_callers_are_listed_dead_ones_too(callers: Callers) -> None:
    caller, first = await service(callers)
    second, _ = await callers.add_key(caller.id, actor="test", expires_at=4e9)
    await callers.revoke_key(caller.id, key_id_of(first), actor="test")
    keys = await callers.keys_of([caller.id, "clr_none"])
    assert [(key.id, key.revoked_at is None, key.expires_at) for key in keys[caller.id]] == [
        (second.id, True, 4e9),
        (key_id_of(first), False, None),
    ]
    assert keys["clr_none"] == []


async def test_a_caller_has_two_live_keys_at_most(callers: Callers) -> None:
    caller, first = await service(callers)
    _, second = await callers.add_key(caller.id, actor="test")
    assert not await dies(callers, first)
    assert not await dies(callers, second)
    with pytest.raises(Conflict):
        await callers.add_key(caller.id, actor="test")
    await callers.revoke_key(caller.id, key_id_of(first), actor="test")
    _, third = await callers.add_key(caller.id, actor="test")
    assert not await dies(callers, third)


async def test_an_expired_key_does_not_count_as_live(callers: Callers) -> None:
    caller, _ = await service(callers)
    await callers.add_key(caller.id, actor="test", expires_at=1)
    _, third = await callers.add_key(caller.id, actor="test")
    assert not await dies(callers, third)


async def both(one: Any, other: Any) -> list[type[object]]:
    outcomes = await asyncio.gather(one, other, return_exceptions=True)
    return sorted((type(outcome) for outcome in outcomes), key=str)


async def test_two_keys_added_at_once_do_not_make_three(callers: Callers, replica: Callers) -> None:
    caller, _ = await service(callers)
    added = await both(callers.add_key(caller.id, actor="a"), replica.add_key(caller.id, actor="b"))
    assert added == [Conflict, tuple]


async def test_a_key_revoked_twice_is_revoked_once(callers: Callers, database: Database) -> None:
    caller, key = await service(callers)
    await callers.revoke_key(caller.id, key_id_of(key), actor="test")
    first = (await callers.keys_of([caller.id]))[caller.id][0].revoked_at
    await callers.revoke_key(caller.id, key_id_of(key), actor="test")
    assert (await callers.keys_of([caller.id]))[caller.id][0].revoked_at == first
    assert [action for action, _, _ in await recorded(database)].count("caller.key_revoked") == 1


async def test_deleting_a_caller_deletes_its_keys(callers: Callers, database: Database) -> None:
    caller, _ = await service(callers)
    await callers.delete(caller.id, actor="test")
    assert await database.read(lambda session: session.exec(select(CallerKey)).all()) == []


# --- the last admin -------------------------------------------------------------------------------------------------------


async def test_the_last_admin_cannot_be_taken_away(callers: Callers, replica: Callers) -> None:
    await service(callers)
    root, key = await admin(callers)
    no_admin, dead = await admin(callers)
    await callers.revoke_key(no_admin.id, key_id_of(dead), actor="test")
    for work in (
        callers.delete(root.id, actor=root.id),
        callers.update(root.id, {"roles": ["service"]}, actor=root.id),
        callers.update(root.id, {"expires_at": 1}, actor=root.id),
        callers.revoke_key(root.id, key_id_of(key), actor=root.id),
    ):
        with pytest.raises(Conflict):
            await work
    assert (await replica.identify(key)).roles == {"admin"}


async def test_an_admin_can_go_while_another_stays(callers: Callers) -> None:
    first, _ = await admin(callers)
    _, key = await admin(callers)
    await callers.delete(first.id, actor="test")
    assert not await dies(callers, key)


async def test_a_last_admin_can_still_be_renamed_and_change_its_key(callers: Callers) -> None:
    root, old = await admin(callers)
    await callers.update(root.id, {"name": "boss", "roles": ["admin", "auditor"]}, actor=root.id)
    await callers.add_key(root.id, actor=root.id)
    await callers.revoke_key(root.id, key_id_of(old), actor=root.id)
    assert await dies(callers, old)


async def test_two_admins_that_remove_each_other_at_once_leave_one(callers: Callers, replica: Callers) -> None:
    (one, _), (other, _) = await admin(callers), await admin(callers)
    removed = await both(callers.delete(one.id, actor=other.id), replica.delete(other.id, actor=one.id))
    assert removed == [type(None), Conflict]
    assert len(await callers.page(limit=10)) == 1


async def test_the_key_from_the_settings_makes_the_first_admin_once(callers: Callers, replica: Callers) -> None:
    _, key = mint_key()
    assert await callers.ensure_admin(key)
    assert not await callers.ensure_admin(key)
    assert not await replica.ensure_admin(mint_key()[1])
    principal = await callers.identify(key)
    assert (principal.name, *principal.roles) == ("admin", "admin")
    assert len(await callers.page(limit=10)) == 1


async def test_two_replicas_that_start_at_once_make_one_admin(callers: Callers, replica: Callers) -> None:
    _, key = mint_key()
    made = await asyncio.gather(callers.ensure_admin(key), replica.ensure_admin(key))
    assert sorted(made) == [False, True]
    assert len(await callers.page(limit=10)) == 1


@pytest.mark.parametrize(
    "text", ["", "brk_CANARY", KEY[:-1], KEY + "\n", KEY.upper()], ids=["empty", "short", "cut", "newline", "upper"]
)
async def test_a_setting_that_is_no_whole_key_is_named_and_not_shown(callers: Callers, text: str) -> None:
    with pytest.raises(SettingsError, match="BROKER_ADMIN_KEY") as refused:
        await callers.ensure_admin(Secret(text))
    assert "CANARY" not in str(refused.value)
    assert "a" * 26 not in str(refused.value)
    assert await callers.page(limit=1) == []


async def test_a_dead_key_is_not_revived_by_the_settings(callers: Callers, database: Database, audit: Audit) -> None:
    _, key = await admin(callers)
    await resigned(database, audit, sa.update(Caller).values(expires_at=1.0))
    with pytest.raises(SettingsError, match="BROKER_ADMIN_KEY"):
        await callers.ensure_admin(key)
    assert await callers.ensure_admin(mint_key()[1])


# --- audit ----------------------------------------------------------------------------------------------------------------


async def recorded(database: Database) -> list[tuple[str, str, dict[str, Any]]]:
    query = select(AuditRecord).where(AuditRecord.action != TAKEN_OVER).order_by(col(AuditRecord.number))
    rows = await database.read(lambda session: session.exec(query).all())
    return [(row.action, row.actor, row.detail) for row in rows]


async def test_every_change_is_recorded_with_who_made_it_and_without_names_of_subjects(
    callers: Callers, database: Database
) -> None:
    caller, key = await callers.add("backend", ["service"], [{**READER, "tags": {"env": "PROD"}}], actor="clr_a")
    await callers.update(caller.id, {"grants": [READER], "expires_at": 4e9}, actor="clr_b")
    second, _ = await callers.add_key(caller.id, actor="clr_c")
    await callers.revoke_key(caller.id, key_id_of(key), actor="clr_d")
    await callers.delete(caller.id, actor="clr_e")
    records = await recorded(database)
    assert [(action, actor) for action, actor, _ in records] == [
        ("caller.created", "clr_a"),
        ("caller.updated", "clr_b"),
        ("caller.key_added", "clr_c"),
        ("caller.key_revoked", "clr_d"),
        ("caller.deleted", "clr_e"),
    ]
    assert all(detail["caller_id"] == caller.id for _, _, detail in records)
    assert records[2][2]["key_id"] == second.id
    grant = {"integrations": ["mail"], "may": ["read"], "mode": "enforce", "restricted_by": ["subjects"]}
    assert records[1][2]["grants"] == [grant]
    assert "acme" not in str(records)
    assert "PROD" not in str(records)


async def test_a_refused_change_leaves_no_record(callers: Callers, database: Database) -> None:
    root, _ = await admin(callers)
    with pytest.raises(Conflict):
        await callers.delete(root.id, actor="test")
    assert [action for action, _, _ in await recorded(database)] == ["caller.created"]


async def test_without_an_audit_record_nothing_is_changed(
    callers: Callers, replica: Callers, database: Database
) -> None:
    caller, key = await service(callers)
    await database.transaction(lambda session: session.execute(sa.text("UPDATE audit_head SET mac = 'forged'")))
    for work in (
        callers.add("more", ["admin"], actor="test"),
        callers.update(caller.id, {"roles": ["admin"]}, actor="test"),
        callers.add_key(caller.id, actor="test"),
        callers.ensure_admin(mint_key()[1]),
    ):
        with pytest.raises(AuditUnavailable):
            await work
    assert [one.roles for one in await callers.page(limit=10)] == [["service"]]
    assert len((await callers.keys_of([caller.id]))[caller.id]) == 1
    assert (await replica.identify(key)).roles == {"service"}
