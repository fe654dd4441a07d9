"""The fake provider refuses what a real one would, and says so: a check that cannot fail would prove nothing of a file."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx2
import pytest

from providers.spec import OAuth2, Provider, Variable
from tests.providers.behaviour import Answer, Behaviour, Call
from tests.providers.like import Like, challenge_of, playing

BACK = "http://127.0.0.1:1/callback"
VERIFIER = "v" * 43
TOKENS = {"access_token": "acc_{access}", "refresh_token": "ref_{refresh}", "expires_in": 60}
PROVIDER = Provider(
    name="strict",
    title="Strict",
    docs_url="https://docs.example.test/",
    oauth2=OAuth2(
        authorize_url="https://{shop}.example.test/authorize",
        token_url="https://{shop}.example.test/token",
        refresh_url="https://{shop}.example.test/refresh",
        revoke_url="https://{shop}.example.test/revoke",
        jwks_url="https://{shop}.example.test/keys",
        issuer="https://{shop}.example.test",
    ),
    hosts={"": "https://{shop}.example.test/api", "files": "https://files.example.test"},
    variables=(Variable("shop", "[a-z]{1,20}", "acme"),),
)
STRICT = Behaviour(
    provider="strict",
    sources=("https://docs.example.test/",),
    client_auth="client_secret_post",
    code_answer=TOKENS,
    refresh_answer=TOKENS,
    ends_access=True,
    asked_scopes=("one", "two"),
    authorize_needs={"offline": "yes"},
    exchange_needs={"expiring": "1"},
    token_headers={"Accept": "application/json"},
    given={"shop": "acme"},
    account_id="1",
    calls=(
        Call("GET", "https://{shop}.example.test/api/me?full=1", Answer(200, {"id": "1"}), headers={"X-Version": "2"}),
        Call(
            "POST",
            "https://{shop}.example.test/revoke",
            Answer(200),
            bearer=False,
            basic=True,
            needs={"token": "{refresh}"},
            kills=True,
        ),
    ),
)
FORM = {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"}


@dataclass(frozen=True)
class Visitor:
    """A client of the fake that does as it is told, right or wrong."""

    like: Like
    http: httpx2.AsyncClient

    def url(self, path: str) -> str:
        """Return the address of a path at the shop."""
        return f"{self.like.base}/acme.example.test{path}"

    async def asks(self, **changes: str | None) -> httpx2.Response:
        """Send an authorization request; None takes a parameter away."""
        right = {
            "response_type": "code",
            "client_id": "like-client",
            "redirect_uri": BACK,
            "state": "state",
            "scope": "one two",
            "offline": "yes",
            "code_challenge": challenge_of(VERIFIER),
            "code_challenge_method": "S256",
        }
        query = {name: value for name, value in {**right, **changes}.items() if value is not None}
        return await self.http.get(f"{self.url('/authorize')}?{urlencode(query)}")

    async def code(self) -> str:
        """Return a code."""
        answer = await self.asks()
        assert self.like.complaints == []
        return dict(parse_qsl(urlsplit(answer.headers["location"]).query))["code"]

    async def posts(
        self, path: str, right: dict[str, str], headers: dict[str, str] | None = None, **changes: str | None
    ) -> Any:
        """Post to the token endpoint; None takes a member away."""
        proof = {"client_id": "like-client", "client_secret": "like-secret-1"}
        form = {name: value for name, value in {**right, **proof, **changes}.items() if value is not None}
        sent = {**FORM, **(headers or {})}
        return await self.http.post(self.url(path), content=urlencode(form), headers=sent)

    async def exchanges(self, *, path: str = "/token", headers: dict[str, str] | None = None, **changes: Any) -> Any:
        """Exchange a fresh code."""
        right = {
            "grant_type": "authorization_code",
            "code": await self.code(),
            "redirect_uri": BACK,
            "code_verifier": VERIFIER,
            "expiring": "1",
        }
        return await self.posts(path, right, headers, **changes)

    async def refreshes(self, *, path: str = "/refresh", token: str | None = None, **changes: Any) -> Any:
        """Refresh with the newest token, or another."""
        (newest,) = self.like.newest["refresh"]
        return await self.posts(path, {"grant_type": "refresh_token", "refresh_token": token or newest}, **changes)


@asynccontextmanager
async def visiting(behaviour: Behaviour = STRICT) -> AsyncIterator[Visitor]:
    """Play a behaviour, with a client at hand."""
    async with playing(behaviour, PROVIDER, BACK) as like, httpx2.AsyncClient(trust_env=False) as http:
        yield Visitor(like, http)


def only_complaint(visitor: Visitor) -> str:
    """Return the one thing that was wrong."""
    (complaint,) = visitor.like.complaints
    assert complaint.startswith("strict: ")
    return complaint


async def test_who_does_everything_right_hears_no_complaint_and_gets_fresh_tokens_each_time() -> None:
    async with visiting() as visitor:
        first = (await visitor.exchanges()).json()
        assert first["access_token"].startswith("acc_")
        second = (await visitor.refreshes()).json()
        assert not {first["access_token"], first["refresh_token"]} & {second["access_token"], second["refresh_token"]}
        assert visitor.like.live == {second["access_token"], second["refresh_token"]}
        assert visitor.like.counts == {"authorize": 1, "exchange": 1, "refresh": 1}
        assert visitor.like.complaints == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"response_type": "token"}, "response_type=code"),
        ({"client_id": "another"}, "client_id=like-client"),
        ({"redirect_uri": f"{BACK}/more"}, "redirect_uri="),
        ({"scope": "one,two"}, "scope=one two"),
        ({"scope": None}, "scope=one two"),
        ({"offline": None}, "offline=yes"),
        ({"state": None}, "has no state"),
        ({"code_challenge": None}, "lacks PKCE"),
        ({"code_challenge_method": "plain"}, "lacks PKCE"),
        ({"hint": "like-secret-1"}, "a secret stands in the URL"),
    ],
)
async def test_a_wrong_authorization_request_is_complained_of(changes: dict[str, Any], sentence: str) -> None:
    async with visiting() as visitor:
        assert (await visitor.asks(**changes)).status_code == 400
        assert sentence in only_complaint(visitor)


async def test_a_parameter_that_comes_twice_and_a_post_are_complained_of() -> None:
    async with visiting() as visitor:
        await visitor.http.get(f"{visitor.url('/authorize')}?state=a&state=b")
        await visitor.http.post(visitor.url("/authorize"))
        assert "comes twice" in visitor.like.complaints[0]
        assert "no GET" in visitor.like.complaints[1]


async def test_what_a_provider_does_not_take_may_not_be_sent() -> None:
    refusing = replace(STRICT, pkce="refused", scope_param="", asked_scopes=())
    async with visiting(refusing) as visitor:
        await visitor.asks(scope=None)
        assert "has PKCE" in visitor.like.complaints[0]
        without = {"code_challenge": None, "code_challenge_method": None}
        await visitor.asks(**without)
        assert "does not take there" in visitor.like.complaints[1]
        came = await visitor.asks(scope=None, **without)
        code = dict(parse_qsl(urlsplit(came.headers["location"]).query))["code"]
        await visitor.posts(
            "/token",
            {"grant_type": "authorization_code", "code": code, "redirect_uri": BACK, "expiring": "1"},
            code_verifier=VERIFIER,
        )
        assert "PKCE verifier, which" in visitor.like.complaints[2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"code": "another"}, "the code is unknown"),
        ({"redirect_uri": None}, "another redirect_uri"),
        ({"code_verifier": "w" * 43}, "does not fit"),
        ({"code_verifier": None}, "does not fit"),
        ({"expiring": None}, "must have expiring=1"),
        ({"surplus": "1"}, "must have surplus=None"),
        ({"grant_type": "password"}, "is unknown"),
        ({"client_secret": None}, "by client_secret_post, once"),
        ({"client_id": "another"}, "the client id is another"),
        ({"headers": {"Authorization": "Basic " + base64.b64encode(b"like-client:x").decode()}}, "once"),
        ({"headers": {"Accept": "text/plain"}}, "lacks the header Accept"),
        ({"headers": {"Content-Type": "application/json"}}, "has to be"),
        ({"path": "/token?a=b"}, "has a query"),
        ({"path": "/refresh"}, "goes to another address"),
        ({"path": "/elsewhere"}, "there is nothing at POST"),
    ],
)
async def test_a_wrong_exchange_is_complained_of(changes: dict[str, Any], sentence: str) -> None:
    async with visiting() as visitor:
        answer = await visitor.exchanges(**changes)
        assert answer.status_code >= 400
        assert visitor.like.live == set()
    if "Content-Type" in changes.get("headers", {}):
        assert "has to be application/x-www-form-urlencoded" in visitor.like.complaints[0]
    assert sentence in only_complaint(visitor)


async def test_a_code_and_a_rotated_token_are_good_once_only_and_a_made_up_one_never() -> None:
    async with visiting() as visitor:
        code = await visitor.code()
        right = {"grant_type": "authorization_code", "code": code, "redirect_uri": BACK, "expiring": "1"}
        for _ in range(2):
            await visitor.posts("/token", right, code_verifier=VERIFIER)
        assert "used before" in visitor.like.complaints[0]
        (used,) = visitor.like.newest["refresh"]
        await visitor.refreshes()
        await visitor.refreshes(token=used)
        await visitor.refreshes(token="ref_made_up")
        await visitor.refreshes(path="/token")
        await visitor.refreshes(scope="one")
        sentences = ("used before", "never given out", "goes to another address", "must have scope=None")
        found = [sentence in said for sentence, said in zip(sentences, visitor.like.complaints[1:], strict=True)]
        assert found == [True] * 4


async def test_a_redirect_uri_is_repeated_where_the_provider_wants_it() -> None:
    async with visiting(replace(STRICT, refresh_repeats_redirect_uri=True)) as visitor:
        await visitor.exchanges()
        await visitor.refreshes()
        assert "the refresh must have redirect_uri=" in only_complaint(visitor)
        assert (await visitor.refreshes(redirect_uri=BACK)).status_code == 200


async def test_busy_dead_and_a_wrong_secret_are_answers_and_no_complaints() -> None:
    async with visiting() as visitor:
        await visitor.exchanges()
        visitor.like.busy = True
        busy = await visitor.refreshes()
        visitor.like.busy = False
        wrong = await visitor.refreshes(client_secret="another")
        visitor.like.end_grant()
        dead = await visitor.refreshes()
        assert [answer.status_code for answer in (busy, wrong, dead)] == [429, 401, 400]
        assert busy.headers["retry-after"] == "7"
        assert visitor.like.complaints == []
        assert visitor.like.counts == {
            "authorize": 1,
            "exchange": 1,
            "busy": 1,
            "client refused": 1,
            "dead": 1,
        }


async def test_a_refresh_token_that_does_not_rotate_stays_the_same() -> None:
    async with visiting(replace(STRICT, rotates=False, ends_access=False)) as visitor:
        first = (await visitor.exchanges()).json()
        second = (await visitor.refreshes()).json()
        assert first["refresh_token"] == second["refresh_token"]
        assert {first["access_token"], second["access_token"]} < visitor.like.live


@pytest.mark.parametrize(
    ("method", "path", "changes", "sentence"),
    [
        ("POST", "/api/me?full=1", {}, "has to be a GET"),
        ("GET", "/api/me", {}, "another query"),
        ("GET", "/api/me?full=1", {"Authorization": "Bearer dead"}, "no live bearer"),
        ("GET", "/api/me?full=1", {"X-Version": "1"}, "lacks the header x-version"),
        ("GET", "/api/you", {}, "there is nothing"),
    ],
)
async def test_a_wrong_api_call_is_complained_of(
    method: str, path: str, changes: dict[str, str], sentence: str
) -> None:
    async with visiting() as visitor:
        access = (await visitor.exchanges()).json()["access_token"]
        headers = {"Authorization": f"Bearer {access}", "X-Version": "2", **changes}
        assert (await visitor.http.request(method, visitor.url(path), headers=headers)).status_code >= 400
        assert sentence in only_complaint(visitor)
        right = {"Authorization": f"Bearer {access}", "X-Version": "2"}
        assert (await visitor.http.get(visitor.url("/api/me?full=1"), headers=right)).json() == {"id": "1"}


async def test_a_revocation_takes_the_right_token_from_the_right_client_and_ends_the_grant() -> None:
    async with visiting() as visitor:
        tokens = (await visitor.exchanges()).json()
        proofs = [base64.b64encode(f"like-client:{secret}".encode()).decode() for secret in ("x", "like-secret-1")]
        wrong, right = ({**FORM, "Authorization": f"Basic {proof}"} for proof in proofs)
        for headers, token in ((wrong, tokens["refresh_token"]), (right, tokens["access_token"])):
            await visitor.http.post(visitor.url("/revoke"), content=urlencode({"token": token}), headers=headers)
        assert "Basic credentials" in visitor.like.complaints[0]
        assert "lacks the member token" in visitor.like.complaints[1]
        assert visitor.like.live
        body = urlencode({"token": tokens["refresh_token"]})
        assert (await visitor.http.post(visitor.url("/revoke"), content=body, headers=right)).status_code == 200
        assert (visitor.like.live, visitor.like.counts["kill"]) == (set(), 1)


async def test_bodies_are_json_where_the_provider_takes_json_and_clients_prove_themselves_by_basic() -> None:
    plain = replace(STRICT, token_format="json", client_auth="client_secret_basic", pkce="ignored", exchange_needs={})
    async with visiting(plain) as visitor:
        proof = base64.b64encode(b"like-client:like-secret-1").decode()
        headers = {"Accept": "application/json", "Authorization": f"Basic {proof}"}
        body = {"grant_type": "authorization_code", "code": await visitor.code(), "redirect_uri": BACK}
        answer = await visitor.http.post(visitor.url("/token"), json=body, headers=headers)
        assert answer.status_code == 200, visitor.like.complaints
        await visitor.http.post(visitor.url("/token"), json={**body, "client_id": "like-client"}, headers=headers)
        assert "by client_secret_basic, once" in only_complaint(visitor)


async def test_a_client_goes_by_the_name_that_the_provider_has_for_its_id() -> None:
    async with visiting(replace(STRICT, client_id_param="client_key")) as visitor:
        await visitor.asks()
        assert "must have client_key=like-client" in visitor.like.complaints.pop()
        await visitor.asks(client_key="like-client")
        assert "has a client_id" in only_complaint(visitor)
        visitor.like.complaints.clear()
        came = await visitor.asks(client_key="like-client", client_id=None)
        code = dict(parse_qsl(urlsplit(came.headers["location"]).query))["code"]
        exchange = {"grant_type": "authorization_code", "code": code, "redirect_uri": BACK, "expiring": "1"}
        await visitor.posts("/token", exchange, code_verifier=VERIFIER)
        assert "by client_secret_post, once" in only_complaint(visitor)


async def test_a_public_client_names_itself_and_has_no_secret() -> None:
    async with visiting(replace(STRICT, client_auth="none")) as visitor:
        assert (await visitor.exchanges(client_secret=None)).status_code == 200
        await visitor.exchanges()
        assert "by none, once" in only_complaint(visitor)


async def test_a_signed_callback_is_signed_over_its_sorted_query() -> None:
    signing = replace(STRICT, signs_callback=True, callback={"shop": "acme.example.test", "iss": "https://x.test"})
    async with visiting(signing) as visitor:
        came = dict(parse_qsl(urlsplit((await visitor.asks()).headers["location"]).query))
        said = came.pop("hmac")
        text = "&".join(f"{name}={came[name]}" for name in sorted(came))
        assert said == hmac.new(b"like-secret-1", text.encode(), hashlib.sha256).hexdigest()
        assert came["iss"] == f"{visitor.like.base}/x.test"


async def test_every_address_of_a_file_is_moved_with_its_variables_in_place() -> None:
    async with visiting() as visitor:
        config, base = visitor.like.config(), visitor.like.base
        assert config["token_url"] == f"{base}/{{shop}}.example.test/token"
        assert config["api_base_url"] == f"{base}/{{shop}}.example.test/api"
        assert config["hosts"] == {"files": f"{base}/files.example.test"}
        assert config["issuer"] == f"{base}/{{shop}}.example.test"
        keys = (await visitor.http.get(visitor.url("/keys"))).json()["keys"]
        assert [{"n", "e"} <= key.keys() and not {"d", "p", "q"} & key.keys() for key in keys] == [True]
