"""Typeform: webhooks with an HMAC in base64.

Sources: https://www.typeform.com/developers/webhooks/secure-your-webhooks/ and …/webhooks/example-payload/.
"""

from providers.spec import Member, Provider, Webhook
from providers.verifying import hmac_signature

PROVIDER = Provider(
    name="typeform",
    title="Typeform",
    docs_url="https://www.typeform.com/developers/webhooks/",
    webhooks={
        "": Webhook(
            hmac_signature("typeform-signature", prefix="sha256=", encoding="base64"),
            "https://www.typeform.com/developers/webhooks/secure-your-webhooks/",
            event=(Member("/event_type"),),
            delivery_id=Member("/event_id"),
            help="The webhook's secret",
        )
    },
)
