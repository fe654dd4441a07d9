"""The pure parts of connections: what an imported credential must look like, and how small its metadata."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.connections import LARGEST_METADATA, checked_size
from broker.errors import InvalidRequest
from broker.imports import SHAPES, check_import

TYPES = ("oauth2", "api_key", "basic", "aws")


def refused(credentials: dict[str, Any], types: tuple[str, ...] = TYPES) -> set[str]:
    with pytest.raises(InvalidRequest) as caught:
        check_import(credentials, types)
    return {error.pointer for error in caught.value.errors}


def test_user_name_and_password_are_kept_as_they_are() -> None:
    checked = check_import({"type": "basic", "username": "ada lovelace", "password": "pä ss:word"}, TYPES)
    assert checked.value == {"type": "basic", "username": "ada lovelace", "password": "pä ss:word"}
    assert "pä ss" not in repr(checked)


@pytest.mark.parametrize(
    ("credentials", "pointers"),
    [
        ({"username": "a:b", "password": "x"}, {"/credentials/username"}),
        ({"username": "", "password": "x"}, {"/credentials/username"}),
        ({"username": "a", "password": "x\n"}, {"/credentials/password"}),
        ({"username": "a", "password": "x" * 1025}, {"/credentials/password"}),
        ({"username": 5, "password": ["x"]}, {"/credentials/username", "/credentials/password"}),
        ({"username": "a"}, {"/credentials/password"}),
        ({"username": "a", "password": "x", "api_key": "y"}, {"/credentials"}),
    ],
)
def test_a_bad_user_name_or_password_is_named(credentials: dict[str, Any], pointers: set[str]) -> None:
    assert refused({"type": "basic", **credentials}) == pointers


def test_a_type_that_the_provider_does_not_take_is_refused_also_one_that_no_shape_is_known_for() -> None:
    assert refused({"type": "basic", "username": "a", "password": "b"}, ("oauth2",)) == {"/credentials/type"}
    assert refused({"type": "smtp"}, ("smtp",)) == {"/credentials/type"}
    assert refused({"type": "oauth2"}, ()) == {"/credentials/type"}


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.text(max_size=5))
names = st.sampled_from(["type", *sorted({name for needed, more in SHAPES.values() for name in needed | more}), "x"])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TYPES), st.dictionaries(names, values, max_size=5))
def test_any_credentials_are_kept_whole_or_refused_by_name(kind: str, fields: dict[str, Any]) -> None:
    given_fields = {**fields, "type": kind}
    try:
        checked = check_import(given_fields, TYPES)
    except InvalidRequest as error:
        pointers = [item.pointer for item in error.errors]
    else:
        needed, _ = SHAPES[kind]
        assert needed <= checked.value.keys()
        assert all(given_fields[name] == value for name, value in checked.value.items())
        return
    assert pointers
    assert all(pointer.startswith("/credentials") for pointer in pointers)


def test_metadata_has_a_size() -> None:
    assert checked_size({"a": "x"}, "/metadata") == {"a": "x"}
    with pytest.raises(InvalidRequest):
        checked_size({"a": "x" * LARGEST_METADATA}, "/metadata")
