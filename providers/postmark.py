"""Postmark: two kinds of tokens with a header each, a server's for mail and an account's for servers and domains.

Which of the two a key is cannot be seen, so the host says it: both names lead to the same address.

Sources: trufflesecurity/trufflehog and the api-evangelist profile of 2026-08-22 (host, both headers).
"""

from providers.signing import header
from providers.spec import (
    ApiKey,
    Header,
    Member,
    Provider,
    Webhook,
)
from providers.verifying import shared_token

PROVIDER = Provider(
    name="postmark",
    title="Postmark",
    docs_url="https://postmarkapp.com/developer/api/overview",
    api_key=ApiKey("Server or account token", "A server's API Tokens; an account's under Account, API Tokens"),
    hosts={"": "https://api.postmarkapp.com", "account": "https://api.postmarkapp.com"},
    signers={
        "api_key": header("x-postmark-server-token"),
        "api_key@account": header("x-postmark-account-token"),
    },
    webhooks={
        # Postmark signs nothing. It sends what the webhook's address or its settings say as user name and password.
        "": Webhook(
            shared_token(Header("authorization"), prefix="Basic ", as_base64=True),
            "https://postmarkapp.com/developer/webhooks/webhooks-overview",
            event=(Member("/RecordType"),),
            help="User name and password with a colon between, as the webhook's settings have them",
        )
    },
)
