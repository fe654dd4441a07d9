"""Calendly: webhooks with a time and an HMAC in one field.

Sources: https://developer.calendly.com/api-docs/4c305798a61d3-webhook-signatures; that the text is time, dot and body:
https://community.calendly.com/api-webhook-help-61 (topic 386).
"""

from providers.spec import Member, Provider, Webhook
from providers.verifying import timestamped

PROVIDER = Provider(
    name="calendly",
    title="Calendly",
    docs_url="https://developer.calendly.com",
    webhooks={
        "": Webhook(
            timestamped("calendly-webhook-signature"),
            "https://developer.calendly.com/api-docs/4c305798a61d3-webhook-signatures",
            event=(Member("/event"),),
            help="The signing key that the subscription was made with",
        )
    },
)
