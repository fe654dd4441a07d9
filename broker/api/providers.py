"""``/v1/providers``: the catalog, each with its configuration schema."""

from __future__ import annotations

from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery

from broker.api import answers
from broker.api.requests import problems, short_page
from broker.errors import NotFound
from broker.integrations import Integrations
from broker.integrations.config import IntegrationConfig
from broker.policy import Principal
from providers.spec import Provider, Setting, Variable, Webhook


def provider_json(provider: Provider) -> answers.ListedProvider:
    """Return a provider as the catalog shows it."""
    oauth2 = provider.oauth2
    return {
        "name": provider.name,
        "title": provider.title,
        "docs_url": provider.docs_url,
        "credential_types": list(provider.credential_types),
        "hosts": dict(provider.hosts),
        "variables": [_variable_json(variable) for variable in provider.variables],
        "default_scopes": list(oauth2.default_scopes) if oauth2 is not None else [],
        "discovery": oauth2.discovery if oauth2 is not None else False,
        "refresh_rotates": oauth2.refresh.rotates if oauth2 is not None else None,
        "webhooks": [_webhook_json(kind, webhook) for kind, webhook in provider.webhooks.items()],
    }


def whole_provider_json(provider: Provider) -> answers.Provider:
    """Return a provider with the schema of an integration's ``config``."""
    return {**provider_json(provider), "config_schema": IntegrationConfig.model_json_schema()}


def _webhook_json(kind: str, webhook: Webhook) -> answers.ProviderWebhook:
    registration = webhook.registration
    return {
        "kind": kind,
        "scheme": webhook.scheme.title,
        "covers": sorted(webhook.scheme.covers),
        "needs_secret": webhook.scheme.needs_secret,
        "docs_url": webhook.docs_url,
        "help": webhook.help,
        "settings": [_setting_json(setting) for setting in webhook.settings],
        "registration": [_setting_json(one) for one in registration.settings] if registration is not None else None,
    }


def _setting_json(setting: Setting) -> answers.Setting:
    return {
        "name": setting.name,
        "help": setting.help,
        "pattern": setting.pattern,
        "needed": setting.needed,
        "secret": setting.secret,
    }


def _variable_json(variable: Variable) -> answers.Variable:
    return {
        "name": variable.name,
        "pattern": variable.pattern,
        "example": variable.example,
        "default": variable.default or None,
        "learned": variable.learned,
    }


@get("/providers", responses=problems())
async def list_providers(
    principal: NamedDependency[Principal],  # noqa: ARG001 - any caller may read the catalog
    integrations: NamedDependency[Integrations],
    limit: FromQuery[int] = 50,
    cursor: FromQuery[str | None] = None,
) -> answers.ProviderList:
    """List the catalog by name."""
    catalog = integrations.catalog
    shown = [provider_json(catalog[name]) for name in sorted(catalog)]
    return short_page(shown, limit=limit, cursor=cursor)


@get("/providers/{name:str}", responses=problems(404))
async def show_provider(
    name: FromPath[str],
    principal: NamedDependency[Principal],  # noqa: ARG001 - any caller may read the catalog
    integrations: NamedDependency[Integrations],
) -> answers.Provider:
    """Show one provider with the schema of an integration's ``config``."""
    if name not in integrations.catalog:
        raise NotFound
    return whole_provider_json(integrations.catalog[name])


def routes() -> Router:
    """Return the routes of this resource."""
    return Router(path="/", route_handlers=[list_providers, show_provider], tags=["providers"])
