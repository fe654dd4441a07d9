"""Resend: a key as a bearer token; one that may only send is refused everywhere else, and is good all the same.

Sources: resend/resend-openapi (resend.yaml), NangoHQ/nango.
"""

from providers.spec import (
    ApiKey,
    Header,
    Member,
    Provider,
    Webhook,
)
from providers.verifying import standard_webhooks

PROVIDER = Provider(
    name="resend",
    title="Resend",
    docs_url="https://resend.com/docs/api-reference/introduction",
    api_key=ApiKey("API key", "Dashboard, API Keys: re_…, with full access or for sending only"),
    hosts={"": "https://api.resend.com"},
    webhooks={
        "": Webhook(
            standard_webhooks("svix"),
            "https://resend.com/docs/dashboard/webhooks/verify-webhooks-requests",
            event=(Member("/type"),),
            delivery_id=Header("svix-id"),
            help="The webhook's signing secret, whsec_…",
        )
    },
)
