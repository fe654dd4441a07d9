"""The real parts, one of each per test process: emulate's GitHub and Google, and oidc-provider; all on loopback."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from joserfc.jwk import ECKey

from broker.token_endpoint import DEVICE_GRANT
from tests.real.parts import (
    ADA_CLAIMS,
    GRACE_CLAIMS,
    Client,
    OidcServer,
    emulate,
    github_seed,
    google_seed,
    oidc_provider,
)
from tests.real.vault import VaultServer, running_vault


@pytest.fixture(scope="session")
def broker_listener() -> Iterator[socket.socket]:
    """Hold the broker's port: parts register redirect addresses at their start, before any broker runs.

    A test serves on a duplicate (``.dup()``), which its server may close.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:  # see flows/rig.py
        listener.bind(("127.0.0.1", 0))
        yield listener


@pytest.fixture(scope="session")
def broker_url(broker_listener: socket.socket) -> str:
    """Return the broker's public URL."""
    return f"http://127.0.0.1:{broker_listener.getsockname()[1]}"


@pytest.fixture(scope="session")
def make_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a new directory; a part's seed and output stay there."""
    return tmp_path_factory.mktemp


@pytest.fixture(scope="session")
def vault_server(make_directory: Callable[[str], Path]) -> Iterator[VaultServer]:
    """Run HashiCorp Vault. A test that seals or stops it puts it back, and uses tokens of its own."""
    with running_vault(make_directory) as server:
        yield server


@pytest.fixture(scope="session")
def github(broker_url: str, make_directory: Callable[[str], Path]) -> Iterator[Client]:
    """Run emulate's GitHub, where the integration ``github`` is registered."""
    redirect_uri, secret = f"{broker_url}/oauth/github/callback", secrets.token_urlsafe(24)
    seed = github_seed("Iv1.broker", secret, redirect_uri)
    with emulate("github", seed, make_directory=make_directory, health_path="/versions") as base:
        yield Client(base, "Iv1.broker", secret, redirect_uri)


@pytest.fixture(scope="session")
def google(broker_url: str, make_directory: Callable[[str], Path]) -> Iterator[Client]:
    """Run emulate's Google, where the integration ``google`` is registered."""
    redirect_uri, secret = f"{broker_url}/oauth/google/callback", secrets.token_urlsafe(24)
    seed = google_seed("broker.apps.google.test", secret, redirect_uri)
    path = "/.well-known/openid-configuration"
    with emulate("google", seed, make_directory=make_directory, health_path=path) as base:
        yield Client(base, "broker.apps.google.test", secret, redirect_uri)


@pytest.fixture(scope="session")
def oidc(broker_url: str, make_directory: Callable[[str], Path]) -> Iterator[OidcServer]:
    """Run oidc-provider, where the integrations ``oidc-basic``, ``oidc-post`` and ``oidc-key`` are registered."""
    key = ECKey.generate_key("P-256")
    jwks = {"keys": [key.as_dict(private=False, use="sig", alg="ES256", kid=key.thumbprint())]}
    grants = ["authorization_code", "refresh_token", "client_credentials", DEVICE_GRANT]
    # Characters that Basic has to form-encode first (RFC 6749 2.3.1), and a body has to encode too.
    clients = {kind: f"{secrets.token_urlsafe(24)}:+% /&=" for kind in ("basic", "post")}
    options = {
        "clients": [
            {"id": f"broker-{kind}", "secret": secret, "auth": f"client_secret_{kind}"}
            for kind, secret in clients.items()
        ]
        + [{"id": "broker-key", "jwks": jwks, "auth": "private_key_jwt", "grants": grants}],
        "redirectUris": [f"{broker_url}/oauth/oidc-{kind}/callback" for kind in (*clients, "key")],
        "accounts": {"ada": ADA_CLAIMS, "grace": GRACE_CLAIMS},
    }
    clients["key"] = key.as_pem(private=True).decode()
    with oidc_provider(options, directory=make_directory("oidc-provider")) as issuer:
        basic, post, signing = (
            Client(issuer, f"broker-{kind}", secret, f"{broker_url}/oauth/oidc-{kind}/callback")
            for kind, secret in clients.items()
        )
        yield OidcServer(basic, post, signing)
