"""Anthropic: a key in ``x-api-key``, beside the version of the API that each call has to name.

Sources: https://docs.anthropic.com/en/api/overview, https://docs.anthropic.com/en/api/rate-limits (the fields of an answer),
anthropics/anthropic-sdk-python (the base URL, without ``/v1``), NangoHQ/nango and trufflesecurity/trufflehog (the header).
"""

from providers.signing import header
from providers.spec import ApiKey, Provider, RateHeaders

PROVIDER = Provider(
    name="anthropic",
    title="Anthropic",
    docs_url="https://docs.anthropic.com/en/api/overview",
    api_key=ApiKey("API key", "Console, API keys: sk-ant-…. An admin key works for /v1/organizations only"),
    hosts={"": "https://api.anthropic.com"},
    headers={"anthropic-version": "2023-06-01"},  # required
    signers={"api_key": header("x-api-key")},
    # The form of a reset is unverified: RFC 3339 from general knowledge.
    rate_headers=RateHeaders(
        remaining=("anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-tokens-remaining"),
        reset=("anthropic-ratelimit-requests-reset", "anthropic-ratelimit-tokens-reset"),
        reset_format="rfc3339",
    ),
)
