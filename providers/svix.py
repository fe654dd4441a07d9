"""Svix: webhooks of any service that sends them through Svix, whose fields begin with ``svix-``.

Sources: https://docs.svix.com/receiving/verifying-payloads/how-manual, svix/svix-webhooks.
"""

from providers.spec import Header, Member, Provider, Webhook
from providers.verifying import standard_webhooks

PROVIDER = Provider(
    name="svix",
    title="Svix",
    docs_url="https://docs.svix.com/receiving/introduction",
    webhooks={
        "": Webhook(
            standard_webhooks("svix"),
            "https://docs.svix.com/receiving/verifying-payloads/how-manual",
            event=(Member("/type"),),
            delivery_id=Header("svix-id"),
            help="The endpoint's signing secret, whsec_… or, for signatures v1a, whpk_…",
        )
    },
)
