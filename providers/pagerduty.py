"""PagerDuty: webhooks (V3) with one signature for each secret that is live.

Sources: https://developer.pagerduty.com/docs/verifying-webhook-signatures, PagerDuty/go-pagerduty (webhookv3).
"""

from providers.spec import Member, Provider, Webhook
from providers.verifying import hmac_signature

PROVIDER = Provider(
    name="pagerduty",
    title="PagerDuty",
    docs_url="https://developer.pagerduty.com/docs/webhooks-overview",
    webhooks={
        "": Webhook(
            hmac_signature("x-pagerduty-signature", prefix="v1=", separator=","),
            "https://developer.pagerduty.com/docs/verifying-webhook-signatures",
            event=(Member("/event/event_type"),),
            delivery_id=Member("/event/id"),
            help="The subscription's secret, which is shown once",
        )
    },
)
