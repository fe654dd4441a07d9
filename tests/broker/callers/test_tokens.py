"""Tokens of a trusted issuer: what is accepted, the many forgeries that are not, and how its keys are fetched."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from joserfc import jws
from joserfc.jwk import ECKey, OKPKey, RSAKey
from sqlmodel import select

from broker.audit import Audit
from broker.callers import Callers
from broker.callers.issuers import published_keys
from broker.callers.signatures import REGISTRY
from broker.callers.trust import Trust, load_trust
from broker.database import Database, SqliteDatabase, open_database
from broker.egress import Egress
from broker.errors import InvalidRequest, Overloaded, Unauthenticated
from broker.models import AuditRecord
from broker.policy import Principal
from broker.settings import Settings, load_settings
from providers.spec import Secret
from tests.broker.callers.made import made_callers
from tests.fakes import Fake, Seen, listening

NOW = 1_800_000_000.0
SUBJECT = "system:serviceaccount:mail:sender"
RULE: dict[str, Any] = {
    "name": "sender",
    "subject": "system:serviceaccount:mail:(sender|other)",
    "grants": [{"integrations": ["crm"], "may": ["token"]}],
}
RSA = RSAKey.generate_key(2048, {"kid": "r1"})
EC = ECKey.generate_key("P-256", {"kid": "e1"})
OKP = OKPKey.generate_key("Ed25519", {"kid": "o1"})
STRANGER = RSAKey.generate_key(2048, {"kid": "r1"})
WEAK = RSAKey.generate_key(2048, {"kid": "w1"})


def public(*keys: Any) -> dict[str, Any]:
    return {"keys": [key.as_dict(private=False) for key in keys]}


@dataclass
class Clock:
    """A clock that stands still until it is moved."""

    seconds: float = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.seconds


@dataclass
class Issuer:
    """A server that publishes keys; a test says how it answers."""

    fake: Fake
    document: Any = field(default_factory=lambda: public(RSA, EC, OKP))
    status: int = 200
    gate: asyncio.Event | None = None

    @property
    def url(self) -> str:
        """The issuer."""
        return self.fake.base

    @property
    def fetches(self) -> int:
        """How often keys were asked for."""
        return sum(seen.path == "/keys" for seen in self.fake.seen)


@dataclass
class World:
    """A broker that trusts one issuer."""

    issuer: Issuer
    callers: Callers
    clock: Clock
    wall: Clock
    database: Database

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Return good claims, changed; None leaves one out."""
        at = int(self.wall())
        good = {"iss": self.issuer.url, "aud": ["broker"], "sub": SUBJECT, "iat": at, "exp": at + 600}
        return {name: value for name, value in {**good, **changes}.items() if value is not None}

    def token(self, key: Any = RSA, alg: str = "RS256", header: Mapping[str, Any] | None = None, **changes: Any) -> str:
        """Return a signed token."""
        head = {"alg": alg, "kid": key.kid, **(header or {})}
        return jws.serialize_compact(
            {name: value for name, value in head.items() if value is not None},
            json.dumps(self.claims(**changes)).encode(),
            key,
            registry=REGISTRY,
        )

    async def who(self, token: str) -> Principal:
        """Call with a token."""
        return await self.callers.authenticate([(b"authorization", f"Bearer {token}".encode())])

    async def is_refused(self, token: str) -> bool:
        """Whether a token gets the one answer for everything that is wrong."""
        try:
            await self.who(token)
        except Unauthenticated as refused:
            return (refused.detail, refused.headers) == (Unauthenticated().detail, Unauthenticated().headers)
        return False


def trust_in(folder: Path, issuer: str, **changes: Any) -> tuple[Settings, Trust]:
    entry = {"issuer": issuer, "audience": "broker", "jwks_url": f"{issuer}/keys", "rules": [RULE], **changes}
    entry = {name: value for name, value in entry.items() if value is not None}
    (folder / "issuers.json").write_text(json.dumps({"issuers": [entry]}), encoding="utf-8")
    given = {"env": "development", "data_dir": folder, "trusted_issuers_file": folder / "issuers.json"}
    settings = load_settings({}, directory=folder, **given)
    return settings, load_trust(settings)


@asynccontextmanager
async def opened_world(folder: Path, database: Database, **changes: Any) -> AsyncIterator[World]:
    issuers: list[Issuer] = []

    def answer(seen: Seen) -> tuple[int, Any]:
        (issuer,) = issuers
        if seen.path == "/.well-known/openid-configuration":
            return 200, {"issuer": issuer.url + issuer_suffix, "jwks_uri": f"{issuer.url}/keys"}
        return issuer.status, issuer.document

    issuer_suffix = changes.pop("metadata_suffix", "")
    audit = Audit(database, bytes(32), sinks=("database",), checkpoints=())
    async with listening(answer) as fake:
        issuers.append(Issuer(fake))
        settings, trust = trust_in(folder, fake.base, **changes)
        egress, clock, wall = Egress(settings), Clock(), Clock(NOW)
        callers = await made_callers(
            database, audit, clock=clock, wall_clock=wall, trust=trust, egress_of=lambda _: egress
        )
        yield World(issuers[0], callers, clock, wall, database)
        await callers.aclose()
        await egress.aclose()
    await audit.aclose()


@pytest.fixture
async def own_database(sqlite_url: str) -> AsyncIterator[SqliteDatabase]:
    """Give a fresh database; which one it is makes no difference here."""
    made = open_database(sqlite_url)
    assert isinstance(made, SqliteDatabase)
    yield made
    await made.aclose()


@pytest.fixture
async def world(tmp_path: Path, own_database: SqliteDatabase) -> AsyncIterator[World]:
    """Give a broker that trusts one issuer."""
    async with opened_world(tmp_path, own_database) as made:
        yield made


# --- what is accepted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "alg"), [(RSA, "RS256"), (RSA, "PS256"), (RSA, "RS512"), (EC, "ES256"), (OKP, "EdDSA"), (OKP, "Ed25519")]
)
async def test_a_token_of_the_issuer_stands_for_the_caller_of_its_rule(world: World, key: Any, alg: str) -> None:
    principal = await world.who(world.token(key, alg, {"typ": "JWT"}))
    assert (principal.name, *principal.roles) == ("sender", "service")
    assert [grant.may for grant in principal.grants] == [("token",)]
    assert principal == await world.who(world.token(exp=int(NOW) + 60))
    assert principal != await world.who(world.token(sub=SUBJECT.replace("sender", "other")))


async def test_who_stands_behind_the_id_is_recorded_once(world: World) -> None:
    token = world.token()
    principals = await asyncio.gather(*(world.who(token) for _ in range(5)))
    world.clock.seconds += 61
    principals.append(await world.who(token))
    rows = await world.database.read(
        lambda session: session.exec(select(AuditRecord).where(AuditRecord.action == "caller.token_accepted")).all()
    )
    assert [(row.actor, row.subject) for row in rows] == [(principals[0].caller_id, SUBJECT)]
    assert rows[0].detail["issuer"] == world.issuer.url
    assert token not in str(rows[0].detail)
    assert world.issuer.fetches == 1


async def test_a_token_is_looked_at_again_within_a_minute_and_never_after_its_end(world: World) -> None:
    token = world.token(exp=int(NOW) + 30)
    await world.who(token)
    world.wall.seconds += 91
    world.clock.seconds += 29
    assert await world.who(token)  # remembered
    world.clock.seconds += 1
    assert await world.is_refused(token)


async def test_times_may_differ_by_a_minute_and_no_more(world: World) -> None:
    at = int(NOW)
    for good in ({"iat": at + 59, "exp": at + 600}, {"nbf": at + 59}, {"exp": at - 59}, {"iat": None}):
        assert await world.who(world.token(**good))
    for bad in (
        {"iat": at + 62, "exp": at + 600},
        {"nbf": at + 62},
        {"exp": at - 60},
        {"exp": None},
        {"exp": str(at + 600)},
        {"exp": True},
        {"exp": float("1e300")},
        {"iat": at - 10, "exp": at + 86_400},
        {"iat": None, "exp": at + 86_401},
        {"iat": "now"},
    ):
        assert await world.is_refused(world.token(**bad)), bad


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "http://127.0.0.1:1"},
        {"aud": "other"},
        {"aud": []},
        {"aud": None},
        {"aud": ["broker2"]},
        {"aud": "broker "},
        {"aud": {"broker": 1}},
        {"sub": None},
        {"sub": ""},
        {"sub": SUBJECT + "\n"},
        {"sub": SUBJECT + "x"},
        {"sub": [SUBJECT]},
        {"sub": "x" * 300},
    ],
)
async def test_claims_have_to_fit_exactly(world: World, changes: dict[str, Any]) -> None:
    assert await world.is_refused(world.token(**changes))


async def test_an_issuer_with_another_slash_is_another_issuer(world: World) -> None:
    for issuer in (world.issuer.url + "/", world.issuer.url.upper(), world.issuer.url + "#", " " + world.issuer.url):
        assert await world.is_refused(world.token(iss=issuer))
    assert world.issuer.fetches == 0


# --- forgeries ------------------------------------------------------------------------------------------------------------


def encoded(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def forged(header: Any, claims: Any, sign: Callable[[bytes], bytes] = lambda _: b"x") -> str:
    body = f"{encoded(header)}.{encoded(claims)}"
    return f"{body}.{encoded(sign(body.encode()))}"


def _hmac(secret: bytes, body: bytes) -> bytes:
    return hmac.digest(secret, body, hashlib.sha256)


async def test_no_algorithm_and_shared_secrets_are_refused(world: World) -> None:
    pem = RSA.as_pem(private=False)
    der = RSA.raw_value.public_key().public_bytes(  # type: ignore[union-attr]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    claims = world.claims()
    for alg in ("none", "None", "NONE", "", None, 1, ["RS256"], "HS256", "rs256", "ES256K", "dir"):
        assert await world.is_refused(forged({"alg": alg, "kid": "r1"}, claims)), alg
    for secret in (pem, pem.strip(), der, json.dumps(RSA.as_dict(private=False)).encode()):
        sign = functools.partial(_hmac, secret)
        assert await world.is_refused(forged({"alg": "HS256", "kid": "r1"}, claims, sign))
    assert await world.is_refused(f"{encoded({'alg': 'none'})}.{encoded(claims)}.")


async def test_a_key_of_another_kind_or_of_a_stranger_does_not_fit(world: World) -> None:
    assert await world.is_refused(world.token(STRANGER))
    assert await world.is_refused(world.token(EC, "ES256", {"kid": "r1"}))
    assert await world.is_refused(world.token(OKP, "EdDSA", {"kid": "e1"}))
    assert await world.who(world.token())


@pytest.mark.parametrize(
    "header",
    [
        {"jwk": STRANGER.as_dict(private=False)},
        {"jku": "http://127.0.0.1:1/keys"},
        {"x5u": "http://127.0.0.1:1/keys"},
        {"x5c": ["MIIB"]},
        {"crit": ["exp"], "exp": 1},
        {"b64": False, "crit": ["b64"]},
        {"typ": "logout+jwt"},
        {"typ": "dpop+jwt"},
        {"typ": 1},
        {"kid": ""},
        {"kid": 1},
        {"kid": ["r1"]},
        {"kid": "../../dev/null"},
        {"kid": "r1' OR '1'='1"},
        {"kid": None},
    ],
)
async def test_what_a_token_says_of_its_own_key_is_not_believed(world: World, header: dict[str, Any]) -> None:
    good = {"alg": "RS256", "kid": "r1"}
    from cryptography.hazmat.primitives.asymmetric import padding  # noqa: PLC0415 - beside its use
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415

    def sign(body: bytes) -> bytes:
        return RSA.raw_value.sign(body, padding.PKCS1v15(), SHA256())  # type: ignore[union-attr]

    assert await world.who(forged(good, world.claims(), sign))  # the same way of signing is fine without the header
    head = {name: value for name, value in {**good, **header}.items() if value is not None}
    assert not await world.is_refused(forged(good, world.claims(jti="2"), sign))
    if header == {"kid": None}:
        world.issuer.document = public(RSA, WEAK)  # two that could be meant
        world.clock.seconds += 301
        await world.callers.tokens.issuers._keys[world.issuer.url].get(unknown=True)
    assert await world.is_refused(forged(head, world.claims(), sign))


async def test_a_member_named_twice_is_refused(world: World) -> None:
    def sign(body: bytes) -> bytes:
        return b"x"

    claims = json.dumps(world.claims())
    twice = claims.replace('"sub"', '"sub": "admin", "sub"').encode()
    assert await world.is_refused(forged({"alg": "RS256", "kid": "r1"}, twice, sign))
    head = b'{"alg": "none", "alg": "RS256", "kid": "r1"}'
    assert await world.is_refused(forged(head, world.claims(), sign))


async def test_malformed_and_huge_tokens_are_refused_and_nothing_is_fetched_for_them(world: World) -> None:
    good = world.token()
    head, body, signature = good.split(".")
    for text in (
        "eyJ",
        "eyJ..",
        f"{head}.{body}",
        f"{head}.{body}.{signature}.x",
        f"{head}.{body}.",
        f"{head}..{signature}",
        f"{head}.{body}.{signature}=",
        f"{head}.{body}.{signature}é",
        f"{head} .{body}.{signature}",
        world.token(padding="x" * 17_000),
        forged({"alg": "RS256", "kid": "r1"}, b"[" * 5000),
        forged({"alg": "RS256", "kid": "r1"}, b"\xff\xfe"),
        forged({"alg": "RS256", "kid": "r1"}, b'{"iss": NaN}'),
    ):
        assert await world.is_refused(text)
    assert await world.is_refused(world.token(exp=int(NOW) - 3600))
    assert world.issuer.fetches <= 1


async def test_every_changed_byte_of_a_token_is_refused(world: World) -> None:
    good = world.token(EC, "ES256")
    for place in range(0, len(good), 7):
        changed = good[:place] + ("A" if good[place] != "A" else "B") + good[place + 1 :]
        assert await world.is_refused(changed), place


async def test_a_vendors_own_token_beside_a_key_is_none_of_ours_but_one_of_ours_is(world: World) -> None:
    _, key = await world.callers.add("x", ["service"], [RULE["grants"][0]], actor="test")
    bearer, vendors = (b"x-api-key", key.reveal().encode()), world.token(iss="https://vendor.test")
    found = await world.callers.authenticate([bearer, (b"authorization", f"Bearer {vendors}".encode())])
    assert found.name == "x"
    with pytest.raises(InvalidRequest):
        await world.callers.authenticate([bearer, (b"authorization", f"Bearer {world.token()}".encode())])


# --- the issuer's keys ----------------------------------------------------------------------------------------------------


async def test_a_new_key_is_fetched_when_a_token_names_it_and_not_more_often_than_each_half_minute(
    world: World,
) -> None:
    await world.who(world.token())
    assert await world.is_refused(world.token(WEAK))
    world.issuer.document = public(RSA, WEAK)
    world.clock.seconds += 29
    assert await world.is_refused(world.token(WEAK))
    assert world.issuer.fetches == 1
    world.clock.seconds += 1
    assert await world.who(world.token(WEAK))
    assert world.issuer.fetches == 2


async def test_a_key_that_is_gone_is_believed_for_a_bounded_time(world: World) -> None:
    await world.who(world.token())
    world.issuer.document = public(WEAK)
    world.clock.seconds += 301
    await world.who(world.token(jti="1"))  # served at once, while new keys are fetched behind it
    await world.callers.tokens.issuers._keys[world.issuer.url].get(unknown=True)
    assert await world.is_refused(world.token(jti="2"))


async def test_many_at_once_make_one_fetch(world: World) -> None:
    await asyncio.gather(*(world.who(world.token(jti=str(number))) for number in range(20)))
    assert world.issuer.fetches == 1


async def test_while_the_issuer_is_down_its_keys_serve_for_hours_and_no_longer(world: World) -> None:
    await world.who(world.token())
    world.issuer.status = 500
    world.clock.seconds += 5 * 3600
    assert await world.who(world.token(jti="1"))
    world.clock.seconds += 3601
    with pytest.raises(Overloaded):
        await world.who(world.token(jti="2"))
    world.issuer.status = 200
    world.clock.seconds += 31
    assert await world.who(world.token(jti="3"))


async def test_without_any_keys_a_caller_is_told_to_come_again(world: World) -> None:
    world.issuer.status = 503
    with pytest.raises(Overloaded) as refused:
        await world.who(world.token())
    assert refused.value.headers["Retry-After"] == "5"
    tried = world.issuer.fetches
    with pytest.raises(Overloaded):
        await world.who(world.token())
    assert world.issuer.fetches == tried  # not at once again


@pytest.mark.parametrize(
    "document",
    [
        {},
        [],
        {"keys": []},
        {"keys": "x"},
        {"keys": [1]},
        {"keys": [{"kty": "RSA"}] * 101},
        {"keys": [{"kty": "RSA", "n": "x" * 300_000}]},
        b"not json",
    ],
)
async def test_what_is_no_key_set_or_too_large_is_not_kept(world: World, document: Any) -> None:
    world.issuer.document = document
    with pytest.raises(Overloaded):
        await world.who(world.token())


@pytest.mark.parametrize(
    "changes",
    [{"use": "enc"}, {"key_ops": ["sign"]}, {"alg": "RS512"}, {"n": "AQAB"}, {"n": 5}, {"e": None}, {"kty": "oct"}],
)
async def test_a_key_that_is_for_something_else_does_not_verify(world: World, changes: dict[str, Any]) -> None:
    world.issuer.document = {"keys": [{**RSA.as_dict(private=False), **changes}]}
    assert await world.is_refused(world.token())


async def test_keys_may_be_found_by_discovery_or_lie_in_a_file(tmp_path: Path, own_database: SqliteDatabase) -> None:
    async with opened_world(tmp_path, own_database, jwks_url=None) as found:
        assert await found.who(found.token())
    (tmp_path / "keys.json").write_text(json.dumps(public(EC)), encoding="utf-8")
    async with opened_world(tmp_path, own_database, jwks_url=None, jwks_file="keys.json") as held:
        assert await held.who(held.token(EC, "ES256"))
        assert await held.is_refused(held.token())
        assert held.issuer.fake.seen == []


async def test_metadata_of_another_issuer_are_not_followed(tmp_path: Path, own_database: SqliteDatabase) -> None:
    async with opened_world(tmp_path, own_database, jwks_url=None, metadata_suffix="/") as world:
        with pytest.raises(Overloaded):
            await world.who(world.token())
        assert world.issuer.fetches == 0


def test_a_key_set_has_keys_and_not_too_many() -> None:
    assert len(published_keys({"keys": [{}] * 100, "more": 1})) == 100
    with pytest.raises(ValueError, match="not a key set"):
        published_keys({"keys": [{}] * 101})


async def test_a_key_of_ours_is_not_taken_for_a_token(world: World) -> None:
    with pytest.raises(Unauthenticated):
        await world.callers.identify(Secret("brk_" + "a" * 76))
