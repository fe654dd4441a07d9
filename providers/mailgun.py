"""Mailgun: a key as the password of the user ``api``.

Sources: NangoHQ/nango and trufflesecurity/trufflehog (host, ``api:{key}``).
"""

from providers.signing import basic
from providers.spec import (
    ApiKey,
    Member,
    Provider,
    Reply,
    Webhook,
)
from providers.verifying import hmac_of_members

PROVIDER = Provider(
    name="mailgun",
    title="Mailgun",
    docs_url="https://documentation.mailgun.com/docs/mailgun/api-reference/mg-auth",
    api_key=ApiKey("API key", "API Security, or a domain's Sending keys; the user name api is put in by the broker"),
    signers={"api_key": basic("api", "{api_key}")},
    hosts={"": "https://api.mailgun.net"},
    webhooks={
        # Time and token are signed, and the event beside them is not: a token that was there before is a replay.
        "": Webhook(
            hmac_of_members(
                Member("/signature/signature"),
                (Member("/signature/timestamp"), Member("/signature/token")),
                timestamp=Member("/signature/timestamp"),
            ),
            "https://documentation.mailgun.com/docs/mailgun/user-manual/webhooks/securing-webhooks",
            event=(Member("/event-data/event"),),
            delivery_id=Member("/signature/token"),
            acknowledgement=Reply(200),
            help="The HTTP webhook signing key",
        )
    },
)
