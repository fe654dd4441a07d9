"""Logins at a real Vault: tokens that end or are revoked, AppRole and wrapped secret ids, Kubernetes, TLS, nothing shown."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc import jwt
from joserfc.jwk import ECKey
from structlog.testing import capture_logs

from broker.errors import SecretStoreUnavailable
from broker.settings import Settings, SettingsError, load_settings
from broker.vault import SecretNotFound, Vault, open_server
from broker.vault.hashicorp import HashicorpVault, Session
from tests.fakes import Seen, listening
from tests.real.vault import VaultServer, running_vault

pytestmark = pytest.mark.real

BOUND_SECONDS = 6.0


@asynccontextmanager
async def a_session(settings: Settings) -> AsyncIterator[Session]:
    session = await open_server(settings)
    assert session is not None
    try:
        yield session
    finally:
        await session.aclose()


def store(session: Session) -> Vault:
    return HashicorpVault(session, mount="secret", prefix="broker")


async def check_serves(session: Session) -> None:
    """Check that the store answers, by asking for what is not there."""
    with pytest.raises(SecretNotFound):
        await store(session).get("connections/none")


async def check_serves_for(session: Session, seconds: float) -> None:
    """Check that it answers all the time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await check_serves(session)
        await asyncio.sleep(0.02)


async def check_refuses(session: Session) -> None:
    started = time.monotonic()
    with pytest.raises(SecretStoreUnavailable):
        await store(session).get("connections/none")
    assert time.monotonic() - started < BOUND_SECONDS


async def refusal_at_start(settings: Settings) -> str:
    with pytest.raises(SettingsError) as refused:
        await open_server(settings)
    return str(refused.value)


def token_of(session: Session) -> str:
    api = session._api
    assert api is not None
    return api.adapter._token.reveal()  # type: ignore[union-attr]


def lives(server: VaultServer, token: str) -> bool:
    """Whether Vault still knows the token."""
    with server._http() as http:
        return http.post("auth/token/lookup", json={"token": token}).status_code == 200


# A token that is given


async def test_a_token_is_renewed_for_as_long_as_it_may_live(vault_server: VaultServer, tmp_path: Path) -> None:
    token = vault_server.token(period="2s")
    async with a_session(vault_server.settings(tmp_path, token=token)) as session:
        await check_serves_for(session, 5)
        assert token_of(session) == token
    assert lives(vault_server, token), "a token that is not ours is not revoked"


async def test_a_token_that_ended_is_refused_in_time_and_at_the_next_start_by_name(
    vault_server: VaultServer, tmp_path: Path
) -> None:
    settings = vault_server.settings(tmp_path, token=vault_server.token(ttl="1s", renewable=False))
    async with a_session(settings) as session:
        await check_serves(session)
        await asyncio.sleep(1.5)
        for _ in range(3):
            await check_refuses(session)
    assert await refusal_at_start(settings) == "VAULT_TOKEN: Vault refuses this login"


async def test_a_revoked_token_is_refused_in_time(vault_server: VaultServer, tmp_path: Path) -> None:
    token = vault_server.token()
    async with a_session(vault_server.settings(tmp_path, token=token)) as session:
        await check_serves(session)
        vault_server.revoke(token)
        for _ in range(3):
            await check_refuses(session)


# AppRole


def of_role(server: VaultServer, place: Path, name: str, **given: Any) -> Settings:
    """Return settings with a fresh secret id of the role, which has to exist."""
    role_id = server.admin("GET", f"auth/approle/role/{name}/role-id")["data"]["role_id"]
    if "vault_secret_id_file" not in given:
        given.setdefault("vault_secret_id", server.secret_id(name))
    return server.settings(place, vault_auth="approle", vault_role_id=role_id, **given)


async def test_a_revoked_token_of_a_role_is_replaced_at_once_by_one_login(
    vault_server: VaultServer, tmp_path: Path
) -> None:
    vault_server.app_role("revoked")
    async with a_session(of_role(vault_server, tmp_path, "revoked")) as session:
        before = token_of(session)
        vault_server.revoke(before)
        known = accessors(vault_server)
        await asyncio.gather(*(check_serves(session) for _ in range(50)))
        assert len(accessors(vault_server) - known) == 1
        assert token_of(session) != before


def accessors(server: VaultServer) -> set[str]:
    return set(server.admin("GET", "auth/token/accessors?list=true")["data"]["keys"])


@pytest.mark.parametrize("longest", ["2s", "3s"])
async def test_a_role_whose_tokens_live_for_seconds_serves_without_a_gap(
    vault_server: VaultServer, tmp_path: Path, longest: str
) -> None:
    vault_server.app_role(f"short-{longest}", token_ttl="2s", token_max_ttl=longest)
    async with a_session(of_role(vault_server, tmp_path, f"short-{longest}")) as session:
        first = token_of(session)
        await check_serves_for(session, 6)
        assert token_of(session) != first


async def test_tokens_that_cannot_be_renewed_are_replaced_in_time(vault_server: VaultServer, tmp_path: Path) -> None:
    vault_server.app_role("batch", token_type="batch", token_ttl="2s")
    async with a_session(of_role(vault_server, tmp_path, "batch")) as session:
        await check_serves_for(session, 5)


async def test_a_token_that_came_from_a_login_is_revoked_at_the_end(vault_server: VaultServer, tmp_path: Path) -> None:
    vault_server.app_role("goodbye")
    async with a_session(of_role(vault_server, tmp_path, "goodbye")) as session:
        token = token_of(session)
        assert lives(vault_server, token)
    assert not lives(vault_server, token)


async def test_a_secret_id_in_a_file_is_read_for_each_login(vault_server: VaultServer, tmp_path: Path) -> None:
    vault_server.app_role("in-file")
    file = tmp_path / "secret-id"
    first = vault_server.secret_id("in-file")
    file.write_text(first + "\n")
    async with a_session(of_role(vault_server, tmp_path, "in-file", vault_secret_id_file=file)) as session:
        vault_server.admin("POST", "auth/approle/role/in-file/secret-id/destroy", {"secret_id": first})
        file.write_text(vault_server.secret_id("in-file"))
        vault_server.revoke(token_of(session))
        await check_serves(session)
        vault_server.revoke(token_of(session))
        file.unlink()
        await check_refuses(session)
        file.write_text(vault_server.secret_id("in-file"))
        await asyncio.sleep(1.1)  # after a refused login the next one waits for a second
        await check_serves(session)


async def test_a_destroyed_secret_id_refuses_the_start_by_name_and_is_not_hammered(
    vault_server: VaultServer, tmp_path: Path
) -> None:
    vault_server.app_role("destroyed")
    secret_id = vault_server.secret_id("destroyed")
    settings = of_role(vault_server, tmp_path, "destroyed", vault_secret_id=secret_id)
    async with a_session(settings) as session:
        vault_server.admin("POST", "auth/approle/role/destroyed/secret-id/destroy", {"secret_id": secret_id})
        vault_server.revoke(token_of(session))
        with capture_logs() as lines:
            for _ in range(20):
                await check_refuses(session)
        assert [line["event"] for line in lines].count("vault.login_refused") <= 2
    told = await refusal_at_start(settings)
    assert told == "BROKER_VAULT_ROLE_ID and BROKER_VAULT_SECRET_ID: Vault refuses this login"


async def test_a_wrapped_secret_id_is_unwrapped_once_and_serves_for_later_logins(
    vault_server: VaultServer, tmp_path: Path
) -> None:
    vault_server.app_role("wrapped")
    given = {"vault_secret_id": vault_server.secret_id("wrapped", wrapped=True), "vault_secret_id_wrapped": True}
    async with a_session(of_role(vault_server, tmp_path, "wrapped", **given)) as session:
        vault_server.revoke(token_of(session))
        await check_serves(session)


async def test_a_wrapping_token_that_somebody_else_used_is_critical(vault_server: VaultServer, tmp_path: Path) -> None:
    vault_server.app_role("stolen")
    wrapping = vault_server.secret_id("stolen", wrapped=True)
    settings = of_role(vault_server, tmp_path, "stolen", vault_secret_id=wrapping, vault_secret_id_wrapped=True)
    vault_server.admin("POST", "sys/wrapping/unwrap", {"token": wrapping})  # the thief
    with capture_logs() as lines:
        assert "was used already" in await refusal_at_start(settings)
    assert ("vault.secret_id_unwrapped_elsewhere", "critical") in [(one["event"], one["log_level"]) for one in lines]
    assert wrapping not in str(lines)


async def test_a_secret_id_that_somebody_wrapped_anew_is_refused_unopened(
    vault_server: VaultServer, tmp_path: Path
) -> None:
    vault_server.app_role("swapped")
    held = {"secret_id": vault_server.secret_id("swapped")}
    made = vault_server.admin("POST", "sys/wrapping/wrap", held, X_Vault_Wrap_TTL="60")
    wrapping = made["wrap_info"]["token"]
    settings = of_role(vault_server, tmp_path, "swapped", vault_secret_id=wrapping, vault_secret_id_wrapped=True)
    with capture_logs() as lines:
        assert "holds no secret id" in await refusal_at_start(settings)
    assert "critical" in [one["log_level"] for one in lines]
    assert vault_server.admin("POST", "sys/wrapping/unwrap", {"token": wrapping})["data"] == held


# Kubernetes


def service_account(name: str) -> str:
    """Return a token as a cluster makes it for a pod; the cluster of these tests looks at the name only."""
    now = int(time.time())
    claims = {
        "iss": "https://kubernetes.default.svc.cluster.local",
        "sub": f"system:serviceaccount:apps:{name}",
        "iat": now,
        "exp": now + 600,
        "kubernetes.io": {"namespace": "apps", "serviceaccount": {"name": name, "uid": f"uid-of-{name}"}},
    }
    return jwt.encode({"alg": "ES256"}, claims, ECKey.generate_key("P-256"))


def as_cluster(tokens: Mapping[str, str]) -> Callable[[Seen], tuple[int, Any]]:
    """Answer token reviews: ``tokens`` maps those that are good to the account's name."""

    def answer(seen: Seen) -> tuple[int, Any]:
        asked = next((token for token in tokens if token.encode() in seen.body), None)
        status: dict[str, Any] = {"authenticated": False}
        if asked is not None:
            user = {"username": f"system:serviceaccount:apps:{tokens[asked]}", "uid": f"uid-of-{tokens[asked]}"}
            user["groups"] = ["system:serviceaccounts", "system:serviceaccounts:apps"]  # type: ignore[assignment]
            status = {"authenticated": True, "user": user}
        return 201, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status}

    return answer


async def test_a_pod_logs_in_with_the_token_that_is_in_its_file_now(vault_server: VaultServer, tmp_path: Path) -> None:
    tokens = {service_account("broker"): "broker", service_account("broker"): "broker", service_account("x"): "x"}
    first, second, of_another = tokens
    accepted = dict(tokens)
    file = tmp_path / "token"
    async with listening(as_cluster(accepted)) as cluster:
        vault_server.admin("POST", "sys/auth/kubernetes", {"type": "kubernetes"})
        config = {"kubernetes_host": cluster.base, "disable_local_ca_jwt": True, "token_reviewer_jwt": first}
        config["kubernetes_ca_cert"] = signed_files(tmp_path)["ca"].read_text()  # asked for, and not used over http
        vault_server.admin("POST", "auth/kubernetes/config", config)
        role = {"bound_service_account_names": "broker", "bound_service_account_namespaces": "apps"}
        role |= {"token_policies": "broker", "token_no_default_policy": "true"}
        vault_server.admin("POST", "auth/kubernetes/role/broker", role)
        settings = vault_server.settings(
            tmp_path, vault_auth="kubernetes", vault_kubernetes_role="broker", vault_kubernetes_token_file=file
        )
        file.write_text(of_another)
        assert await refusal_at_start(settings) == "BROKER_VAULT_KUBERNETES_ROLE: Vault refuses this login"
        file.write_text(first)
        async with a_session(settings) as session:
            await check_serves(session)
            file.write_text(second)
            del accepted[first]
            vault_server.revoke(token_of(session))
            await check_serves(session)
            file.write_text("")
            vault_server.revoke(token_of(session))
            await check_refuses(session)


# TLS


def signed_files(folder: Path) -> dict[str, Path]:
    """Make an authority and a server's certificate for 127.0.0.1; return the files ``ca``, ``cert`` and ``key``."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test CA")])
    today, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
        return (
            made.serial_number(x509.random_serial_number()).not_valid_before(today - day).not_valid_after(today + day)
        )

    is_ca = x509.BasicConstraints(ca=True, path_length=0)
    signing = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    ca = builder(issuer, ca_key.public_key()).add_extension(is_ca, critical=True).add_extension(signing, critical=True)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    cert = builder(x509.Name([]), key.public_key()).add_extension(names, critical=True)
    files = {name: folder / f"{name}.pem" for name in ("ca", "cert", "key")}
    pem = serialization.Encoding.PEM
    files["ca"].write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    files["cert"].write_bytes(cert.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files["key"].write_bytes(key.private_bytes(pem, *private))
    return files


async def test_the_authority_of_the_settings_and_no_other_is_trusted(
    make_directory: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, others = signed_files(make_directory("tls")), signed_files(make_directory("tls"))
    monkeypatch.setenv("SSL_CERT_FILE", str(files["ca"]))
    with running_vault(make_directory, tls=files) as server:
        async with a_session(server.settings(tmp_path)) as session:
            await check_serves(session)
        known = {"VAULT_ADDR": server.address, "VAULT_TOKEN": server.token()}
        options: dict[str, Any] = {"env": "development", "data_dir": tmp_path, "vault": "hashicorp"}
        for more in ({}, {"VAULT_CACERT": str(others["ca"])}):
            async with a_session(load_settings({**known, **more}, directory=tmp_path, **options)) as session:
                await check_refuses(session)
        told = await refusal_at_start(load_settings({**known, "VAULT_CACERT": "/none"}, directory=tmp_path, **options))
    assert told == "VAULT_CACERT: cannot be read as certificates in PEM form"


# What is shown


async def test_neither_the_token_nor_the_secret_id_is_shown_anywhere(vault_server: VaultServer, tmp_path: Path) -> None:
    vault_server.app_role("quiet")
    secret_id = vault_server.secret_id("quiet")
    settings = of_role(vault_server, tmp_path, "quiet", vault_secret_id=secret_id)
    shown: list[object] = [settings]
    with capture_logs() as lines:
        async with a_session(settings) as session:
            token = token_of(session)
            vault = store(session)
            shown += [session, vault, vars(session), session._way, session._api, vars(session._api)]
            vault_server.admin("POST", "auth/approle/role/quiet/secret-id/destroy", {"secret_id": secret_id})
            vault_server.revoke(token)
            with pytest.raises(SecretStoreUnavailable) as refused:
                await vault.get("connections/x")
            shown += [refused.value, refused.value.__context__, refused.value.__cause__]
    shown += [lines, vault_server.settings(tmp_path, token=token)]
    text = " ".join(f"{one!r} {one}" for one in shown)
    assert lines
    assert token not in text
    assert secret_id not in text
