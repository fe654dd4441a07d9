"""Standard Webhooks: any sender that keeps to the specification, with a shared secret (v1) or a public key (v1a).

Sources: standard-webhooks/standard-webhooks (spec/standard-webhooks.md).
"""

from providers.spec import Header, Member, Provider, Webhook
from providers.verifying import standard_webhooks

PROVIDER = Provider(
    name="standard_webhooks",
    title="Standard Webhooks",
    docs_url="https://www.standardwebhooks.com",
    webhooks={
        "": Webhook(
            standard_webhooks(),
            "https://www.standardwebhooks.com",
            event=(Member("/type"),),
            delivery_id=Header("webhook-id"),
            help="whsec_… for signatures v1, whpk_… for v1a",
        )
    },
)
