"""Twilio SendGrid: a key as a bearer token; accounts in the EU have a host of their own.

Sources: sendgrid/sendgrid-python (base_interface.py: both hosts and the header), trufflesecurity/trufflehog.
"""

from providers.spec import (
    ApiKey,
    Header,
    Member,
    Provider,
    Webhook,
)
from providers.verifying import ecdsa_signature

PROVIDER = Provider(
    name="sendgrid",
    title="Twilio SendGrid",
    docs_url="https://www.twilio.com/docs/sendgrid/api-reference/how-to-use-the-sendgrid-v3-api/authentication",
    api_key=ApiKey("API key", "Settings, API Keys: SG.…; GET /v3/scopes says what a key may do"),
    hosts={"": "https://api.sendgrid.com", "eu": "https://api.eu.sendgrid.com"},
    webhooks={
        # The SDK judges no time, and each event of the list has a type and an id of its own. The body's last CR LF counts.
        "": Webhook(
            ecdsa_signature(
                "x-twilio-email-event-webhook-signature",
                signed="{timestamp}{body}",
                timestamp=Header("x-twilio-email-event-webhook-timestamp"),
            ),
            "https://www.twilio.com/docs/sendgrid/for-developers/tracking-events/getting-started-event-webhook-security-features",
            event=(Member("/*/event"),),
            help="The public key that SendGrid shows, in base64",
        )
    },
)
