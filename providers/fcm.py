"""Firebase Cloud Messaging (v1): tokens are minted with the key of a Google service account.

Sources: firebase/firebase-admin-python (firebase_admin/messaging.py: the address; credentials.py),
https://developers.google.com/identity/protocols/oauth2/service-account, NangoHQ/nango (google-service-account).
"""

from providers.client_auth import signed_jwt
from providers.google import HOUR_SECONDS, TOKEN_URL, parse_minted, read_service_account, service_account_of
from providers.minting import FORM, jwt_grant_body
from providers.spec import Minter, Minting, Outgoing, Provider

SCOPES = (
    "https://www.googleapis.com/auth/firebase.messaging",
)  # unverified as the narrowest; an import may name others


def service_account_request(minter: Minter) -> Outgoing:
    """Sign the assertion that a token is given for (RFC 7523). ``aud`` is Google's endpoint also where a stand-in is asked."""
    claims = {
        "iss": minter.material["client_email"].reveal(),
        "scope": " ".join(minter.scopes or SCOPES),
        "aud": TOKEN_URL,
    }
    key, key_id = minter.material["private_key"], minter.material["private_key_id"].reveal()
    assertion = signed_jwt(key, claims, now=minter.now, lifetime_seconds=HOUR_SECONDS, key_id=key_id)
    url = f"{minter.credential.hosts['oauth'].rstrip('/')}/token"
    return Outgoing("POST", url, FORM, jwt_grant_body(assertion))


PROVIDER = Provider(
    name="fcm",
    title="Firebase Cloud Messaging",
    docs_url="https://firebase.google.com/docs/cloud-messaging/send/v1-api",
    minting={
        "service_account": Minting(
            "Service account",
            service_account_request,
            {"key": True},
            read=read_service_account,
            parse_token=parse_minted,
            account=service_account_of,
        )
    },
    # Paths begin with /v1/projects/<project>. "oauth" answers requests for tokens.
    hosts={"": "https://fcm.googleapis.com", "oauth": "https://oauth2.googleapis.com"},
)
