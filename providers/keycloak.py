"""Keycloak: an OpenID Connect server of one's own, found by ``config.issuer`` (``https://<host>/realms/<realm>``).

A variable for the host would let a session choose who gets the client secret, so the integration names it, as with ``oidc``.

Sources: https://www.keycloak.org/securing-apps/oidc-layers, public discovery documents of Keycloak, openiddict-core.
"""

from dataclasses import replace

from providers.minting import client_credentials
from providers.oidc import PROVIDER as GENERIC

PROVIDER = replace(
    GENERIC,
    name="keycloak",
    title="Keycloak",
    docs_url="https://www.keycloak.org/securing-apps/oidc-layers",
    minting={"client_credentials": client_credentials()},  # which API a token is for is the client's setting
)
