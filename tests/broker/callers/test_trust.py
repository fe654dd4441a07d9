"""The file of trusted issuers: what is wrong stops the start by name; a rule's callers have ids that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from broker.callers.trust import SETTING, Trust, first_fitting, load_trust
from broker.settings import Settings, SettingsError, load_settings

GRANT = {"integrations": ["crm"], "may": ["token"]}
RULE: dict[str, Any] = {"name": "sender", "subject": "system:serviceaccount:mail:sender", "grants": [GRANT]}
ISSUER: dict[str, Any] = {"issuer": "https://kubernetes.test", "audience": "broker", "rules": [RULE]}


def settings_with(folder: Path, document: object, *, name: str = "issuers.json", **more: Any) -> Settings:
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / name).write_text(text, encoding="utf-8")
    given = {"env": "development", "data_dir": folder, "trusted_issuers_file": folder / name, **more}
    return load_settings({}, directory=folder, **given)


def trusted(folder: Path, *rules: Any, **issuer: Any) -> Trust:
    return load_trust(settings_with(folder, {"issuers": [{**ISSUER, "rules": list(rules) or [RULE], **issuer}]}))


def test_without_a_file_nobody_is_trusted(tmp_path: Path) -> None:
    trust = load_trust(load_settings({}, directory=tmp_path, env="development", data_dir=tmp_path))
    assert trust == Trust()
    assert trust.caller("clr_" + "a" * 26) is None


def test_toml_is_read_like_json(tmp_path: Path) -> None:
    toml = """
[[issuers]]
issuer = "https://kubernetes.test"
audience = "broker"
[[issuers.rules]]
name = "sender"
subject = "system:serviceaccount:mail:sender"
grants = [{ integrations = ["crm"], may = ["token"] }]
"""
    found = load_trust(settings_with(tmp_path, toml, name="issuers.toml"))
    (rule,) = found.issuers["https://kubernetes.test"].rules
    (same,) = trusted(tmp_path).issuers["https://kubernetes.test"].rules
    assert rule == same
    assert rule.roles == {"service"}


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ("{", "not valid JSON"),
        ('{"issuers": [], "issuers": []}', "not valid JSON"),
        ([], "not valid JSON"),
        ({"issuer": []}, "unknown field"),
        ({"issuers": [{**ISSUER, "audiense": "x"}]}, "unknown field"),
        ({"issuers": [{"issuer": "https://a.test", "rules": [RULE]}]}, "audience"),
        ({"issuers": [{**ISSUER, "audience": ""}]}, "audience"),
        ({"issuers": [{**ISSUER, "rules": []}]}, "nobody"),
        ({"issuers": [ISSUER, ISSUER]}, "twice"),
        ({"issuers": [{**ISSUER, "issuer": "kubernetes"}]}, "https URL"),
        ({"issuers": [{**ISSUER, "issuer": "https://u:p@a.test"}]}, "https URL"),
        ({"issuers": [{**ISSUER, "issuer": "https://a.test?x"}]}, "https URL"),
        ({"issuers": [{**ISSUER, "jwks_url": "ftp://a.test/keys"}]}, "https URL"),
        ({"issuers": [{**ISSUER, "jwks_url": "https://a.test", "jwks_file": "x"}]}, "exclude"),
        ({"issuers": [{**ISSUER, "issuer": "http://127.0.0.1:8000"}]}, "this broker itself"),
        ({"issuers": [{**ISSUER, "issuer": "http://127.0.0.1:8000/"}]}, "this broker itself"),
        ({"issuers": [{**ISSUER, "max_seconds": 1}]}, "max_seconds"),
        ({"issuers": [{**ISSUER, "rules": [{**RULE, "subject": "("}]}]}, "regular expression"),
        ({"issuers": [{**ISSUER, "rules": [{**RULE, "subject": ".*"}]}]}, "everybody"),
        ({"issuers": [{**ISSUER, "rules": [{**RULE, "subject": "(?s).+"}]}]}, "everybody"),
        ({"issuers": [{**ISSUER, "rules": [{**RULE, "subject": ""}]}]}, "everybody"),
        ({"issuers": [{**ISSUER, "rules": [{**RULE, "roles": ["root"]}]}]}, "roles/0"),
        ({"issuers": [{**ISSUER, "rules": [{**RULE, "roles": []}]}]}, "allow nothing"),
        ({"issuers": [{**ISSUER, "rules": [{**RULE, "grants": []}]}]}, "allow nothing"),
        ({"issuers": [{**ISSUER, "rules": [{**RULE, "grants": [{"may": []}]}]}]}, "integrations"),
        ({"issuers": [{**ISSUER, "rules": [{**RULE, "name": " "}]}]}, "name"),
        ({"issuers": [{**ISSUER, "rules": [RULE, RULE]}]}, "one name"),
        ({"certificates": [{**RULE, "subject": "."}, RULE]}, "one name"),
    ],
)
def test_a_wrong_file_is_refused_by_the_settings_name(tmp_path: Path, document: object, why: str) -> None:
    with pytest.raises(SettingsError, match=SETTING) as refused:
        load_trust(settings_with(tmp_path, document))
    assert why in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    settings = settings_with(tmp_path, {})
    (tmp_path / "issuers.json").unlink()
    with pytest.raises(SettingsError, match="cannot be read"):
        load_trust(settings)


def test_production_takes_https_only(tmp_path: Path) -> None:
    more = {"env": "production", "public_url": "https://broker.test", "keyring": "k:" + "A" * 43 + "="}
    with pytest.raises(SettingsError, match="https URL"):
        load_trust(settings_with(tmp_path, {"issuers": [{**ISSUER, "issuer": "http://a.test"}]}, **more))


@pytest.mark.parametrize(
    ("pattern", "subject"),
    [
        ("system:serviceaccount:mail:sender", "system:serviceaccount:mail:sender\n"),
        ("system:serviceaccount:mail:sender$", "system:serviceaccount:mail:sender\n"),
        ("system:serviceaccount:mail:sender", "xsystem:serviceaccount:mail:sender"),
        ("system:serviceaccount:mail:sender", "system:serviceaccount:mail:sender2"),
        ("a|b", "ab"),
        ("a|b", "bx"),
    ],
)
def test_a_pattern_fits_the_whole_subject_or_not(tmp_path: Path, pattern: str, subject: str) -> None:
    (issuer,) = trusted(tmp_path, {**RULE, "subject": pattern}).issuers.values()
    assert first_fitting(issuer.rules, subject, {}) is None


def test_the_first_rule_that_fits_counts_and_claims_are_compared_with_their_type(tmp_path: Path) -> None:
    exact = {**RULE, "name": "main", "subject": "repo:acme/.*", "claims": {"ref": "main", "protected": True}}
    rest = {**RULE, "name": "rest", "subject": "repo:acme/.*"}
    (issuer,) = trusted(tmp_path, exact, rest).issuers.values()

    def name(**claims: Any) -> str | None:
        found = first_fitting(issuer.rules, "repo:acme/x", claims)
        return found.name if found is not None else None

    assert name(ref="main", protected=True) == "main"
    for claims in ({}, {"ref": "main"}, {"ref": "main", "protected": 1}, {"ref": ["main"], "protected": True}):
        assert name(**claims) == "rest"


def test_a_callers_id_is_the_same_for_the_same_rule_and_subject_and_finds_its_rule(tmp_path: Path) -> None:
    trust = trusted(tmp_path, {**RULE, "subject": "a|b"}, {**RULE, "name": "other", "subject": "c"})
    (issuer,) = trust.issuers.values()
    sender, other = issuer.rules
    principal = sender.principal("a")
    assert principal == sender.principal("a")
    assert len({principal.caller_id, sender.principal("b").caller_id, other.principal("a").caller_id}) == 3
    assert principal.caller_id.startswith("clr_")
    assert len(principal.caller_id) == 30
    assert trust.caller(principal.caller_id) == principal
    assert trust.caller(other.principal("c").caller_id) == other.principal("c")
    assert Trust().caller(principal.caller_id) is None
    assert "admin" not in principal.roles
