"""Twilio: a pair as user name and password, or a token of an OAuth app; every path names the account's SID.

Sources: twilio/twilio-python (the base URL, Basic, the token request of twilio/credential), NangoHQ/nango,
trufflesecurity/trufflehog.
"""

from urllib.parse import urlencode

from providers.client_auth import client_authentication
from providers.minting import FORM
from providers.spec import (
    Basic,
    Minter,
    Minting,
    Outgoing,
    Provider,
    Reply,
    Webhook,
)
from providers.verifying import hmac_of_form


def client_credentials_request(minter: Minter) -> Outgoing:
    """Ask for a token with the integration's client, in the body; ``ValueError`` when the client has no secret."""
    credential = minter.credential
    _, client = client_authentication(credential.client_id, credential.client_secret, "client_secret_post")
    scope = {"scope": " ".join(minter.scopes)} if minter.scopes else {}
    body = urlencode({"grant_type": "client_credentials", **scope, **client})
    return Outgoing("POST", f"{credential.hosts['oauth'].rstrip('/')}/token", FORM, body.encode())


PROVIDER = Provider(
    name="twilio",
    title="Twilio",
    docs_url="https://www.twilio.com/docs/iam/api",
    basic=Basic(
        "API key, or account SID",
        "User name: an API key's SID (SK…) or the account SID (AC…). Password: the key's secret, or the auth token",
    ),
    minting={"client_credentials": Minting("Client credentials", client_credentials_request, uses_client=True)},
    # "oauth" answers requests for tokens; its own API is reached nowhere else.
    hosts={"": "https://api.twilio.com", "oauth": "https://oauth.twilio.com/v2"},
    webhooks={
        "": Webhook(
            hmac_of_form("x-twilio-signature", body_hash="bodySHA256"),
            "https://www.twilio.com/docs/usage/webhooks/webhooks-security",
            # Whatever is not an instruction would be logged as an error by Twilio: this one says to do nothing.
            acknowledgement=Reply(200, {"Content-Type": "text/xml"}, b"<Response/>"),
            help="The account's auth token, whatever calls are made with",
        )
    },
)
