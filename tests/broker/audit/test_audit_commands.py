"""The commands of the audit: export, keys, check a file anywhere, and accept a break."""

from __future__ import annotations

import sqlite3
import stat

import pytest

from tests.broker.test_cli import Terminal, shell, terminal

__all__ = ["shell", "terminal"]  # fixtures


def some_records(terminal: Terminal, count: int = 3) -> None:
    for _ in range(count):
        terminal.ok("callers", "add", "app", "--role", "auditor")


def tamper(terminal: Terminal, statement: str) -> None:
    with sqlite3.connect(terminal.place / "broker-data" / "broker.db") as database:
        database.execute(statement)
    database.close()


def test_an_export_checks_here_and_where_only_the_public_keys_are(terminal: Terminal) -> None:
    some_records(terminal)
    terminal.ok("audit", "export", "-o", "audit.jsonl")
    (terminal.place / "keys.json").write_text(terminal.ok("audit", "keys", "--json"))
    assert stat.S_IMODE((terminal.place / "audit.jsonl").stat().st_mode) == 0o600
    count = terminal.json("audit", "verify")["count"]
    said = terminal.ok("audit", "verify", "--file", "audit.jsonl")
    assert f"records: {count}, numbers 1 to {count}; checked: every link and seal" in said
    (terminal.place / "broker-data").rename(terminal.place / "elsewhere")
    offline = ("audit", "verify", "--file", "audit.jsonl", "--keys", "keys.json")
    assert "every seal" in terminal.ok(*offline)
    assert terminal.json(*offline)["count"] == count >= 3
    text = (terminal.place / "audit.jsonl").read_text()
    (terminal.place / "audit.jsonl").write_text(text.replace("caller.created", "caller.deleted", 1))
    assert f"at line {count + 2} (forged)" in terminal.refused(*offline)
    assert terminal.run(*offline, "--json").status == 1


def test_an_export_goes_to_standard_output_and_never_over_a_file(terminal: Terminal) -> None:
    some_records(terminal, 2)
    lines = terminal.ok("audit", "export", "--since", "2000-01-01T00:00:00Z").splitlines()
    assert len(lines) == terminal.json("audit", "verify")["count"] + 2
    assert len(terminal.ok("audit", "export", "--until", "2000-01-01T00:00:00Z").splitlines()) == 2
    (terminal.place / "there").write_text("mine")
    assert "there" in terminal.refused("audit", "export", "--output", "there")
    assert (terminal.place / "there").read_text() == "mine"
    assert "RFC 3339" in terminal.refused("audit", "export", "--since", "yesterday")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"key_id": "x"}]'])
def test_a_file_that_holds_no_public_keys_is_refused(terminal: Terminal, text: str) -> None:
    (terminal.place / "keys.json").write_text(text)
    (terminal.place / "audit.jsonl").write_text("{}\n")
    said = terminal.refused("audit", "verify", "--file", "audit.jsonl", "--keys", "keys.json")
    assert "not_an_export" in said if text == "{}" else "public keys" in said
    assert "--file" in terminal.refused("audit", "verify", "--keys", "keys.json")


def test_a_forged_head_is_accepted_by_name_and_the_broker_works_again(terminal: Terminal) -> None:
    some_records(terminal)
    assert "nothing to accept" in terminal.refused("audit", "accept", "--reason", "none")
    tamper(terminal, "UPDATE audit_head SET mac = 'x'")
    terminal.refused("callers", "add", "app", "--role", "auditor")
    said = terminal.ok("audit", "accept", "--reason", "the restore of Monday")
    assert said.startswith("Accepted in the record aud_")
    some_records(terminal, 1)
    told = terminal.ok("audit", "verify")
    assert told.startswith("The chain is whole")
    assert "the restore of Monday" in told
    tamper(terminal, "UPDATE audit_records SET actor = 'x' WHERE number = 2")
    accepted = terminal.json("audit", "accept", "--reason", "looked at it")
    assert [one["reason"] for one in accepted["accepted"]] == ["the restore of Monday", "looked at it"]
    assert "edited at records 2 to 2" in terminal.ok("audit", "verify")


def test_accepting_needs_a_reason(terminal: Terminal) -> None:
    assert "--reason" in terminal.refused("audit", "accept")
