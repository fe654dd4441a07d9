"""Settings: each one is read, each wrong one is named without its value, and the strongest source wins."""

from __future__ import annotations

import traceback
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from broker.settings import Secret, Settings, SettingsError, load_settings

CANARY = "CANARY-9f3e41"
DEVELOPMENT = {"BROKER_ENV": "development"}
VAULT_READ = {  # in tests/broker/vault/test_hashicorp_settings.py: they make sense together only
    *("vault_variables", "vault_transit_key", "vault_auth", "vault_auth_mount", "vault_role_id", "vault_secret_id"),
    *("vault_secret_id_file", "vault_secret_id_wrapped", "vault_kubernetes_role", "vault_kubernetes_token_file"),
}
PRODUCTION = {"BROKER_PUBLIC_URL": "https://broker.test", "BROKER_KEYRING": "k1:AAAA"}


@pytest.fixture(autouse=True)
def an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a directory without ``.env`` and ``broker.toml``, as a process does."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _told_by(error: BaseException) -> str:
    links = [error, *filter(None, [error.__cause__, error.__context__])]
    return "".join(str(one) + repr(one) + "".join(traceback.format_exception(one)) for one in links)


def _refusal(environ: dict[str, str], **overrides: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ, **overrides)  # type: ignore[arg-type]
    return str(caught.value)


# --- every setting --------------------------------------------------------------------------------------------------------


def test_a_developer_needs_to_set_nothing_but_the_environment() -> None:
    found = load_settings(DEVELOPMENT)
    assert found.development
    assert found.public_url == "http://127.0.0.1:8000"
    assert found.effective_database_url == "sqlite:///broker-data/broker.db"
    assert found.routes == ("public", "private", "admin")
    assert (found.vault, found.secret_cache_seconds) == ("local", 30)
    assert (found.audit_sinks, found.audit_checkpoints) == (("database",), ())
    assert (found.keyring, found.keyring_file, found.admin_key) == (None, None, None)
    assert found.egress_allow == found.trusted_proxies == found.return_to == found.egress_resolve == ()


READ = [
    ("env", "development", "development"),
    ("public_url", "https://Broker.test:8443/", "https://Broker.test:8443"),
    ("data_dir", "/var/lib/broker", Path("/var/lib/broker")),
    ("database_url", "postgresql+asyncpg://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
    ("database_url", "postgresql://u:p@h/d", "postgresql://u:p@h/d"),
    ("database_url", "sqlite:////var/broker.db", "sqlite:////var/broker.db"),
    ("routes", "public, private", ("public", "private")),
    ("vault", "local", "local"),
    ("vault_mount", "teams/kv", "teams/kv"),
    ("vault_prefix", "apps/broker", "apps/broker"),
    ("vault_transit_mount", "keys", "keys"),
    ("keyring", "k2:BBBB,k1:AAAA", Secret("k2:BBBB,k1:AAAA")),
    ("secret_cache_seconds", "0", 0.0),
    ("background_refreshes_per_minute", "60", 60),
    ("drain_seconds", "2.5", 2.5),
    ("grace_seconds", "60", 60),
    ("proxy_domain", "Proxy.Example.test", "proxy.example.test"),
    ("proxy_most_bytes", "1048576", 1_048_576),
    ("delivery_allow", "10.1.0.0/16", (ip_network("10.1.0.0/16"),)),
    ("event_retention_days", "7.5", 7.5),
    ("event_retention_count", "5000", 5000),
    ("webhook_most_bytes", "65536", 65_536),
    ("webhooks_per_minute", "120", 120),
    ("caller_calls_per_second", "2.5", 2.5),
    ("redis_url", "rediss://:p%40ss@redis.test:6380/2", Secret("rediss://:p%40ss@redis.test:6380/2")),
    ("audit_sinks", "database,file:/var/log/audit,stdout", ("database", "file:/var/log/audit", "stdout")),
    ("audit_checkpoints", "file:/mnt/other/points,stdout", ("file:/mnt/other/points", "stdout")),
    ("audit_retention_days", "400", 400.0),
    ("return_to", "https://app.test/done,https://b.test/**", ("https://app.test/done", "https://b.test/**")),
    ("default_return_to", "https://app.test/done", "https://app.test/done"),
    ("egress_allow", "10.0.0.0/8,fd00::/8", (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))),
    ("egress_ca_file", "/etc/ca.pem", Path("/etc/ca.pem")),
    ("egress_resolve", "a.test:443:127.0.0.1,b.test:8443:[::1]", ("a.test:443:127.0.0.1", "b.test:8443:[::1]")),
    ("trusted_proxies", "192.0.2.7", (ip_network("192.0.2.7/32"),)),
    ("trusted_issuers_file", "issuers.toml", Path("issuers.toml")),
    ("token_exchange_seconds", "60", 60),
    ("admin_key", "brk_a_b", Secret("brk_a_b")),
    ("integrations_file", "integrations.json", Path("integrations.json")),
]


@pytest.mark.parametrize(("name", "text", "expected"), READ)
def test_a_setting_is_read_from_the_environment(name: str, text: str, expected: object) -> None:
    assert getattr(load_settings({**DEVELOPMENT, f"BROKER_{name.upper()}": text}), name) == expected


def test_a_keyring_file_is_read_from_the_environment() -> None:
    found = load_settings({"BROKER_PUBLIC_URL": "https://broker.test", "BROKER_KEYRING_FILE": "/run/keyring"})
    assert (found.keyring_file, found.development) == (Path("/run/keyring"), False)


def test_every_setting_is_in_the_list_above() -> None:
    assert {name for name, _, _ in READ} | {
        "keyring_file",
        "mtls_header",
        "provider_credentials",
        "vault_fallback",
    } | VAULT_READ == set(Settings.model_fields)


def test_the_clients_that_the_environment_brings_are_kept_whole() -> None:
    environ = {
        **DEVELOPMENT,
        "SOME_CLIENT_ID": "id",
        "SOME_CLIENT_SECRET": CANARY,
        "OTHER_CLIENT_ID": "",
        "HOME": "/root",
    }
    assert load_settings(environ).provider_credentials == {"SOME_CLIENT_ID": "id", "SOME_CLIENT_SECRET": CANARY}


def test_an_empty_variable_counts_as_absent() -> None:
    found = load_settings({**DEVELOPMENT, "BROKER_ADMIN_KEY": "", "BROKER_RETURN_TO": "", "BROKER_NOT_THERE": ""})
    assert (found.admin_key, found.return_to) == (None, ())


# --- each refusal ---------------------------------------------------------------------------------------------------------

REFUSED = [
    *(
        ("proxy_domain", text, "must be a plain DNS name")
        for text in (f"https://{CANARY}.test", "test", "a.test.", "1.2")
    ),
    *(
        ("proxy_domain", text, "must be a plain DNS name")
        for text in ("a.test:80", "a_b.test", "-a.test", "a..test", "ä.de")
    ),
    ("caller_calls_per_second", "-1", "greater than or equal to 0"),
    ("caller_calls_per_second", "0.000001", "0.01"),
    ("caller_calls_per_second", "10001", "less than or equal to 10000"),
    ("caller_calls_per_second", "nan", "less than or equal to 10000"),
    *(
        ("redis_url", text, "must be redis://")
        for text in (CANARY, f"http://{CANARY}", f"redis://h/{CANARY}", "redis://")
    ),
    *(
        ("redis_url", text, "must be redis://")
        for text in ("redis://h:0", "redis://h:x", "redis://h?ssl=1", "redis://h/ä")
    ),
    ("env", CANARY, "'production' or 'development'"),
    ("public_url", f"ftp://{CANARY}", "must be an http(s) URL"),
    ("public_url", f"https://{CANARY}:x@h", "without credentials"),
    ("public_url", f"https://@{CANARY}", "without credentials"),
    ("public_url", f"https://h?{CANARY}", "query or fragment"),
    ("public_url", f"https://h#{CANARY}", "query or fragment"),
    ("public_url", f"https://h/{CANARY}", "must have no path"),
    ("public_url", f"https://h:{CANARY}", "must be an http(s) URL"),
    ("public_url", f"https://[{CANARY}", "must be an http(s) URL"),
    ("public_url", f"https://h\u2100{CANARY}", "must be an http(s) URL"),
    ("public_url", f"https://h {CANARY}", "must be an http(s) URL"),
    ("public_url", f"https://h\\{CANARY}", "must be an http(s) URL"),
    ("database_url", f"mysql://u:{CANARY}@h/d", "must be postgresql+asyncpg://… or sqlite:///<path>"),
    ("routes", f"public,{CANARY}", "'public', 'private' or 'admin'"),
    ("vault", CANARY, "'local'"),
    ("secret_cache_seconds", CANARY, "valid number"),
    ("secret_cache_seconds", "-1", "greater than or equal to 0"),
    ("secret_cache_seconds", "3601", "less than or equal to 3600"),
    ("secret_cache_seconds", "nan", "BROKER_SECRET_CACHE_SECONDS: "),
    ("audit_sinks", f"database,{CANARY}", "each must be database, stdout or file:<path>"),
    ("audit_sinks", "database,file:", "each must be database, stdout or file:<path>"),
    ("audit_sinks", "stdout", "must contain database"),
    ("audit_checkpoints", CANARY, "each must be stdout, file:<path> or vault:<path>"),
    ("audit_checkpoints", "file:", "each must be stdout, file:<path> or vault:<path>"),
    ("audit_checkpoints", "vault:../x", "each must be stdout, file:<path> or vault:<path>"),
    ("audit_checkpoints", "vault:audit/checkpoints", "needs BROKER_VAULT=hashicorp"),
    ("audit_retention_days", "0.5", "greater than or equal to 1"),
    ("return_to", f"https://u:{CANARY}@h/", "without credentials"),
    ("return_to", f"/{CANARY}", "take http(s) URLs"),
    ("default_return_to", f"javascript:{CANARY}", "take http(s) URLs"),
    ("egress_allow", f"10.0.0.0/8,{CANARY}", "each must be a network"),
    ("egress_allow", "10.0.0.1/8", "without host bits"),
    ("trusted_proxies", CANARY, "each must be a network"),
    ("egress_resolve", f"h:443:{CANARY}", "each must be host:port:address"),
    ("egress_resolve", f"h:{CANARY}:127.0.0.1", "each must be host:port:address"),
    ("egress_resolve", ":443:127.0.0.1", "each must be host:port:address"),
    ("egress_resolve", "h:70000:127.0.0.1", "each must be host:port:address"),
    ("egress_resolve", CANARY, "each must be host:port:address"),
]


@pytest.mark.parametrize(("name", "text", "why"), REFUSED)
def test_a_wrong_setting_is_named_with_the_reason_but_not_the_value(name: str, text: str, why: str) -> None:
    variable = f"BROKER_{name.upper()}"
    with pytest.raises(SettingsError) as caught:
        load_settings({**DEVELOPMENT, variable: text})
    assert variable in str(caught.value)
    assert why in str(caught.value)
    assert CANARY not in _told_by(caught.value)


PRODUCTION_IS_STRICT = [
    ({"BROKER_PUBLIC_URL": "http://broker.test"}, "BROKER_PUBLIC_URL must be https in production"),
    ({"BROKER_KEYRING": ""}, "BROKER_KEYRING or BROKER_KEYRING_FILE is required in production"),
    ({"BROKER_KEYRING_FILE": "/f"}, "BROKER_KEYRING and BROKER_KEYRING_FILE exclude each other"),
    ({"BROKER_EGRESS_RESOLVE": "h:443:127.0.0.1"}, "BROKER_EGRESS_RESOLVE is for development only"),
    ({"BROKER_RETURN_TO": "http://app.test/"}, "must be https in production"),
    ({"BROKER_DEFAULT_RETURN_TO": "http://app.test/"}, "must be https in production"),
]


@pytest.mark.parametrize(("changes", "why"), PRODUCTION_IS_STRICT)
def test_production_is_strict(changes: dict[str, str], why: str) -> None:
    assert load_settings(PRODUCTION).env == "production"
    assert why in _refusal({**PRODUCTION, **changes})


def test_production_is_what_you_get_without_a_word_and_everything_wrong_is_said_at_once() -> None:
    told = _refusal({})
    assert "BROKER_PUBLIC_URL must be https in production" in told
    assert "BROKER_KEYRING or BROKER_KEYRING_FILE is required in production" in told


def test_wrong_values_of_several_settings_are_all_named() -> None:
    told = _refusal(
        {**DEVELOPMENT, "BROKER_VAULT": "x", "BROKER_SECRET_CACHE_SECONDS": "x", "BROKER_EGRESS_ALLOW": "x,y"}
    )
    assert told.count(";") == 2
    assert "BROKER_VAULT" in told
    assert "BROKER_SECRET_CACHE_SECONDS" in told
    assert "BROKER_EGRESS_ALLOW" in told


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("BROKER_TRUSTED_PROXY", "BROKER_TRUSTED_PROXY is not a setting, did you mean BROKER_TRUSTED_PROXIES?"),
        ("BROKER_Env", "BROKER_Env is not a setting, did you mean BROKER_ENV?"),
        ("BROKER_XYZZY", "BROKER_XYZZY is not a setting"),
        ("BROKER_PROVIDER_CREDENTIALS", "BROKER_PROVIDER_CREDENTIALS is not a setting"),
        ("BROKER_EFFECTIVE_DATABASE_URL", "did you mean BROKER_DATABASE_URL?"),
        ("BROKER_SERVICE_HOST", "turn enableServiceLinks off"),
        ("BROKER_PORT_8000_TCP_ADDR", "turn enableServiceLinks off"),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(variable: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({**DEVELOPMENT, variable: CANARY})
    assert told in str(caught.value)
    assert CANARY not in _told_by(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(set(Settings.model_fields) - {"provider_credentials", "vault_variables"})),
    text=st.text(max_size=40),
)
def test_any_text_is_read_or_refused_by_name_and_never_told(name: str, text: str) -> None:
    variable, value = f"BROKER_{name.upper()}", f"{text}{CANARY}"
    outcome: Settings | SettingsError
    try:
        outcome = load_settings({**DEVELOPMENT, variable: value}, directory=Path("/nonexistent"))
    except SettingsError as error:
        outcome = error
    if isinstance(outcome, SettingsError):
        assert "BROKER_" in str(outcome)
        assert CANARY not in _told_by(outcome)
        return
    kept = getattr(outcome, name)
    assert CANARY in (kept.reveal() if isinstance(kept, Secret) else str(kept))
    assert CANARY not in repr(kept) or not isinstance(kept, Secret)


# --- sources --------------------------------------------------------------------------------------------------------------


def test_the_strongest_source_wins(tmp_path: Path) -> None:
    (tmp_path / "broker.toml").write_text(
        'env = "development"\ndata_dir = "t"\nsecret_cache_seconds = 1\nvault = "local"\n'
    )
    (tmp_path / ".env").write_text("BROKER_DATA_DIR=d\nBROKER_SECRET_CACHE_SECONDS=2\nA_CLIENT_ID=d\nB_CLIENT_ID=d\n")
    environ = {"BROKER_SECRET_CACHE_SECONDS": "3", "B_CLIENT_ID": "e"}
    found = load_settings(environ, directory=tmp_path)
    assert (found.env, found.data_dir, found.secret_cache_seconds) == ("development", Path("d"), 3)
    assert found.provider_credentials == {"A_CLIENT_ID": "d", "B_CLIENT_ID": "e"}
    assert load_settings(environ, directory=tmp_path, secret_cache_seconds=4).secret_cache_seconds == 4


def test_an_empty_variable_does_not_hide_a_file(tmp_path: Path) -> None:
    (tmp_path / "broker.toml").write_text('env = "development"\ndata_dir = "t"\n')
    assert load_settings({"BROKER_DATA_DIR": ""}, directory=tmp_path).data_dir == Path("t")


def test_the_process_environment_and_working_directory_are_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("BROKER_ENV=development\n")
    monkeypatch.setenv("BROKER_DATA_DIR", "from-the-process")
    assert load_settings().data_dir == Path("from-the-process")
    assert load_settings({}).data_dir == Path("broker-data")


def test_the_process_environment_does_not_leak_into_a_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_DATA_DIR", "from-the-process")
    monkeypatch.setenv("SOME_CLIENT_SECRET", CANARY)
    found = load_settings(DEVELOPMENT)
    assert (found.data_dir, found.provider_credentials) == (Path("broker-data"), {})


def test_toml_knows_lists_and_numbers(tmp_path: Path) -> None:
    (tmp_path / "broker.toml").write_text(
        'env = "development"\nroutes = ["public"]\nsecret_cache_seconds = 1.5\n'
        'egress_allow = ["10.0.0.0/8"]\nreturn_to = "https://a.test/x, https://b.test/y"\n'
    )
    found = load_settings({})
    assert (found.routes, found.secret_cache_seconds) == (("public",), 1.5)
    assert found.egress_allow == (ip_network("10.0.0.0/8"),)
    assert found.return_to == ("https://a.test/x", "https://b.test/y")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (f'env = "{CANARY}', "broker.toml is not valid TOML"),
        (b"\xff", "broker.toml is not valid TOML"),
        (f'databse_url = "{CANARY}"', "did you mean BROKER_DATABASE_URL?"),
        (f'provider_credentials = {{ a = "{CANARY}" }}', "BROKER_PROVIDER_CREDENTIALS is not a setting"),
        (f'[env]\nx = "{CANARY}"', "BROKER_ENV"),
        (f'egress_allow = ["{CANARY}"]', "each must be a network"),
        ("egress_allow = [[]]", "each must be a network"),
        ("egress_allow = 1", "BROKER_EGRESS_ALLOW"),
        ("keyring = 1", "BROKER_KEYRING"),
    ],
)
def test_a_wrong_toml_file_is_refused_without_its_content(tmp_path: Path, content: str | bytes, why: str) -> None:
    (tmp_path / "broker.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as caught:
        load_settings(DEVELOPMENT if "env" not in str(content) else {})
    assert why in str(caught.value)
    assert CANARY not in _told_by(caught.value)


def test_a_dotenv_file_is_taken_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "expanded")
    (tmp_path / ".env").write_text(
        "# a comment\n\nexport BROKER_ENV=development\nBROKER_ADMIN_KEY='a${CANARY}b'\nBROKER_KEYRING=\"k1:AA==\" # newest\n"
    )
    found = load_settings({})
    assert found.admin_key == Secret("a${CANARY}b")
    assert found.keyring == Secret("k1:AA==")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (f"BROKER_ENV=development\n'{CANARY}\n", ".env, line 2: not NAME=value"),
        (f"BROKER_ENV=development\n\nBROKER_{CANARY}\n", ".env, line 3: not NAME=value"),
        (f"BROKER_ENV=development\nBROKER_KEYRNG={CANARY}\n", "did you mean BROKER_KEYRING?"),
        (b"BROKER_ENV=\xff", ".env cannot be read as UTF-8 text"),
    ],
)
def test_a_wrong_dotenv_file_is_refused_without_its_content(tmp_path: Path, content: str | bytes, why: str) -> None:
    (tmp_path / ".env").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as caught:
        load_settings({})
    assert why in str(caught.value)
    assert CANARY not in _told_by(caught.value)


@pytest.mark.parametrize("name", ["broker.toml", ".env"])
def test_a_file_that_cannot_be_read_is_named_and_one_that_is_not_there_is_fine(tmp_path: Path, name: str) -> None:
    assert load_settings(DEVELOPMENT, directory=tmp_path / "absent").development
    (tmp_path / name).symlink_to("/proc/self/mem")  # root reads whatever the permissions say, but not this
    assert f"{name} cannot be read" in _refusal(DEVELOPMENT)


def test_an_override_is_checked_like_any_source() -> None:
    assert load_settings({}, env="development").development
    assert "BROKER_ENVV is not a setting" in _refusal(DEVELOPMENT, envv="x")
    assert "BROKER_PROVIDER_CREDENTIALS is not a setting" in _refusal(DEVELOPMENT, provider_credentials={})
    assert "BROKER_VAULT" in _refusal(DEVELOPMENT, vault="elsewhere")


# --- the object -----------------------------------------------------------------------------------------------------------


def test_the_object_shows_no_secret() -> None:
    environ = {
        **DEVELOPMENT,
        "BROKER_DATABASE_URL": f"postgresql://u:{CANARY}@h/d",
        "BROKER_KEYRING": CANARY,
        "BROKER_ADMIN_KEY": CANARY,
        "SOME_CLIENT_SECRET": CANARY,
    }
    found = load_settings(environ)
    assert CANARY not in repr(found) + str(found) + found.model_dump_json(exclude={"database_url"})
    assert CANARY in found.database_url
    assert found.keyring is not None
    assert found.keyring.reveal() == CANARY


def test_the_object_is_frozen() -> None:
    found = load_settings(DEVELOPMENT)
    with pytest.raises(ValidationError):
        found.env = "production"


def test_building_the_object_reads_nothing_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_DATA_DIR", "from-the-process")
    (tmp_path / ".env").write_text("BROKER_VAULT=x\n")
    (tmp_path / "broker.toml").write_text('vault = "x"\n')
    values: dict[str, Any] = {"env": "development"}
    assert Settings(**values).data_dir == Path("broker-data")


@pytest.mark.parametrize("name", ["authorization", "X-Api-Key", "x forwarded", "", "cookie", "x-\n"])
def test_a_header_for_certificates_serves_nothing_else(name: str, tmp_path: Path) -> None:
    needed: dict[str, Any] = {"trusted_proxies": "10.0.0.0/8", "trusted_issuers_file": "x"}
    if name == "":
        assert load_settings({"BROKER_MTLS_HEADER": ""}, directory=tmp_path, env="development").mtls_header is None
        return
    with pytest.raises(SettingsError, match="BROKER_MTLS_HEADER"):
        load_settings({}, directory=tmp_path, env="development", mtls_header=name, **needed)


@pytest.mark.parametrize("missing", ["trusted_proxies", "trusted_issuers_file"])
def test_a_header_for_certificates_needs_a_proxy_and_rules(missing: str, tmp_path: Path) -> None:
    whole: dict[str, Any] = {"trusted_proxies": "10.0.0.0/8", "trusted_issuers_file": "x", "mtls_header": "X-Cert"}
    assert load_settings({}, directory=tmp_path, env="development", **whole).mtls_header == "x-cert"
    del whole[missing]
    with pytest.raises(SettingsError, match="BROKER_MTLS_HEADER needs"):
        load_settings({}, directory=tmp_path, env="development", **whole)


@pytest.mark.parametrize(("seconds", "good"), [(59, False), (60, True), (3600, True), (3601, False)])
def test_exchanged_tokens_live_for_a_minute_to_an_hour(seconds: int, good: bool, tmp_path: Path) -> None:  # noqa: FBT001
    def load() -> int:
        settings = load_settings({"BROKER_TOKEN_EXCHANGE_SECONDS": str(seconds)}, directory=tmp_path, env="development")
        return settings.token_exchange_seconds

    if good:
        assert load() == seconds
    else:
        with pytest.raises(SettingsError, match="BROKER_TOKEN_EXCHANGE_SECONDS"):
            load()
