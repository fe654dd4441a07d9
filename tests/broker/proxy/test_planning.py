"""How calls to a host are made: its pins, what goes along, the defaults, and that a plan is made anew for what changed."""

from __future__ import annotations

from typing import Any

import pytest

from broker.credentials.snapshots import Snapshot
from broker.errors import NotFound, OriginChanged
from broker.integrations import Configured
from broker.integrations.config import IntegrationConfig, endpoint_templates, filled_endpoints, known_variables
from broker.limits import BreakerRule, Rate
from broker.models import Integration
from broker.proxy.planning import CALL_SECONDS, DEFAULT_BREAKER, Plan, Plans, plan_of
from broker.proxy.retrying import RetryRule
from providers.signing import header
from providers.spec import ApiKey, Basic, Provider, Variable

PROVIDER = Provider(
    name="shop",
    title="Shop",
    docs_url="https://shop.test",
    api_key=ApiKey(),
    basic=Basic(),
    signers={"api_key": header("x-shop-key"), "api_key@files": header("x-files-key"), "basic@files": None},
    hosts={
        "": "https://{store}.shop.test/api",
        "files": "https://files.shop.test",
        "region": "https://{region}.shop.test",
    },
    headers={"User-Agent": "plain", "X-Store": "store {store}", "Client-ID": "{client_id}", "X-Region": "{region}"},
    variables=(Variable("store", r"[a-z]+", "acme"), Variable("region", r"[a-z]+", "eu")),
)
PINS = {"api:": "https://acme.shop.test", "api:files": "https://files.shop.test"}


def configured(variables: dict[str, str] | None = None, **config: Any) -> Configured:
    """Return the integration of a connection with these variables."""
    checked = IntegrationConfig.model_validate(config)
    templates = endpoint_templates(PROVIDER, checked, {})
    known = known_variables(PROVIDER, checked, {"store": "acme"} if variables is None else variables)
    row = Integration(name="shop", provider="shop", config=config, created_at=1.0, updated_at=1.0)
    return Configured(row, PROVIDER, checked, filled_endpoints(templates, known), templates, known)


def connection(**changes: Any) -> Snapshot:
    """Return the row of a connection."""
    given: dict[str, Any] = dict.fromkeys(Snapshot._fields)
    given |= {
        "id": "con_a",
        "integration": "shop",
        "provider": "shop",
        "status": "active",
        "credential_type": "api_key",
    }
    given |= {"client_id": "client-7", "pins": PINS, "variables": {"store": "acme"}, "integration_version": (1.0, 1.0)}
    return Snapshot(**{**given, **changes})


def planned(host: str = "", **config: Any) -> Plan:
    return plan_of(configured(**config), connection(), host)


def test_a_plan_has_the_base_url_the_key_and_the_signer_of_its_host() -> None:
    plan, files = planned(), planned("files")
    assert (plan.base_url, files.base_url) == ("https://acme.shop.test/api", "https://files.shop.test")
    assert plan.owned - files.owned == frozenset({b"x-shop-key"})
    assert files.owned - plan.owned == frozenset({b"x-files-key"})
    assert plan.signer is PROVIDER.signers["api_key"]
    assert (plan.key, files.key) == ("shop https://acme.shop.test", "shop https://files.shop.test")


def test_what_goes_along_is_filled_and_forced_where_it_has_a_variable_and_left_out_where_it_is_not_known() -> None:
    assert planned().companions == {
        b"user-agent": (b"plain", False),
        b"x-store": (b"store acme", True),
        b"client-id": (b"client-7", True),
    }


@pytest.mark.parametrize("host", ["uploads", "Files", "region"])
def test_a_host_that_is_not_declared_or_whose_variable_is_not_known_is_not_found(host: str) -> None:
    with pytest.raises(NotFound):
        planned(host)


def test_a_host_that_does_not_serve_this_type_of_credential_is_not_found() -> None:
    with pytest.raises(NotFound, match="for this credential"):
        plan_of(configured(), connection(credential_type="basic"), "files")
    assert plan_of(configured(), connection(credential_type="basic"), "").base_url == "https://acme.shop.test/api"


@pytest.mark.parametrize(
    "pins",
    [
        {},
        {"api:files": "https://files.shop.test"},
        {"api:": "https://other.shop.test"},
        {"api:": "http://acme.shop.test"},
        {"api:": "https://acme.shop.test:8443"},
    ],
)
def test_a_host_that_the_connection_was_not_made_for_is_not_called(pins: dict[str, str]) -> None:
    with pytest.raises(OriginChanged):
        plan_of(configured(), connection(pins=pins), "")


def test_one_host_that_moved_does_not_stop_another() -> None:
    moved = configured(hosts={"files": "https://elsewhere.test"})
    with pytest.raises(OriginChanged):
        plan_of(moved, connection(), "files")
    assert plan_of(moved, connection(), "").base_url == "https://acme.shop.test/api"


def test_the_defaults_where_the_integration_says_nothing() -> None:
    plan = planned()
    assert (plan.timeout_seconds, plan.rate, plan.breaker, plan.counts_errors) == (
        CALL_SECONDS,
        None,
        DEFAULT_BREAKER,
        False,
    )
    assert plan.retry == RetryRule()


def test_what_the_integration_says() -> None:
    plan = planned(
        timeout_seconds=7.0,
        rate_limit={"max_requests": 3, "window_seconds": 2.0, "strategy": "fixed"},
        circuit_breaker={"failure_threshold": 4, "recovery_seconds": 5.0, "window_seconds": 6.0},
        retry={
            "max_attempts": 5,
            "backoff": "linear",
            "initial_delay_seconds": 0.5,
            "max_delay_seconds": 9.0,
            "retry_on": [500],
        },
    )
    assert (plan.timeout_seconds, plan.counts_errors) == (7.0, True)
    assert plan.rate == Rate(3, 2.0, "fixed")
    assert plan.breaker == BreakerRule(4, 6.0, 5.0)
    assert plan.retry == RetryRule(5, False, 0.5, 9.0, frozenset({500}))  # noqa: FBT003 - in the order of the fields


def test_a_named_part_of_a_rule_leaves_the_other_defaults() -> None:
    assert planned(retry={"max_attempts": 2}).retry == RetryRule(attempts=2)


def test_a_plan_is_made_once_for_what_it_depends_on() -> None:
    plans = Plans()
    first = plans.of(configured(), connection(), "")
    assert plans.of(configured(), connection(id="con_b", subject="acme:2"), "") is first
    for changed in (
        connection(integration_version=(1.0, 2.0)),
        connection(client_id="client-8"),
        connection(variables={"store": "acme", "region": "eu"}),
        connection(credential_type="basic"),
        connection(integration="shop-2"),
    ):
        assert plans.of(configured(), changed, "") is not first
    assert plans.of(configured(), connection(), "files") is not first


def test_a_plan_in_memory_does_not_hide_a_pin_that_is_another() -> None:
    plans = Plans()
    plans.of(configured(), connection(), "")
    with pytest.raises(OriginChanged):
        plans.of(configured(), connection(pins={"api:": "https://evil.test"}), "")


def test_a_connection_with_other_variables_has_a_plan_of_its_own() -> None:
    plans = Plans()
    plans.of(configured(), connection(), "")
    pins = {"api:": "https://other.shop.test"}
    other = connection(variables={"store": "other"}, pins=pins)
    plan = plans.of(configured({"store": "other"}), other, "")
    assert plan.base_url == "https://other.shop.test/api"
    assert plan.companions[b"x-store"] == (b"store other", True)


def test_plans_are_kept_in_bounds() -> None:
    plans, one = Plans(), configured()
    for number in range(Plans.MOST + 10):
        plans.of(one, connection(client_id=f"client-{number}"), "")
    assert len(plans._known) <= Plans.MOST
