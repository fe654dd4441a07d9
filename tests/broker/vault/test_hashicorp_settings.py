"""The settings for HashiCorp Vault: read together, and what does not fit together stops the start by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.settings import Secret, SettingsError, load_settings

CANARY = "CANARY-4d1b7e"
BASE = {"BROKER_ENV": "development", "BROKER_VAULT": "hashicorp", "VAULT_ADDR": "https://vault.test:8200"}
TOKEN = {**BASE, "VAULT_TOKEN": f"hvs.{CANARY}"}
APPROLE = {**BASE, "BROKER_VAULT_AUTH": "approle", "BROKER_VAULT_ROLE_ID": "r", "BROKER_VAULT_SECRET_ID": CANARY}
KUBERNETES = {**BASE, "BROKER_VAULT_AUTH": "kubernetes", "BROKER_VAULT_KUBERNETES_ROLE": "broker"}
PRODUCTION = {"BROKER_ENV": "production", "BROKER_PUBLIC_URL": "https://broker.test", "BROKER_KEYRING": "k1:AAAA"}


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


def refusal(environ: dict[str, str], place: Path) -> str:
    with pytest.raises(SettingsError) as refused:
        load_settings(environ, directory=place)
    assert CANARY not in str(refused.value)
    return str(refused.value)


def test_vaults_own_variables_are_taken_and_no_others(tmp_path: Path) -> None:
    given = {**TOKEN, "VAULT_NAMESPACE": "teams/a", "VAULT_CACERT": "/etc/vault/ca.pem", "VAULT_SKIP_VERIFY": "true"}
    found = load_settings(given, directory=tmp_path)
    assert dict(found.vault_variables) == {
        "VAULT_ADDR": "https://vault.test:8200",
        "VAULT_TOKEN": f"hvs.{CANARY}",
        "VAULT_NAMESPACE": "teams/a",
        "VAULT_CACERT": "/etc/vault/ca.pem",
    }
    assert found.vault_ca_file == Path("/etc/vault/ca.pem")
    assert CANARY not in repr(found)
    assert CANARY not in found.model_dump_json()


def test_the_names_in_vault_have_defaults(tmp_path: Path) -> None:
    found = load_settings(TOKEN, directory=tmp_path)
    assert (found.vault_mount, found.vault_prefix, found.vault_transit_mount) == ("secret", "broker", "transit")
    assert (found.vault_auth, found.vault_auth_mount, found.vault_transit_key) == ("token", None, None)
    assert (found.vault_ca_file, found.vault_secret_id_wrapped) == (None, False)


def test_every_setting_of_a_role_is_read(tmp_path: Path) -> None:
    more = {"BROKER_VAULT_AUTH_MOUNT": "teams/approle", "BROKER_VAULT_SECRET_ID_WRAPPED": "true"}
    found = load_settings({**APPROLE, **more}, directory=tmp_path)
    assert (found.vault_auth, found.vault_role_id, found.vault_secret_id) == ("approle", "r", Secret(CANARY))
    assert (found.vault_auth_mount, found.vault_secret_id_wrapped) == ("teams/approle", True)
    in_file = {**without(APPROLE, "BROKER_VAULT_SECRET_ID"), "BROKER_VAULT_SECRET_ID_FILE": "/run/secret-id"}
    assert load_settings(in_file, directory=tmp_path).vault_secret_id_file == Path("/run/secret-id")


def test_every_setting_of_kubernetes_is_read(tmp_path: Path) -> None:
    found = load_settings({**KUBERNETES, "BROKER_VAULT_KUBERNETES_TOKEN_FILE": "/run/token"}, directory=tmp_path)
    assert (found.vault_kubernetes_role, found.vault_kubernetes_token_file) == ("broker", Path("/run/token"))


def test_where_vault_is_not_used_nothing_of_it_is_asked_for(tmp_path: Path) -> None:
    assert load_settings({"BROKER_ENV": "development", "VAULT_ADDR": "nonsense"}, directory=tmp_path).vault == "local"


def test_transit_alone_needs_the_server_too_and_makes_a_keyring_unnecessary(tmp_path: Path) -> None:
    alone = {**without(PRODUCTION, "BROKER_KEYRING"), "BROKER_VAULT_TRANSIT_KEY": "broker"}
    assert "VAULT_ADDR must be" in refusal(alone, tmp_path)
    found = load_settings({**alone, "VAULT_ADDR": BASE["VAULT_ADDR"], "VAULT_TOKEN": "t"}, directory=tmp_path)
    assert (found.vault, found.vault_transit_key) == ("local", "broker")


WRONG = [
    (without(TOKEN, "VAULT_ADDR"), "VAULT_ADDR must be the server's URL"),
    ({**TOKEN, "VAULT_ADDR": f"ftp://{CANARY}"}, "VAULT_ADDR must be the server's URL"),
    ({**TOKEN, "VAULT_ADDR": f"https://u:{CANARY}@vault.test"}, "VAULT_ADDR must be the server's URL"),
    ({**TOKEN, "VAULT_ADDR": f"https://vault.test/{CANARY}"}, "without a path"),
    ({**TOKEN, "VAULT_TOKEN": f"{CANARY}\r\nX: y"}, "VAULT_TOKEN must be of visible ASCII characters"),
    ({**TOKEN, "VAULT_NAMESPACE": f"{CANARY} "}, "VAULT_NAMESPACE must be of visible ASCII characters"),
    (without(TOKEN, "VAULT_TOKEN"), "VAULT_TOKEN is required for BROKER_VAULT_AUTH=token"),
    (without(APPROLE, "BROKER_VAULT_ROLE_ID"), "BROKER_VAULT_ROLE_ID is required"),
    (without(APPROLE, "BROKER_VAULT_SECRET_ID"), "takes one of BROKER_VAULT_SECRET_ID and BROKER_VAULT_SECRET_ID_FILE"),
    ({**APPROLE, "BROKER_VAULT_SECRET_ID_FILE": "/f"}, "takes one of BROKER_VAULT_SECRET_ID and"),
    (without(KUBERNETES, "BROKER_VAULT_KUBERNETES_ROLE"), "BROKER_VAULT_KUBERNETES_ROLE is required"),
    ({**KUBERNETES, "BROKER_VAULT_ROLE_ID": "r"}, "BROKER_VAULT_ROLE_ID is for BROKER_VAULT_AUTH=approle"),
    (
        {**APPROLE, "BROKER_VAULT_KUBERNETES_ROLE": "r"},
        "BROKER_VAULT_KUBERNETES_ROLE is for BROKER_VAULT_AUTH=kubernetes",
    ),
    ({**TOKEN, "BROKER_VAULT_SECRET_ID_WRAPPED": "true"}, "BROKER_VAULT_SECRET_ID_WRAPPED is for"),
    (
        {**TOKEN, "BROKER_VAULT_AUTH_MOUNT": "x"},
        "BROKER_VAULT_AUTH_MOUNT is for BROKER_VAULT_AUTH=approle or kubernetes",
    ),
    ({**TOKEN, "BROKER_VAULT_AUTH": CANARY}, "'token', 'approle' or 'kubernetes'"),
    ({**TOKEN, "BROKER_VAULT_MOUNT": f"/{CANARY}"}, "BROKER_VAULT_MOUNT: must be a path"),
    ({**TOKEN, "BROKER_VAULT_PREFIX": f"{CANARY}/"}, "BROKER_VAULT_PREFIX: must be a path"),
    ({**TOKEN, "BROKER_VAULT_PREFIX": f"../{CANARY}"}, "BROKER_VAULT_PREFIX: must be a path"),
    ({**TOKEN, "BROKER_VAULT_TRANSIT_KEY": f"{CANARY}?"}, "BROKER_VAULT_TRANSIT_KEY: must be a path"),
]


@pytest.mark.parametrize(("environ", "why"), WRONG)
def test_what_does_not_fit_together_is_named(environ: dict[str, str], why: str, tmp_path: Path) -> None:
    assert why in refusal(environ, tmp_path)


@pytest.mark.parametrize("address", ["http://vault.test:8200", "http://10.0.0.1:8200"])
def test_production_wants_https_to_vault(address: str, tmp_path: Path) -> None:
    environ = {**TOKEN, **PRODUCTION, "VAULT_ADDR": address}
    assert "VAULT_ADDR must be https in production" in refusal(environ, tmp_path)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8100", "http://[::1]:8100", "http://localhost:8100"])
def test_an_agent_on_this_machine_needs_none(address: str, tmp_path: Path) -> None:
    environ = {**TOKEN, **PRODUCTION, "VAULT_ADDR": address}
    assert load_settings(environ, directory=tmp_path).vault_variables["VAULT_ADDR"] == address
