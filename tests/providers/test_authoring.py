"""What helps to write a provider's file: the skeleton is valid as it stands, and a careless function is found out."""

from __future__ import annotations

import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import providers
from providers import collect, load_catalog, problems
from providers.authoring import check, check_all, is_tool, names, skeleton, trials, write_skeleton
from providers.spec import (
    Account,
    ApiKey,
    Call,
    Credential,
    Dialogue,
    Incoming,
    Material,
    Outgoing,
    Proof,
    Provider,
    Received,
    Revocation,
    Secret,
    Signed,
    Signer,
    SourceKeys,
    Variable,
    Webhook,
    WebhookRefused,
)
from providers.verifying import hmac_signature


def begun(name: str = "acme") -> Provider:
    """Return the provider that a fresh skeleton defines."""
    held: dict[str, Any] = {}
    exec(compile(skeleton(name), name, "exec"), held)  # noqa: S102 - the file as it would be imported
    return collect({name: held})[name]


def test_a_fresh_skeleton_is_a_provider_without_problems() -> None:
    provider = begun("acme_corp")
    assert (provider.name, provider.title, provider.env_prefix) == ("acme_corp", "Acme Corp", "ACME_CORP")
    assert [*problems(provider), *trials(provider)] == []


@pytest.mark.parametrize("command", [("check",), ("format", "--check")])
def test_a_fresh_skeleton_passes_the_linter(command: tuple[str, ...]) -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    assert ruff is not None
    called = [ruff, *command, "--no-cache", "--stdin-filename", "providers/acme.py", "-"]
    done = subprocess.run(called, input=skeleton("acme"), capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["", "Acme", "a-b", "a/b", "../x", "1st", "a" * 64])
def test_what_cannot_be_a_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a-z"):
        skeleton(name)


def test_the_files_of_providers_are_those_of_the_catalog_and_the_rest_are_tools() -> None:
    beside = {found.name for found in pkgutil.iter_modules(providers.__path__)}
    assert names() == sorted(load_catalog())
    assert {name for name in beside if is_tool(name)} == beside - load_catalog().keys()


def test_a_type_that_is_not_served_at_a_host_is_not_tried_there() -> None:
    provider = replace(begun(), hosts={"": "https://api.example.test", "files": "https://files.example.test"})
    assert list(trials(replace(provider, signers={"oauth2@files": None}))) == []


@pytest.mark.parametrize("name", ["spec", "authoring", "webhook_keys", "sigv4"])
def test_the_name_of_a_tool_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="taken"):
        skeleton(name)


def test_a_file_is_never_overwritten() -> None:
    file = Path(providers.__file__).parent / "oidc.py"
    before = file.read_text()
    with pytest.raises(FileExistsError):
        write_skeleton("oidc")
    assert file.read_text() == before


def test_the_catalog_passes_its_own_check() -> None:
    assert set(load_catalog()) <= set(names())
    assert check_all() == []
    assert [problem for name in names() for problem in check(name)] == []
    with pytest.raises(KeyError):
        check("spec")


# --- careless functions


def asking(url: str, value: object, *, times: int = 1) -> Callable[[Credential], Generator[Outgoing, Incoming, Any]]:
    """Return a function for a slot that asks ``url`` and then returns ``value`` whatever the answer."""

    def function(_credential: Credential) -> Generator[Outgoing, Incoming, Any]:
        for _ in range(times):
            yield Outgoing("GET", url)
        return value

    return function


def raising(credential: Credential) -> Dialogue[Any]:
    """Trust the answer."""
    answer = yield Outgoing("GET", f"{credential.hosts['']}/me")
    return answer.json()["user"]["id"]


def leaking(credential: Credential) -> Dialogue[Account]:
    """Put the token into the address."""
    token = credential.access_token.reveal() if credential.access_token else ""
    yield Outgoing("GET", f"{credential.hosts['']}/me?token={token}")
    return Account("1")


HERE = "https://api.example.test/me"
CARELESS_IDENTIFY = {
    "asks a server": asking("https://elsewhere.test/me", Account("1")),
    "raises": raising,
    "puts a secret into a URL": leaking,
    "wants more than 5": asking(HERE, Account("1"), times=6),
    "asks nothing": asking(HERE, Account("1"), times=0),
    "something else than an Account": asking(HERE, {"id": 1}),
    "with a text as its id": asking(HERE, Account(1)),  # type: ignore[arg-type]
}
CARELESS_REVOKE = {
    "asks a server": asking("https://elsewhere.test/revoke", value=False),
    "raises": raising,
    "something else than True or False": asking(HERE, 1),
    "did not confirm": asking(HERE, value=True),
    "claims a success": asking(HERE, value=True, times=0),
}


def _raising_parse(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"access_token": answer["access_token"]}


def _changing_parse(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    answer.update(x=1)  # type: ignore[attr-defined]
    return answer


CARELESS_PARSE: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "raises KeyError": _raising_parse,
    "changes what it is given": _changing_parse,
    "something else than a map": list,
}


def quoting(_call: Call, material: Material) -> Signed:
    """Quote the key."""
    raise ValueError(f"{material.fields['api_key'].reveal()} is no good")


def decoding(_call: Call, material: Material) -> Signed:
    """Let the decoder speak."""
    return Signed(((b"x", material.fields["api_key"].reveal().encode().decode("utf-16").encode()),))


def refusing(_call: Call, _material: Material) -> Signed:
    """Refuse everything."""
    raise ValueError("no")


def returning(*headers: tuple[bytes, bytes], query: bytes | None = None) -> Callable[[Call, Material], Signed]:
    """Return a signer's function that returns the same for whatever call."""
    return lambda _call, _material: Signed(headers, query)


CARELESS_SIGN: dict[str, Callable[[Call, Material], Any]] = {
    "quote a secret": quoting,
    "not its own": decoding,
    "raises KeyError": lambda _call, material: material.fields["password"],
    "can sign no call": refusing,
    "something else than Signed": lambda _call, _material: None,
    "puts nothing": returning(),
    "plain and in lower case": returning((b"X-Key", b"1")),
    "a field twice": returning((b"x-key", b"1"), (b"x-key", b"2")),
    "that the caller may send": returning((b"content-type", b"text/plain")),
    "not printable": returning((b"x-key", b"1\r\n")),
    "not encoded": returning(query=b"a=1#b"),
}


@pytest.mark.parametrize("words", CARELESS_SIGN)
def test_a_careless_signer_is_found_out(words: str) -> None:
    provider = replace(begun(), api_key=ApiKey(), signers={"api_key": Signer(CARELESS_SIGN[words])})
    found = list(trials(provider))
    assert any(one.startswith("the signer of api_key") and words in one for one in found)


@pytest.mark.parametrize("words", CARELESS_IDENTIFY)
def test_a_careless_identify_is_found_out(words: str) -> None:
    found = list(trials(replace(begun(), identify=CARELESS_IDENTIFY[words])))
    assert any(one.startswith("identify") and words in one for one in found)


@pytest.mark.parametrize("words", CARELESS_REVOKE)
def test_a_careless_revoke_is_found_out(words: str) -> None:
    provider = begun()
    assert provider.oauth2 is not None
    oauth2 = replace(provider.oauth2, revocation=Revocation(CARELESS_REVOKE[words]))
    found = list(trials(replace(provider, oauth2=oauth2)))
    assert any(one.startswith("revoke") and words in one for one in found)


@pytest.mark.parametrize("words", CARELESS_PARSE)
def test_a_careless_parse_token_is_found_out(words: str) -> None:
    provider = begun()
    assert provider.oauth2 is not None
    oauth2 = replace(provider.oauth2, parse_token=CARELESS_PARSE[words])
    found = list(trials(replace(provider, oauth2=oauth2)))
    assert any(one.startswith("parse_token") and words in one for one in found)


def test_hosts_with_variables_and_discovered_urls_are_made_up_for_the_trial() -> None:
    provider = begun()
    assert provider.oauth2 is not None
    shops = replace(
        provider, hosts={"": "https://{shop}.example.test"}, variables=(Variable("shop", r"[a-z]{1,9}", "acme"),)
    )
    assert list(trials(shops)) == []
    discovered = replace(provider, oauth2=replace(provider.oauth2, revoke_url="", discovery=True))
    assert list(trials(discovered)) == []


def test_a_provider_without_functions_has_nothing_to_try() -> None:
    assert list(trials(Provider("plain", "Plain", "https://docs.example.test"))) == []


# --- careless webhooks


def _trusting(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
    """Believe everything."""
    del received, keys
    yield from ()
    return Proof(0, frozenset({"body"}), b"x")


def _failing(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
    """Trust that the body is there."""
    del keys
    yield from ()
    return Proof(received.body[0], frozenset())


def _straying(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
    """Fetch a key from wherever the request says."""
    del received, keys
    yield Outgoing("GET", "https://elsewhere.test/key")
    raise WebhookRefused("key_refused")


def _signing_wrongly(received: Received, key: Secret, now: float) -> Received:
    """Sign nothing."""
    del key, now
    return received


SIGNED = hmac_signature("x-signature")
CARELESS_WEBHOOKS = {
    "takes a request for proven that is not signed": replace(SIGNED, verify=_trusting),
    "raises IndexError": replace(SIGNED, verify=_failing),
    "asks a server that its scheme does not name": replace(
        SIGNED, verify=_straying, asks=("https://api.example.test",)
    ),
    "refuses what its own scheme signed": replace(SIGNED, sign=_signing_wrongly),
}


@pytest.mark.parametrize("words", CARELESS_WEBHOOKS)
def test_a_careless_webhook_is_found_out(words: str) -> None:
    webhook = Webhook(CARELESS_WEBHOOKS[words], "https://docs.example.test")
    provider = Provider("one", "One", "https://docs.example.test", webhooks={"": webhook})
    assert list(problems(provider)) == []
    assert any(words in found for found in trials(provider))
