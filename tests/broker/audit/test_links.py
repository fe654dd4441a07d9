"""A link that is made the quick way is the one that verification finds."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from broker.audit.chain import COVERED, keys_of
from broker.audit.entries import Entry

KEYS = keys_of(bytes(32))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=40)
NUMBER = st.integers(-(2**63), 2**63 - 1)
PLAIN = st.none() | st.booleans() | NUMBER | TEXT
ANY = st.recursive(
    PLAIN | st.floats(allow_nan=False, allow_infinity=False),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(TEXT, some, max_size=3),
    max_leaves=8,
)
TODAY = st.floats(1e9, 1e11)


def row(at: float, text: str, detail: dict[str, Any]) -> dict[str, Any]:
    """Return a record of an entry, as the writers make it."""
    entry = Entry("connection.token", text, connection_id=text, integration=None, detail=detail)
    made = {**dict.fromkeys(COVERED, text), "at": at, "integration": None, "detail": entry.detail}
    assert made.keys() == set(COVERED)
    return made


@given(
    TODAY,
    TEXT,
    st.dictionaries(TEXT, PLAIN, max_size=5) | st.dictionaries(TEXT, ANY, max_size=3),
)
def test_both_ways_make_the_same_link_of_whatever_an_entry_can_say(
    at: float, text: str, detail: dict[str, Any]
) -> None:
    made = row(at, text, detail)
    assert KEYS.link_own("0" * 64, made) == KEYS.link("0" * 64, made)


def test_the_link_depends_on_each_covered_field_and_on_the_one_before() -> None:
    made = row(1.7e9, "a", {"token": "b"})
    link = KEYS.link_own("0" * 64, made)
    assert link != KEYS.link_own("1" * 64, made)
    for name in COVERED:
        changed = {"detail": {"token": "c"}, "at": 1.7e9 + 1e-6}.get(name, "other")
        assert link != KEYS.link_own("0" * 64, {**made, name: changed})
