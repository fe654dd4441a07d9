"""Keycloak under its own name: the very server that the generic provider is tried against."""

from __future__ import annotations

from dataclasses import replace

from tests.providers.behaviours.oidc import KEYCLOAK

BEHAVIOURS = (replace(KEYCLOAK, provider="keycloak", name=""),)
