"""Paddle Billing: webhooks with a time and an HMAC in one field, good for five seconds.

Sources: https://developer.paddle.com/webhooks/signature-verification, PaddleHQ/paddle-python-sdk (Notifications/Verifier.py).
"""

from providers.spec import Member, Provider, Reply, Webhook
from providers.verifying import timestamped

PROVIDER = Provider(
    name="paddle",
    title="Paddle",
    docs_url="https://developer.paddle.com/webhooks/overview",
    webhooks={
        "": Webhook(
            timestamped(
                "paddle-signature",
                timestamp="ts=",
                prefix="h1=",
                separator=";",
                signed="{timestamp}:{body}",
                tolerance_seconds=5,  # what the SDK allows
            ),
            "https://developer.paddle.com/webhooks/signature-verification",
            event=(Member("/event_type"),),
            delivery_id=Member("/event_id"),
            acknowledgement=Reply(200),
            help="The notification destination's secret key, pdl_ntfset_…",
        )
    },
)
