"""Shopify's signature of the callback, by published examples, and which hosts may be a shop's."""

from __future__ import annotations

import hashlib
import hmac
import re
from urllib.parse import parse_qsl

import pytest

from providers.shopify import PROVIDER, verify_callback
from providers.spec import Secret

SECRET = Secret("hush")
PUBLISHED = [
    # https://hexdocs.pm/exshopify/Shopify.HMAC.html, from Shopify's own documentation of the time
    (
        "code=0907a61c0c8d55e99db179b68161bc00&hmac=4712bf92ffc2917d15a2f5a273e39f0116667419aa4b6ac0b3baaf26fa3c4d20"
        "&shop=some-shop.myshopify.com&timestamp=1337178173"
    ),
    # https://hexdocs.pm/shopify_oauth/Shopify.OAuth.html
    (
        "code=0907a61c0c8d55e99db179b68161bc00&hmac=700e2dadb827fcc8609e9d5ce208b2e9cdaab9df07390d2cbca10d7c328fc4bf"
        "&shop=some-shop.myshopify.com&state=0.6784241404160823&timestamp=1337178173"
    ),
]


def pairs(query: str) -> list[tuple[str, str]]:
    return parse_qsl(query, keep_blank_values=True)


def signed(text: str) -> str:
    return hmac.new(b"hush", text.encode(), hashlib.sha256).hexdigest()


@pytest.mark.parametrize("query", PUBLISHED)
def test_a_published_callback_is_verified_in_whatever_order_it_comes(query: str) -> None:
    assert verify_callback(pairs(query), SECRET)
    assert verify_callback(list(reversed(pairs(query))), SECRET)


@pytest.mark.parametrize("query", PUBLISHED)
def test_another_secret_verifies_nothing(query: str) -> None:
    assert not verify_callback(pairs(query), Secret("hush2"))


@pytest.mark.parametrize("name", ["code", "shop", "timestamp", "state", "hmac"])
def test_a_changed_a_missing_and_a_doubled_parameter_are_refused(name: str) -> None:
    good = pairs(PUBLISHED[1])
    assert not verify_callback([(n, f"{v}0" if n == name else v) for n, v in good], SECRET)
    assert not verify_callback([(n, v) for n, v in good if n != name], SECRET)
    assert not verify_callback([*good, (name, dict(good)[name])], SECRET)


def test_an_added_parameter_is_refused() -> None:
    assert not verify_callback([*pairs(PUBLISHED[0]), ("host", "x")], SECRET)
    assert not verify_callback([], SECRET)


def test_a_signature_in_other_characters_is_refused_and_not_an_error() -> None:
    for odd in ("\N{LATIN SMALL LETTER E WITH ACUTE}", "\ud800", "4712BF92FFC2917D"):
        assert not verify_callback([("hmac", odd), ("code", "1")], SECRET)
        assert not verify_callback([("hmac", "0" * 64), ("code", odd)], SECRET)


# https://github.com/Shopify/shopify_python_api (session.py), and as a form: https://github.com/Shopify/shopify-api-ruby
@pytest.mark.parametrize("text", ["a%3Db=1%2526%25&host=YWJj=", "a%3Db=1%26%25&host=YWJj%3D"])
def test_both_ways_in_which_shopifys_libraries_write_odd_characters_are_taken(text: str) -> None:
    received = [("a=b", "1&%" if "%26%25" in text else "1%26%"), ("host", "YWJj=")]
    assert verify_callback([*received, ("hmac", signed(text))], SECRET)


@pytest.mark.parametrize(
    ("shop", "good"),
    [
        ("acme.myshopify.com", True),
        ("4-acme.myshopify.com", True),
        ("acme", False),
        ("Acme.myshopify.com", False),
        ("-acme.myshopify.com", False),
        ("acme.myshopify.com.evil.test", False),
        ("evil.test/acme.myshopify.com", False),
        ("a.b.myshopify.com", False),
        ("acme.myshopify.com\n", False),
        (".myshopify.com", False),
    ],
)
def test_only_a_shops_own_name_is_a_shop(shop: str, *, good: bool) -> None:
    assert (re.fullmatch(PROVIDER.variables[0].pattern, shop) is not None) is good
