"""OpenAI: a key as a bearer token, and rate fields that tell the time left as a duration such as ``6m0s``.

Sources: https://developers.openai.com/api/reference/overview, https://platform.openai.com/docs/guides/rate-limits,
openai/openai-python (the base URL, with its ``/v1``).
"""

from providers.spec import (
    ApiKey,
    Header,
    Member,
    Provider,
    RateHeaders,
    Webhook,
)
from providers.verifying import standard_webhooks

PROVIDER = Provider(
    name="openai",
    title="OpenAI",
    docs_url="https://platform.openai.com/docs/api-reference/authentication",
    api_key=ApiKey(
        "Secret key",
        "Platform settings, API keys: sk-…. Keys of an organization's administrators are of another kind, and another secret",
    ),
    hosts={"": "https://api.openai.com/v1"},
    # There are two budgets, requests and tokens; the one of requests comes first.
    rate_headers=RateHeaders(
        remaining=("x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens"),
        reset=("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"),
        reset_format="duration",
    ),
    webhooks={
        "": Webhook(
            standard_webhooks(),
            "https://platform.openai.com/docs/guides/webhooks",
            event=(Member("/type"),),
            delivery_id=Header("webhook-id"),
            help="The webhook's signing secret, whsec_…",
        )
    },
)
